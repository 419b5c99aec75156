"""A conversation in the terminal with any model folder or workdir: `python -m jaxtune.chat --model=WORKDIR`.

Answers are streamed. `/reset` clears the conversation, `/system TEXT` starts a new one with a system prompt,
`/adapter NAME` answers with another of several adapters, `/exit` (or the end of the input) leaves.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import app, flags
from ml_collections import ConfigDict

from jaxtune.common.settings import Settings
from jaxtune.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxtune.data.chat_encoder import ChatEncoder
    from jaxtune.data.templates import Template
    from jaxtune.pretrained.load import ModelBundle

FLAGS = {
    'model': ('', 'a model folder, a hub id, or the workdir of a run'),
    'adapter': ('', 'an adapter folder, or the workdir that holds one; several, with commas, to switch between'),
    'template': ('auto', "the model's own chat template (auto), a name such as chatml, or a Jinja text"),
    'template_args': ('', 'what else the template is given, as JSON: {"enable_thinking": false}'),
    'model_config': ('', 'Hugging Face config fields over those of the model, as JSON'),
    'system': ('', 'a system prompt'),
    'temperature': (0.7, 'sampling temperature; 0 = greedy'),
    'top_p': (0.95, 'nucleus sampling: from the most likely tokens of this total probability'),
    'top_k': (0, 'sample from the k most likely tokens; 0 = all'),
    'max_new_tokens': (256, 'maximum length of an answer'),
    'seed': (0, 'seed of sampling'),
    'dtype': ('float32', 'float32 or bfloat16'),
}


class Loaded(NamedTuple):
    """What writes answers to conversations.

    Attributes:
      bundle: model, parameters and tokenizer.
      template: makes texts of conversations.
      encode: makes ids of those.
      stops: tokens that end an answer.
    """

    bundle: 'ModelBundle'
    template: 'Template'
    encode: 'ChatEncoder'
    stops: tuple[int, ...]


def load(config: Settings, mesh: 'Mesh') -> Loaded:
    """A model to talk with.

    Args:
      config: a full recipe; `model.path`, `method.path`, and of `data` the template are read.
      mesh: where its parameters are put.

    Raises:
      UserError: no such model, one that cannot write, or a template that fails.
    """
    import jax  # slow to import

    from jaxtune.data import templates  # slow to import
    from jaxtune.data.chat_encoder import ChatEncoder, end_of_turn  # slow to import
    from jaxtune.pretrained.load import load_model  # slow to import
    from jaxtune.tasks import specs  # slow to import

    if not config.model.path:
        raise UserError("--model='': expected a model folder, a hub id or a workdir")
    with jax.set_mesh(mesh):
        bundle = load_model(specs.model_spec(config, '--model'), mesh)
    if bundle.model.kind != 'decoder' or 'score' in bundle.params:
        raise UserError(f'--model={config.model.path}: {bundle.model.architecture} does not chat; expected a decoder')
    args, rows = config.data.template_args.to_dict(), bundle.model.config.vocab_size
    template = templates.open_template(config.data.template, bundle.tokenizer, args=args)
    end = end_of_turn(template, bundle.tokenizer)
    stops = bundle.end_ids + (() if end is None else (end,))
    return Loaded(bundle, template, ChatEncoder(template, bundle.tokenizer, vocab_size=rows), stops)


class Chat:
    """A conversation with a model.

    Args:
      config: a full recipe; `model.path`, `data.template`, `sft.system` and `generate` are read.

    Raises:
      UserError: no such model, one that cannot write, or a template that fails.
    """

    def __init__(self, config: Settings) -> None:
        import jax  # slow to import

        from jaxtune.generation.sampling import Stream, from_settings  # slow to import
        from jaxtune.parallel import make_mesh  # slow to import

        bundle, self.template, self.encode, stops = load(config, make_mesh(config.mesh, jax.devices()[:1]))
        self.tokenizer = bundle.tokenizer
        sampling = from_settings(config.generate, self.tokenizer, stops, bundle.model.config.vocab_size)
        self.limit = bundle.model.config.max_positions
        self.room, self.stops = sampling.max_new_tokens, set(sampling.stop_ids)
        self.stream = Stream(bundle.model, sampling, bundle.params)
        self.adapters = bundle.adapters
        self.key, self.turns = jax.random.key(config.seed), []
        self.system = config.sft.system

    def say(self, text: str) -> Iterator[str]:
        """Streams the answer; the oldest turns of a conversation that is too long are dropped.

        Raises:
          UserError: the message alone is too long.
        """
        import jax  # slow to import

        from jaxtune.generation.generator import decode_continuation  # slow to import

        self.turns.append({'role': 'user', 'content': text})
        prompt = self._prompt()
        self.key, key = jax.random.split(self.key)
        new: list[int] = []
        shown = ''
        for token in self.stream(prompt, key):
            if token in self.stops:
                break
            new.append(token)
            whole = decode_continuation(self.tokenizer, prompt, new)
            if not whole.endswith('�'):  # an incomplete character
                yield whole[len(shown) :]
                shown = whole
        self.turns.append({'role': 'assistant', 'content': shown})

    def reset(self, system: str | None = None) -> None:
        """Clears the conversation, and sets another system prompt if one is given."""
        self.turns = []
        self.system = self.system if system is None else system

    def switch(self, name: str) -> None:
        """Switches to another adapter.

        Raises:
          UserError: there is none of this name.
        """
        if name not in self.adapters:
            raise UserError(f'/adapter {name}: expected one of {", ".join(self.adapters) or "several in --adapter"}')
        self.stream.params = self.adapters[name]

    def _prompt(self) -> list[int]:
        from jaxtune.data.formats import Chat as Turns  # slow to import
        from jaxtune.data.formats import FormatError  # slow to import

        while True:
            head = [{'role': 'system', 'content': self.system}] if self.system else []
            try:
                _, ids = self.encode.prompt(Turns((*head, *self.turns)))
            except FormatError as error:
                self.turns.pop()
                raise UserError(f'{"the message" if error.kind == "rows" else "data.template:"} {error}') from None
            if not self.limit or len(ids) + self.room <= self.limit:
                return ids
            if len(self.turns) < 3:
                self.turns.pop()
                raise UserError(
                    f'the message has {len(ids)} tokens; expected at most {self.limit - self.room}, the '
                    f"model's {self.limit} positions less --max_new_tokens={self.room}"
                )
            self.turns = self.turns[2:]


def run(chat: Chat, lines: Iterator[str], write: Callable[[str], object]) -> None:
    """Answers until the input ends.

    Args:
      chat: the conversation.
      lines: the user's input.
      write: prints a piece of text.
    """
    for line in lines:
        words = line.strip()
        if words in ('/exit', '/quit'):
            return
        if words == '/reset' or words.startswith('/system'):
            chat.reset(words.removeprefix('/system').strip() if words.startswith('/system') else None)
            continue
        if not words:
            continue
        try:
            if words.startswith('/adapter'):
                chat.switch(words.removeprefix('/adapter').strip())
                continue
            for piece in chat.say(line.rstrip('\n')):
                write(piece)
        except UserError as error:
            write(f'({error})')
        write('\n')


def _typed() -> Iterator[str]:
    """Lines of standard input, with a prompt on a terminal."""
    while True:
        try:
            yield input('\n> ' if sys.stdin.isatty() else '')
        except (EOFError, KeyboardInterrupt):
            return


def recipe_of(values: flags.FlagValues) -> ConfigDict:
    """The full recipe that the flags of a conversation stand for.

    Raises:
      UserError: one of them is wrong.
    """
    from jaxtune.recipe import recipes  # slow to import

    config = recipes.defaults()
    names = {
        'model': 'model.path',
        'adapter': 'method.path',
        'template': 'data.template',
        'system': 'sft.system',
        'seed': 'seed',
    }
    names |= {name: f'generate.{name}' for name in ('temperature', 'top_p', 'top_k', 'max_new_tokens')}
    keys = {key: getattr(values, name) for name, key in names.items() if hasattr(values, name)}
    keys |= {'task': 'generate', 'model.param_dtype': values.dtype, 'model.compute_dtype': values.dtype}
    for flag, key in (('template_args', 'data.template_args'), ('model_config', 'model.config')):
        if value := getattr(values, flag):
            try:
                keys[key] = json.loads(value)
            except ValueError as error:
                raise UserError(f'--{flag}={value}: expected JSON: {error}') from None
    recipes.apply_overrides(config, keys)
    return config


def main(argv: Sequence[str]) -> int:
    """Runs the conversation; returns the exit status."""
    from jaxtune.common import console  # slow to import

    console.quiet_logs()
    try:
        if len(argv) > 1:
            raise UserError(f'{argv[1]}: expected flags only, such as --model=WORKDIR')
        chat = Chat(recipe_of(flags.FLAGS))
        if sys.stdin.isatty():
            switch = f', /adapter {"|".join(chat.adapters)}' if chat.adapters else ''
            console.note(f'template {chat.template.name}; /reset, /system TEXT{switch}, /exit')

        def write(text: str) -> None:
            sys.stdout.write(text)
            sys.stdout.flush()

        run(chat, _typed(), write)
    except UserError as error:
        print(f'jaxtune: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    return 0


def define(wanted: Mapping[str, tuple[Any, str]]) -> None:
    """Defines flags: name -> default and what it is."""
    kinds = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    for name, (default, comment) in wanted.items():
        kinds[type(default)](name, default, comment)


def cli(argv: list[str] | None = None) -> None:
    """Entry point of `jaxtune chat` and `python -m jaxtune.chat`; `argv` is the command's by default.

    Raises:
      SystemExit: with the exit status.
    """
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'true')
    define(FLAGS)
    app.run(lambda argv: sys.exit(main(argv)), argv)


if __name__ == '__main__':
    cli()
