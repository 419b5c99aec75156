"""Short commands, `jaxtune VERB [MODEL] [DATA] [KEY=VALUE ...]`: each fills in a shipped recipe.

A new one is a line in `VERBS`.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Verb:
    """A short command.

    Attributes:
      about: what it does, in a line.
      recipe: name of the shipped recipe that it fills in; '' for a program of its own.
      takes: word of the usage -> the key that it sets (of a program: the flag, or '' for the word itself), in order;
        those in brackets need not be given, and one that ends with ... takes all words that are left.
      options: name -> key that it sets and what it is.
      program: `module:function` of a program of its own, which is given the words after the verb.
      flags: `module:NAME` of that program's flags: name -> default and what it is.
    """

    about: str
    recipe: str = ''
    takes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    program: str = ''
    flags: str = ''


_TUNED = {'MODEL': 'model.path', 'DATA': 'data.train', '[HELD_OUT]': 'data.eval'}

VERBS: Mapping[str, Verb] = {
    'pretrain': Verb('train a GPT-2 from scratch on text', 'pretrain_causal_lm', {'DATA': 'prepare.data.train'}),
    'full': Verb('go on training every weight of a model on text', 'finetune_full', _TUNED),
    'sft': Verb('teach a model to answer, on conversations', 'sft', _TUNED),
    'lora': Verb('the same by LoRA: a few million weights beside the model', 'lora', _TUNED),
    'qlora': Verb('the same beside a model of four bits a weight', 'qlora', _TUNED),
    'reward': Verb('train a reward model on pairs of answers', 'reward_model', _TUNED),
    'dpo': Verb('let a model prefer the better of two answers', 'dpo', _TUNED),
    'distill': Verb(
        'let a model learn what a larger one says of every token',
        'distill',
        {'MODEL': 'model.path', 'DATA': 'data.train', 'TEACHER': 'distill.teacher', '[HELD_OUT]': 'data.eval'},
    ),
    'ppo': Verb(
        'let a model write what a reward model prefers',
        'ppo',
        {'MODEL': 'model.path', 'DATA': 'data.train', 'REWARD': 'rl.reward'},
    ),
    'grpo': Verb(
        'let a model find out what brings reward',
        'grpo',
        {'MODEL': 'model.path', 'DATA': 'data.train', 'REWARD': 'rl.reward'},
    ),
    'evaluate': Verb('score a model on held-out text', 'evaluate', {'MODEL': 'model.path', 'DATA': 'data.eval'}),
    'generate': Verb('let a model continue prompts', 'generate', {'MODEL': 'model.path', 'DATA': 'data.eval'}),
    'export': Verb(
        "write a model's folder, its adapter merged, and llama.cpp's model.gguf",
        'export',
        {'MODEL': 'model.path', '[HELD_OUT]': 'data.eval'},
        {
            'format': ('export.format', 'safetensors or gguf'),
            'quantise': ('export.quantise', 'of gguf: q8_0, q4_0 or q4_k'),
        },
    ),
    'fit': Verb(
        'what fits on which hardware, and how fast, without having it',
        'fit',
        {'MODEL': 'model.path'},
        {
            'on': ('compile.topology', 'hardware, such as v5e-4,v5p-8,rtx4090,h100x8'),
            'methods': ('compile.methods', 'tuning methods, such as full,lora,qlora'),
            'seq-len': ('compile.seq_lens', 'lengths of a row, such as 2048,8192'),
        },
    ),
    'chat': Verb(
        'talk with a model in the terminal',
        takes={'MODEL': '--model'},
        program='jaxtune.chat:cli',
        flags='jaxtune.chat:FLAGS',
    ),
    'serve': Verb(
        "serve a model by OpenAI's HTTP API, with a page to chat on",
        takes={'MODEL': '--model'},
        program='jaxtune.serve:cli',
        flags='jaxtune.serve:FLAGS',
    ),
    'runs': Verb(
        'list the runs of a folder: state, best value, command',
        takes={'[FOLDER]': ''},
        program='jaxtune.verbs.runs:runs',
    ),
    'compare': Verb(
        'lay runs side by side: curves, recipes, the same prompts',
        takes={'WORKDIR...': ''},
        program='jaxtune.verbs.runs:compare',
    ),
    'recipes': Verb('list the shipped recipes', program='jaxtune.verbs.listing:recipes'),
    'keys': Verb('list the keys of a recipe', takes={'[PART]': ''}, program='jaxtune.verbs.listing:keys'),
}
