"""A short command as the long one that it stands for, and help."""

import contextlib
import difflib
import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jaxtune.common import streams
from jaxtune.errors import UserError
from jaxtune.recipe import shipped
from jaxtune.verbs import VERBS, Verb
from jaxtune.verbs.listing import columns

_HELP = ('--help', '-h', '-help', 'help')


def expand(argv: Sequence[str]) -> list[str] | None:
    """The long command's words; None where the verb has done its work, such as help.

    Raises:
      UserError: no such verb, or words that it does not take.
    """
    words = list(argv[1:])
    if not words or words[0] in _HELP:
        with _readers_may_leave():
            _help(words[1:])
        return None
    if words[0].startswith('-'):
        return list(argv)
    name, *rest = words
    verb = _verb(name)
    if any(word in _HELP[:3] for word in rest):
        with _readers_may_leave():
            _help([name])
        return None
    if verb.program:
        with _readers_may_leave():
            _run(verb, name, rest)
        return None
    long = [*_recipe(verb), *_settings(name, verb, rest)]
    streams.tell(f'jaxtune {name} is: {shlex.join(["python", "-m", "jaxtune.main", *long])}')
    return [argv[0], *long]


@contextlib.contextmanager
def _readers_may_leave() -> Iterator[None]:
    """What reads the output, such as `head`, need not read it to the end."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _verb(name: str) -> Verb:
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, 1)
        hint = f'; nearest: {near[0]}' if near else ''
        raise UserError(f'jaxtune {name}: no such verb; expected one of {", ".join(VERBS)}{hint}')
    return VERBS[name]


def _recipe(verb: Verb) -> list[str]:
    return ['--config', shipped.find(verb.recipe)]


def _settings(name: str, verb: Verb, words: Sequence[str]) -> list[str]:
    """Flags of the long command."""
    free, flags = list(verb.takes.items()), []
    waiting = iter(words)
    for word in waiting:
        if match := re.fullmatch(r'--([\w-]+)(?:=(.*))?', word, re.DOTALL):
            option, value = match.groups()
            if option in verb.options:
                if value is None and (value := next(waiting, None)) is None:
                    raise UserError(f'--{option}: expected a value after it: {verb.options[option][1]}')
                flags.append(f'--config.{verb.options[option][0]}={value}')
            elif option == 'workdir' and value is None:
                flags += [word, next(waiting, '')]
            elif option in ('workdir', 'overwrite', 'check'):
                flags.append(word)
            else:
                known = [*verb.options, 'workdir', 'overwrite', 'check', 'help']
                raise UserError(f'--{option}: expected one of {", ".join(f"--{one}" for one in known)}, or KEY=VALUE')
        elif re.match(r'(--?)?(config\.)?[A-Za-z_][\w.-]*=', word):
            flags.append('--config.' + re.sub(r'^(--?)?(config\.)?', '', word))
        elif free:
            flags.append(f'--config.{free.pop(0)[1]}={word}')
        else:
            raise UserError(f'{word!r}: expected KEY=VALUE here. Usage: {usage(name, verb)}')
    missing = [taken for taken, key in free if not taken.startswith('[') and not _is_set(flags, key)]
    if missing:
        raise UserError(f'{missing[0]} is missing. Usage: {usage(name, verb)}')
    return flags


def _is_set(flags: Sequence[str], key: str) -> bool:
    return any(flag.startswith((f'--config.{key}=', f'--config.{key}.')) for flag in flags)


def usage(name: str, verb: Verb) -> str:
    """What to type."""
    options = [f'[--{option} …]' for option in verb.options]
    more = ['[KEY=VALUE ...]'] if verb.recipe else ['[--FLAG VALUE ...]'] if verb.flags else []
    return ' '.join(['jaxtune', name, *verb.takes, *options, *more])


def _named(name: str) -> Any:
    """What `module:name` names."""
    module, _, attribute = name.partition(':')
    return getattr(importlib.import_module(module), attribute)


def _flags(verb: Verb) -> dict[str, str]:
    """What a program's flags are for, by name, but for those that its words stand for."""
    flags = _named(verb.flags) if verb.flags else {}
    taken = {flag.removeprefix('--') for flag in verb.takes.values()}
    return {name: about for name, (_, about) in flags.items() if name not in taken}


def _run(verb: Verb, name: str, words: Sequence[str]) -> None:
    free, given, known, flags = list(verb.takes.items()), [], _flags(verb), any(verb.takes.values())
    waiting = iter(words)
    for word in waiting:
        if word.startswith('--') and word[2:] in known:
            if (value := next(waiting, None)) is None:
                raise UserError(f'{word}: expected a value after it: {known[word[2:]]}')
            given.append(f'{word}={value}')
        elif word.startswith('-') and flags:
            given.append(word)
        elif free and not word.startswith('-'):
            _, flag = free[0] if free[0][0].endswith('...') else free.pop(0)
            given.append(f'{flag}={word}' if flag else word)
        else:
            raise UserError(f'{word!r}: expected nothing more. Usage: {usage(name, verb)}')
    _named(verb.program)([name, *given] if flags else given)


def _help(names: Sequence[str]) -> None:
    if not names:
        print('jaxtune: language models from raw text to what people prefer\n')
        print('  jaxtune VERB [MODEL] [DATA] [KEY=VALUE ...]')
        print('  jaxtune --config RECIPE [--workdir DIR] [--check] [--config.KEY=VALUE ...]\n')
        indent = max(map(len, VERBS)) + 2
        for name, verb in VERBS.items():
            print(columns(name, verb.about, indent))
        print('\nMore on one of them: jaxtune --help VERB.')
        print('MODEL is a Hugging Face folder, a hub id or a workdir; KEY one of jaxtune keys.')
        return
    verb = _verb(names[0])
    print(f'{usage(names[0], verb)}\n\n{verb.about}')
    if verb.options:
        indent = max(map(len, verb.options)) + 4
        print()
        for option, (key, about) in verb.options.items():
            print(columns(f'--{option}', f'{about} ({key})', indent))
    if flags := _flags(verb):
        indent = max(map(len, flags)) + 4
        print()
        for name, about in flags.items():
            print(columns(f'--{name}', about, indent))
    if verb.recipe:
        print(f'\nFills in {shipped.find(verb.recipe)}:')
        print(columns('', shipped.about(verb.recipe), 2))
        print(f'All keys: jaxtune keys. Results go to --workdir, runs/{verb.recipe} by default.')
