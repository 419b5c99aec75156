"""Chat templates run in a process of their own, which the system ends where one takes too long or too much memory.

A template comes with a model or a recipe, so it may hold anything: loops without end, strings that double, calls that
never return. Jinja's sandbox keeps it from files and the interpreter; limits of the process keep it from the machine.
This file is both ends: imported, `Renderer` asks; run as a script, it answers. The script imports nothing of jaxtune.
"""

import atexit
import contextlib
import functools
import json
import math
import os
import pickle
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any, NoReturn

SECONDS = 2  # of the processor, to compile a template or to render a conversation
MEMORY = 1 << 29  # bytes of the process
# Characters that a template may write, and how many more for each byte of what it is given.
TEXT, TEXT_PER_BYTE = 1 << 20, 16

# What stands around what `{% generation %}` marks, until the text is made: nobody's text holds it.
_OPEN, _CLOSE = (f'\U000ffff0{secrets.token_hex(8)}{side}' for side in '()')


class Renderer:
    """The asking end. One process serves all templates; another is started where it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        atexit.register(self._close)

    def __call__(self, source: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Renders a template several times.

        Args:
          source: its Jinja.
          requests: its variables, for each rendering; none to compile it only.

        Returns:
          For each request `{"text", "spans"}`, with where the template marks what the assistant writes, or
          `{"error": kind, "message": text}`. The kinds are `syntax` and `compile` (then it is the only answer),
          `sandbox`, `refuses`, `fails` and `limit`.
        """
        try:
            data = pickle.dumps((source, requests), pickle.HIGHEST_PROTOCOL)
        except (RecursionError, TypeError, AttributeError, pickle.PicklingError) as error:
            return [_failure('fails', error)]
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            process = self._process
            assert process is not None
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                _write(process.stdin, data)
                return json.loads(_read(process.stdout))
            except (OSError, EOFError):
                status = self._close()
        return [{'error': 'limit', 'message': _what_ended(status)}]

    def _start(self) -> None:
        # A session of its own: Ctrl-C is for the run alone. `-P`: beside this file lie modules with names of others'.
        self._process = subprocess.Popen(
            [sys.executable, '-P', __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _close(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        for stream in filter(None, (process.stdin, process.stdout)):
            with contextlib.suppress(OSError):  # what was not yet written is lost with the process
                stream.close()
        return process.wait()


@functools.lru_cache(maxsize=1)
def _renderer(process: int) -> Renderer:
    return Renderer()


def render(source: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `Renderer` answers, from the one that this process has."""
    return _renderer(os.getpid())(source, requests)


def _what_ended(status: int) -> str:
    import signal  # in the worker process alone

    if status == -signal.SIGXCPU:
        return f'takes longer than {SECONDS} seconds'
    name = signal.Signals(-status).name if status < 0 else f'status {status}'
    return f'ends the process that renders it ({name}), which may use {MEMORY >> 20} MiB'


def _failure(kind: str, error: BaseException) -> dict[str, str]:
    message = ' '.join(str(error).split())[:200]
    message = f'{type(error).__name__}: {message}' if kind in ('fails', 'compile') else message
    return {'error': kind, 'message': message}


def _write(stream: IO[bytes], data: bytes) -> None:
    stream.write(len(data).to_bytes(8, 'little') + data)
    stream.flush()


def _read(stream: IO[bytes]) -> bytes:
    size = int.from_bytes(_exactly(stream, 8), 'little')
    return _exactly(stream, size)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _serve() -> None:
    """The answering end, until the asking one is gone."""
    import resource  # in the worker process alone

    environment = _environment()
    compiled = functools.lru_cache(maxsize=16)(environment.from_string)

    def limit(kind: int, amount: int) -> None:
        most = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (amount if most == resource.RLIM_INFINITY else min(amount, most), most))

    def start_clock() -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + SECONDS)

    limit(resource.RLIMIT_AS, MEMORY)
    limit(resource.RLIMIT_CORE, 0)
    source = sys.stdin.buffer
    sink = os.fdopen(os.dup(1), 'wb')
    while True:
        try:
            data = _read(source)
        except EOFError:
            return
        _write(sink, json.dumps(_answer(compiled, data, start_clock)).encode())


def _answer(compiled: Callable[[str], Any], data: bytes, start_clock: Callable[[], None]) -> list[dict[str, Any]]:
    from jinja2.exceptions import TemplateSyntaxError  # in the worker process alone

    start_clock()
    try:
        source, requests = pickle.loads(data)
        template = compiled(source)
    except TemplateSyntaxError as error:
        return [{'error': 'syntax', 'message': f'line {error.lineno}: {_failure("syntax", error)["message"]}'}]
    except Exception as error:  # of a template's own: a parser that recurses, constants that are folded
        return [_failure('compile', error)]
    limit = TEXT + TEXT_PER_BYTE * len(data)
    answers = []
    for variables in requests:
        start_clock()
        answers.append(_rendered(template, variables, limit))
    return answers


def _rendered(template: Any, variables: dict[str, Any], limit: int) -> dict[str, Any]:
    from jinja2.exceptions import SecurityError, TemplateError  # in the worker process alone

    try:
        text = template.render(**variables)
        if len(text) > limit:
            return {'error': 'limit', 'message': f'writes more than {limit:,} characters'}
        text, spans = _take_marks(text)
        text.encode()
        return {'text': text, 'spans': spans}
    except SecurityError as error:
        return _failure('sandbox', error)
    except TemplateError as error:
        return _failure('refuses', error)
    except Exception as error:  # of a template's own
        return _failure('fails', error)


def _take_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    if _OPEN not in text:
        return text, []
    parts, spans, at, start = [], [], 0, 0
    for part in re.split(f'({re.escape(_OPEN)}|{re.escape(_CLOSE)})', text):
        if part == _OPEN:
            start = at
        elif part == _CLOSE:
            spans.append((start, at))
        else:
            parts.append(part)
            at += len(part)
    return ''.join(parts), spans


def _environment() -> Any:
    """Jinja as `transformers` sets it up for chat templates, without what makes text up."""
    import datetime  # in the worker process alone

    from jinja2 import nodes  # in the worker process alone
    from jinja2.exceptions import TemplateError  # in the worker process alone
    from jinja2.ext import Extension, loopcontrols  # in the worker process alone
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # in the worker process alone

    class Generation(Extension):
        """`{% generation %} … {% endgeneration %}`: what the assistant writes."""

        tags = {'generation'}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
            return nodes.CallBlock(self.call_method('_mark'), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return _OPEN + caller() + _CLOSE

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(str(message))

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters['tojson'] = tojson
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
    del environment.globals['lipsum']
    return environment


if __name__ == '__main__':
    _serve()
