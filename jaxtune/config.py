"""Every key of a recipe: its default, what it may be, and what it is for."""

import dataclasses
from typing import Any

from jaxtune.common.checks import (
    Check,
    axis_size,
    boolean,
    integer,
    layers,
    names,
    number,
    one_of,
    path,
    path_list,
    path_names,
    ranks,
    template,
    text,
)


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    default: Any
    check: Check
    comment: str


class Free:
    """A subtree whose keys belong to somebody else (Hugging Face, a data step)."""

    def __init__(self, comment: str):
        self.comment = comment


_dtype = one_of('float32', 'bfloat16')
_WIDE, _LONG = 2**20, 2**24  # more rows, more tokens of a row, than any machine holds

REWARDED = ('ppo', 'grpo')  # tasks that learn from rewards
TRAINING = ('train', *REWARDED)  # tasks that change weights

SCHEMA: dict[str, Key | Free] = {
    'task': Key(
        'train',
        one_of('prepare', *TRAINING, 'evaluate', 'generate', 'export', 'compile'),
        'what to do',
    ),
    'seed': Key(0, integer(0, high=2**32 - 1), 'seed of initialisation, data order and sampling'),
    'model.path': Key('', path, 'a Hugging Face folder, a hub id, a jaxtune workdir, @STAGE; empty = from scratch'),
    'model.config': Free('from scratch: Hugging Face config fields, model_type among them'),
    'model.family': Key('', text, 'module:NAME of your own Family, for a model_type that is not shipped'),
    'model.param_dtype': Key(
        'float32', _dtype, 'what weights are kept in; norms, biases and optimizer state stay float32'
    ),
    'model.compute_dtype': Key('float32', _dtype, 'what activations and matrix products use'),
    'model.remat': Key(
        'dots', one_of('none', 'full', 'dots'), 'the backward pass computes again: nothing, all, or all but products'
    ),
    'model.attention': Key('auto', one_of('auto', 'xla', 'flash'), 'attention kernel; the one that ran is logged'),
    'tokenizer.path': Key('', path, "default: the model's own; @prepare; bytes = UTF-8 bytes, no file needed"),
    'objective': Key(
        'causal_lm',
        one_of('causal_lm', 'masked_lm', 'span_corruption', 'seq2seq', 'classification', 'sft', 'reward', 'dpo'),
        'what is learnt',
    ),
    'masked_lm.probability': Key(0.15, number(above=0, high=1), 'masked_lm: share of the tokens to predict'),
    'masked_lm.whole_word': Key(False, boolean, "masked_lm: a word's tokens are chosen together"),
    'span_corruption.mode': Key(
        'spans', one_of('spans', 'prefix', 'ul2'), "span_corruption: T5's spans, a prefix to go on from, UL2's mixture"
    ),
    'span_corruption.density': Key(0.15, number(above=0, high=0.9), 'spans: share of the tokens hidden'),
    'span_corruption.mean_length': Key(3.0, number(1), 'spans: mean length of a hidden span'),
    'seq2seq.prefix': Key('', text, "seq2seq: the task's name, put before every source"),
    'sft.train_on': Key('all', one_of('all', 'last'), 'sft: every answer of a conversation is learnt, or the last'),
    'sft.system': Key('', text, 'a system prompt for conversations without one; for preferences and generate too'),
    'sft.demonstrations': Key('', path, 'conversations that stand before every other one and are never learnt'),
    'sft.neftune_alpha': Key(0.0, number(0), 'sft: noise on the embeddings in training, 5 is usual; 0 = off'),
    'reward.center': Key(0.0, number(0), 'reward: weight of the squared sum of the two rewards'),
    'reward.label_smoothing': Key(0.0, number(0, 0.5), 'reward: share of the pairs whose order is taken to be wrong'),
    'dpo.loss': Key('sigmoid', one_of('sigmoid', 'ipo', 'hinge', 'kto', 'orpo', 'simpo'), 'how pairs become a loss'),
    'dpo.beta': Key(0.1, number(above=0), 'dpo: how dear it is to leave the reference (orpo: weight of the odds)'),
    'dpo.reference': Key('', path, 'dpo: the model to stay near: folder, workdir, @STAGE; empty = that of the start'),
    'dpo.label_smoothing': Key(0.0, number(0, 0.49), 'sigmoid, simpo: share of the pairs taken to be wrong'),
    'dpo.gamma': Key(0.5, number(0), 'simpo: margin of the rewards'),
    'dpo.chosen_weight': Key(1.0, number(0), 'kto: weight of desirable answers'),
    'dpo.rejected_weight': Key(1.0, number(0), 'kto: weight of undesirable answers'),
    'method.name': Key('full', one_of('full', 'lora', 'qlora', 'adapter', 'prompt'), 'which weights are trained'),
    'method.rank': Key(16, integer(1, high=_WIDE), 'LoRA: rank of the update'),
    'method.alpha': Key(32.0, number(above=0), 'LoRA: scale alpha / rank'),
    'method.dropout': Key(0.0, number(0, 0.99), 'LoRA: dropout on its input'),
    'method.targets': Key('all-linear', names, "LoRA: 'all-linear', Hugging Face module names, or both"),
    'method.layers': Key('all', layers, "LoRA: 'all' or a range such as 4:8"),
    'method.rslora': Key(False, boolean, 'LoRA: scale alpha / sqrt(rank)'),
    'method.dora': Key(False, boolean, 'LoRA: train magnitudes apart from directions'),
    'method.ranks': Key('', ranks, 'LoRA: other ranks by module, such as q_proj=4,layers.0.mlp.up_proj=2'),
    'method.init': Key(
        'default', one_of('default', 'pissa', 'loftq'), "LoRA: factors begin at zero, at PiSSA's or at LoftQ's"
    ),
    'method.lr_ratio': Key(1.0, number(above=0), 'LoRA+: learning rate of b over that of a'),
    'method.path': Key(
        '', path_list, 'an adapter folder, or the workdir that holds one, to begin with; generate: several, with commas'
    ),
    'method.block_size': Key(64, integer(16, high=_WIDE), 'NF4: weights that share one scale'),
    'method.double_quant': Key(True, boolean, 'NF4: quantise the scales too'),
    'method.bottleneck': Key(64, integer(1, high=_WIDE), 'adapter: width of the bottleneck'),
    'method.placement': Key(
        'houlsby', one_of('houlsby', 'pfeiffer'), 'adapter: after attention and feed-forward layers, or the latter only'
    ),
    'method.virtual_tokens': Key(20, integer(1, high=_WIDE), 'prompt tuning: how many trained tokens'),
    'method.init_text': Key('', text, 'prompt tuning: text whose embeddings they start from; empty = random'),
    'method.prefix': Key(False, boolean, 'prompt tuning: train keys and values in every layer instead (prefix tuning)'),
    'data.train': Key('', path, 'a path, glob, folder, dataset id, python-stdlib or @STAGE'),
    'data.eval': Key('', path, 'the same, held out; generate takes its prompts from it'),
    'data.format': Key(
        'auto',
        one_of('auto', 'text', 'pair', 'alpaca', 'sharegpt', 'messages', 'prompt', 'preference'),
        'what a record looks like',
    ),
    'data.template': Key('auto', template, "auto (the tokenizer's chat template), a name, or a Jinja text"),
    'data.seq_len': Key(512, integer(2, high=_LONG), 'tokens in a row of a batch'),
    'data.packing': Key(True, boolean, 'several documents a row; they never see each other'),
    'data.append_eos': Key(True, boolean, "end each text document with the tokenizer's EOS"),
    'data.text_key': Key('text', text, 'field of a record that holds the text'),
    'data.source_key': Key('source', text, 'field of a pair that is read'),
    'data.target_key': Key('target', text, 'field of a pair that is written'),
    'data.target_len': Key(0, integer(0, high=_LONG), 'tokens of a target in a row of a batch; 0 = data.seq_len'),
    'data.eval_fraction': Key(0.02, number(0, 0.5), 'prepare: share of the documents held out'),
    'data.min_chars': Key(1, integer(0), 'prepare: shorter documents are left out'),
    'data.vocab_size': Key(8192, integer(300, high=_LONG), 'prepare: size of the vocabulary to train'),
    'data.sources': Free(
        'prepare: what to collect, label -> a path, or path, kind, weight, preset, language, text_key'
    ),
    'data.steps.extract.favour': Key(
        'balance', one_of('balance', 'precision', 'recall'), 'web pages: what extraction leans to'
    ),
    'data.steps.extract.seconds': Key(30.0, number(above=0), 'web pages: one that takes longer is set aside'),
    'data.steps.clean.encoding': Key(False, boolean, 'prepare: mend text decoded with the wrong encoding (ftfy)'),
    'data.steps.clean.unicode': Key(False, boolean, 'prepare: Unicode NFC, plain line ends, no control characters'),
    'data.steps.clean.markup': Key(False, boolean, 'prepare: no rests of markup and bare URLs, no e-book licences'),
    'data.steps.clean.pii': Key(False, boolean, 'prepare: mask email and IP addresses and telephone numbers'),
    'data.steps.language.keep': Key((), names, "prepare: languages kept, such as ('en', 'zh'); () = all"),
    'data.steps.language.model': Key('', path, "prepare: a fastText model's file; '' = scripts and stop words"),
    'data.steps.language.min_score': Key(0.5, number(0, 1), 'prepare: certainty below which a language is not taken'),
    'data.steps.filter.preset': Key(
        'none', one_of('none', 'auto', 'web', 'books', 'code', 'zh'), "prepare: quality rules; auto = by source's kind"
    ),
    'data.steps.filter.max_chars': Key(0, integer(0), 'prepare: longer documents are left out; 0 = none'),
    'data.steps.filter.blocklist': Key('', path, 'prepare: a file of words, phrases and domains, one a line'),
    'data.steps.filter.custom': Key('', text, 'prepare: module:function of a text and its metadata, False = drop'),
    'data.steps.dedup.near': Key(0.0, number(0, 1), 'prepare: Jaccard similarity of near-duplicates to find; 0 = off'),
    'data.steps.dedup.ngram': Key(5, integer(1, high=1000), 'prepare: words in a shingle'),
    'data.steps.dedup.hashes': Key(
        256, integer(16, high=2**13), 'prepare: MinHash values a document, cut into bands to suit'
    ),
    'data.steps.dedup.paragraphs': Key(
        0, integer(0), 'prepare: a paragraph that more documents hold stays in the first of them only; 0 = off'
    ),
    'data.steps.dedup.substring': Key(
        0, integer(0), 'prepare: a run of so many words stays in the first document only; 0 = off, 50 is usual'
    ),
    'data.steps.decontaminate.against': Key(
        (), path_names, 'prepare: evaluation files whose text must not be in the data'
    ),
    'data.steps.decontaminate.ngram': Key(13, integer(3, high=1000), 'prepare: words in a row that make an overlap'),
    'data.steps.tokenizer.model': Key('bpe', one_of('bpe', 'unigram'), 'prepare: what is trained'),
    'data.steps.tokenizer.special_tokens': Key((), names, 'prepare: further tokens of the vocabulary to train'),
    'data.steps.tokenizer.sample_bytes': Key(
        1 << 30, integer(1, high=2**62), 'prepare: text that the vocabulary is trained on'
    ),
    'data.steps.limits.broken': Key(1000, integer(0), 'prepare: broken files and records set aside before it fails'),
    'data.steps.limits.document_bytes': Key(
        32 << 20, integer(1, high=2**62), 'prepare: larger records and pages are set aside'
    ),
    'data.steps.build.shard_tokens': Key(1 << 30, integer(1, high=2**62), 'prepare: tokens in a file at most'),
    'data.engine': Key('local', one_of('local', 'slurm', 'ray'), 'prepare: where the steps run'),
    'data.workers': Key(0, integer(0, high=2**12), 'prepare: processes at once; 0 = one a core'),
    'data.slurm.partition': Key('', text, 'slurm: the partition'),
    'data.slurm.time': Key('24:00:00', text, 'slurm: time limit of a task'),
    'data.slurm.memory_gb': Key(4, integer(1), 'slurm: memory of a task'),
    'data.slurm.setup': Key('', text, 'slurm: a shell command that makes jaxtune importable'),
    'data.slurm.dry_run': Key(False, boolean, 'slurm: print the scripts instead of submitting them'),
    'train.steps': Key(0, integer(0), 'updates; 0 = by train.epochs'),
    'train.epochs': Key(1.0, number(above=0, high=1e6), 'passes over the data, where train.steps is 0'),
    'train.batch_size': Key(8, integer(1, high=_WIDE), 'sequences an update, over the whole pod'),
    'train.accumulate': Key(
        'auto', integer(1, 'auto', high=_WIDE), 'micro-batches it is cut into; auto = as few as fit in memory'
    ),
    'optimizer.name': Key(
        'adamw', one_of('adamw', 'adamw8bit', 'adafactor', 'lion', 'muon', 'sgd'), 'how gradients become updates'
    ),
    'optimizer.lr': Key(2e-5, number(above=0), 'peak learning rate of pretrained weights (all, from scratch)'),
    'optimizer.new_lr': Key(1e-4, number(above=0), 'peak learning rate of weights that the model folder lacked'),
    'optimizer.schedule': Key('cosine', one_of('cosine', 'linear', 'constant', 'wsd'), 'course after the warm-up'),
    'optimizer.warmup_steps': Key(0, integer(0), 'updates over which the rate rises from 0'),
    'optimizer.min_ratio': Key(0.1, number(0, 1), 'cosine: where it ends, as a share of the peak'),
    'optimizer.decay_ratio': Key(0.2, number(0, 1), 'wsd: last share of the updates, over which the rate falls to 0'),
    'optimizer.weight_decay': Key(0.01, number(0), 'decoupled; kernels and embeddings only'),
    'optimizer.b1': Key(
        'auto', number(0, 0.99999, 'auto'), "decay of the first moment (sgd, muon: momentum); auto = its paper's"
    ),
    'optimizer.b2': Key(
        'auto', number(0, 0.99999, 'auto'), "decay of the second moment (lion: of its one); auto = its paper's"
    ),
    'optimizer.eps': Key(
        'auto', number(None, None, 'auto', above=0), 'added to the root of the second moment (adafactor: to a square)'
    ),
    'optimizer.clip_norm': Key(1.0, number(0), 'gradients are scaled down to this global norm; 0 = off'),
    'optimizer.offload': Key(False, boolean, 'keep the state in pinned host memory'),
    'eval.every': Key(0, integer(0), 'updates between evaluations; 0 = only at the end'),
    'eval.batches': Key(0, integer(0), 'at most so many batches an evaluation; 0 = all'),
    'eval.batch_size': Key(0, integer(0, high=_WIDE), 'sequences a batch; 0 = that of a training micro-batch'),
    'eval.patience': Key(0, integer(0), 'stop after so many evaluations without a better value; 0 = off'),
    'eval.samples': Key(
        0, integer(0, high=_WIDE), 'held-out prompts answered before and after training, for the report; 0 = off'
    ),
    'eval.metric': Key('eval/loss', text, 'what "better" means; accuracies and rewards rise, all else falls'),
    'checkpoint.every': Key(0, integer(0), 'updates between checkpoints; 0 = at evaluations and at the end'),
    'checkpoint.keep': Key(1, integer(1), 'newest checkpoints kept; the best by eval.metric is kept beside them'),
    'generate.max_new_tokens': Key(128, integer(1, high=_LONG), 'length of a completion at most'),
    'generate.temperature': Key(1.0, number(0), '0 = greedy'),
    'generate.top_k': Key(0, integer(0), 'sample among the k likeliest; 0 = all'),
    'generate.top_p': Key(1.0, number(above=0, high=1), 'sample among the likeliest of this total probability'),
    'generate.samples': Key(1, integer(1, high=_WIDE), 'completions a prompt'),
    'generate.prompts': Key(0, integer(0), 'at most so many prompts; 0 = all'),
    'generate.prompt_tokens': Key(
        0, integer(0), 'the first so many tokens of each text are the prompt; 0 = the whole text'
    ),
    'generate.beams': Key(
        1, integer(1, high=2**10), 'beam search: so many hypotheses a prompt, the best is kept; 1 = off'
    ),
    'generate.length_penalty': Key(
        1.0, number(), "beam search: a hypothesis' log-probability is divided by its length to this power"
    ),
    'generate.batch_size': Key(8, integer(1, high=_WIDE), 'prompts sampled together'),
    'generate.bleu_tokenize': Key(
        '13a', one_of('13a', 'zh', 'intl', 'char', 'none'), "words of BLEU's score; zh for Chinese"
    ),
    'rl.reward': Key('', path, 'what scores answers: a reward model (workdir, folder, @STAGE), or module:function'),
    'rl.reward_timeout': Key(
        600.0, number(above=0), 'seconds that a reward function may take for the answers of a step'
    ),
    'rl.rollouts': Key(64, integer(1, high=_WIDE), 'answers sampled a step'),
    'rl.group': Key(8, integer(2, high=_WIDE), 'grpo: answers a prompt'),
    'rl.epochs': Key(4, integer(1, high=_WIDE), 'passes over the answers of a step, in updates of train.batch_size'),
    'rl.kl_coef': Key(0.05, number(0), 'weight of the divergence from the policy of the start'),
    'rl.clip': Key(0.2, number(above=0), 'clip range of the probability ratio'),
    'rl.value_coef': Key(0.1, number(0), "ppo: weight of the value head's loss"),
    'rl.value_clip': Key(0.2, number(0), 'ppo: clip range of the value; 0 = off'),
    'rl.gamma': Key(1.0, number(0, 1), 'ppo: discount'),
    'rl.gae_lambda': Key(0.95, number(0, 1), 'ppo: decay of generalised advantage estimation'),
    'rl.missing_eos_penalty': Key(0.0, number(0), 'taken off the reward of an answer cut at max_new_tokens'),
    'mesh.data': Key(-1, axis_size, 'copies of the model, each with its own rows'),
    'mesh.fsdp': Key(1, axis_size, 'parameters and rows divided'),
    'mesh.tensor': Key(1, axis_size, 'heads and widths divided'),
    'mesh.sequence': Key(1, axis_size, 'length divided'),
    'compile.topology': Key('', text, 'v5e:16x16, v5p:2x2x1, cuda:h200x8 …: compile for hardware that is not there'),
    'export.dtype': Key(
        'auto', one_of('auto', 'float32', 'bfloat16'), "what exported weights are kept in; auto = as model.path's were"
    ),
    'export.requantise': Key(False, boolean, 'export: round the merged kernels to NF4 again, and say what it costs'),
    'log.every': Key(10, integer(1), 'updates between lines of metrics.jsonl'),
    'log.wandb': Key(False, boolean, 'send the metrics to Weights & Biases too'),
}
