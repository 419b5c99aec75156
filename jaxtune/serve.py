"""A model behind OpenAI's HTTP API, with a page to chat on: `jaxtune serve MODEL` (extra `serve`).

Whoever speaks to OpenAI's API speaks to it, with `base_url='http://127.0.0.1:8000/v1'`. Several requests are answered
together, each as if it were alone. Adapters of one base (`--adapter a,b`) are models of their own, beside it, and share
its weights. It answers this machine alone unless `--host` says otherwise, and then only requests with the key.
"""

import contextlib
import copy
import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from absl import app, flags

from jaxtune import chat
from jaxtune.common import formatting, preemption, streams
from jaxtune.common.settings import Settings
from jaxtune.errors import UserError, line_of

if TYPE_CHECKING:
    from jaxtune.pretrained.load import ModelBundle
    from jaxtune.serving.app import Service

_EXTRA = ('starlette', 'uvicorn')
_KEY = 'JAXTUNE_API_KEY'

FLAGS = {name: value for name, value in chat.FLAGS.items() if name != 'seed'} | {
    'adapter': (
        '',
        'an adapter folder, or the workdir that holds one; several, with commas: each is a model by itself',
    ),
    'system': ('', 'the system prompt of conversations without one'),
    'temperature': (1.0, 'sampling temperature where a request names none; 0 = greedy'),
    'top_p': (1.0, 'nucleus sampling where a request names none; 1 = from all tokens'),
    'top_k': (0, 'sample from the k most likely tokens where a request names none; 0 = all'),
    'max_new_tokens': (1024, 'maximum length of an answer in a conversation where a request names none'),
    'host': ('127.0.0.1', 'the address to listen at; another than this machine needs a key'),
    'port': (8000, 'the port to listen at; 0 = any that is free'),
    'api_key': ('', f'what requests must bring, as Authorization: Bearer KEY; better in the environment as {_KEY}'),
    'name': ('', "the model's name in requests; default: the last part of its path"),
    'slots': (8, 'answers that are written at a time'),
    'max_queue': (256, 'requests that may wait for a slot; further ones are refused'),
    'context': (0, "tokens of a prompt and its answer at most; 0 = the model's positions"),
    'tensor': (1, 'devices that the model is divided over'),
    'timeout': (600.0, 'seconds that an answer may take'),
    'max_body': (2**20, 'bytes of a request at most'),
}


def check(values: Any) -> str:
    """Checks what needs no model; returns the key that requests must bring, '' = none.

    Raises:
      UserError: the extra is not installed, or a flag is wrong.
    """
    if missing := [name for name in _EXTRA if importlib.util.find_spec(name) is None]:
        raise UserError(f"jaxtune serve: {missing[0]} is not installed; expected pip install 'jaxtune[serve]' before")
    from jaxtune.serving.guard import is_local  # needs the extra

    for name, least in {'slots': 1, 'max_queue': 0, 'context': 0, 'tensor': 1, 'max_body': 1, 'port': 0}.items():
        if getattr(values, name) < least:
            raise UserError(f'--{name}={getattr(values, name)}: expected at least {least}')
    if not values.timeout > 0:
        raise UserError(f'--timeout={values.timeout}: expected seconds, more than 0')
    if values.port > 65535:
        raise UserError(f'--port={values.port}: expected at most 65535')
    key = values.api_key or os.environ.get(_KEY, '')
    if not key and not is_local(values.host):
        raise UserError(f'--host={values.host}: others can reach this address; expected --api_key or {_KEY} with it')
    return key


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet.

    Raises:
      UserError: there is no such address, or it is taken.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(f'--host={host} --port={port}: {error.strerror}; expected another') from None
    return bound


def open_service(config: Settings, values: Any) -> 'Service':
    """Loads what is served, and compiles what the first request needs.

    Args:
      config: a full recipe, as for `chat.load`.
      values: the flags.

    Raises:
      UserError: no such model, or one that does not chat.
    """
    import jax  # slow to import

    from jaxtune.common import console  # slow to import
    from jaxtune.generation.engine import Engine  # slow to import
    from jaxtune.generation.host_slots import Programs, lay_out  # slow to import
    from jaxtune.models.model import leaf_paths  # slow to import
    from jaxtune.parallel import make_mesh  # slow to import
    from jaxtune.serving.app import Service  # needs the extra
    from jaxtune.serving.protocol import Defaults  # needs the extra

    if values.tensor > len(jax.devices()):
        raise UserError(f'--tensor={values.tensor}: expected at most the {len(jax.devices())} devices that are here')
    config.mesh.tensor = values.tensor
    mesh = make_mesh(config.mesh, jax.devices()[: values.tensor])
    bundle, template, encode, stops = chat.load(config, mesh)
    trees, aliases = names(values.model, values.name, values.adapter, bundle)
    positions = bundle.model.config.max_positions
    if positions and values.context > positions:
        raise UserError(f"--context={values.context}: expected at most the model's {positions} positions")
    parameters = sum(leaf.size for leaf in leaf_paths(bundle.params).values())
    programs = Programs(bundle.model, mesh, values.slots, tuple(sorted(set(stops))))
    laid = lay_out(bundle.model, mesh, trees)
    engines = {name: Engine(programs, own, values.context, values.max_queue) for name, own in laid.items()}
    first = next(iter(engines.values()))
    if failed := first.warm():
        raise UserError(f'--model={values.model}: the model does not run: {failed}')
    console.facts(
        [
            ('model', f'{values.model}, {bundle.model.architecture}, {formatting.amount(parameters)} parameters'),
            ('served as', ', '.join(engines)),
            ('template', template.name),
            ('slots', f'{values.slots}, of up to {first.context:,} tokens each'),
        ]
    )
    defaults = Defaults(values.max_new_tokens, values.temperature, values.top_k, values.top_p)
    return Service(
        engines=engines,
        aliases=aliases,
        tokenizer=copy.deepcopy(bundle.tokenizer),
        encoder=encode,
        rows=bundle.model.config.vocab_size,
        stop_ids=programs.stop_ids,
        defaults=defaults,
        system=values.system,
        seconds=values.timeout,
        max_body=values.max_body,
    )


def names(model: str, name: str, adapters: str, bundle: 'ModelBundle') -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters that are served, by name, the base first, and further names of theirs.

    Args:
      model: `--model`.
      name: `--name`.
      adapters: `--adapter`.
      bundle: what was loaded.
    """
    given = [path.strip() for path in adapters.split(',') if path.strip()]
    own = name or _short(model)
    if not given:
        base = {} if bundle.base is None else {'base': bundle.base}  # the model is itself an adapter
        return {**base, own: bundle.params}, {model: own} if model != own else {}
    trees = {} if bundle.base is None else {own: bundle.base}
    aliases = {model: own} if trees and model != own else {}
    for path in given:
        short = _short(path)
        known = path if short in trees else short
        trees[known] = bundle.adapters[path] if bundle.adapters else bundle.params
        aliases |= {path: known} if path != known else {}
    return trees, aliases


def _short(path: str) -> str:
    """What a model of a path is called."""
    parts = [part for part in PurePath(path).parts if part not in ('/', 'adapter', 'export')]
    return parts[-1] if parts else path


def main(argv: Sequence[str]) -> int:
    """Serves until a signal ends it; returns the exit status."""
    from jaxtune.common import console  # slow to import

    console.quiet_logs()
    values = flags.FLAGS
    with preemption.handled():
        try:
            if len(argv) > 1:
                raise UserError(f'{argv[1]}: expected flags only, such as --model=WORKDIR')
            key = check(values)
            from jaxtune.serving import server  # needs the extra

            with contextlib.closing(bind(values.host, values.port)) as bound:
                service = open_service(chat.recipe_of(values), values)
                with preemption.deferred('ending the answers'):
                    server.run(service, bound, values.host, key, lambda: preemption.received(0))
        except Exception as error:
            if not (said := line_of(error)):
                raise
            streams.tell(f'jaxtune: {said}')
            return 2
    return 0


def cli(argv: list[str] | None = None) -> None:
    """Entry point of `jaxtune serve` and `python -m jaxtune.serve`; `argv` is the command's by default.

    Raises:
      SystemExit: with the exit status.
    """
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'true')
    chat.define(FLAGS)
    app.run(lambda argv: sys.exit(main(argv)), argv)


if __name__ == '__main__':
    cli()
