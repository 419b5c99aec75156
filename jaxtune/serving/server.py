"""The running server: uvicorn at a socket, until it is told to stop."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Iterator

import uvicorn

from jaxtune.common import console
from jaxtune.serving.app import Service, application
from jaxtune.serving.guard import is_local

_LOOK_SECONDS = 0.1  # between two looks whether to stop
_END_SECONDS = 5.0  # that answers, and then engines, have to end


class _Server(uvicorn.Server):
    """Uvicorn's, without handlers of signals of its own; says when it listens."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._listening = listening

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `common.preemption`."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        self._listening()


def run(service: Service, bound: socket.socket, host: str, api_key: str, stop: Callable[[], bool]) -> None:
    """Serves until `stop` says so; then answers end with what they have.

    Args:
      service: what answers.
      bound: where to listen.
      host: its address, as it was asked for.
      api_key: what requests must bring; '' = nothing.
      stop: is asked several times a second.
    """
    config = uvicorn.Config(
        application(service, local=is_local(host), api_key=api_key),
        http='h11',
        ws='none',
        lifespan='off',
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(_END_SECONDS),
    )
    server = _Server(config, lambda: announce(service, bound, host, bool(api_key)))
    try:
        asyncio.run(_until(server, bound, service, stop))
    finally:
        _close(service)


async def _until(server: _Server, bound: socket.socket, service: Service, stop: Callable[[], bool]) -> None:
    async def watch() -> None:
        while not stop():
            await asyncio.sleep(_LOOK_SECONDS)
        server.should_exit = True
        await asyncio.to_thread(_close, service)

    watching = asyncio.create_task(watch())
    await server.serve([bound])
    watching.cancel()


def _close(service: Service) -> None:
    for engine in service.engines.values():
        engine.close(_END_SECONDS)


def announce(service: Service, bound: socket.socket, host: str, key: bool) -> None:
    """Says where the server is, and how to ask it."""
    address = f'http://{f"[{host}]" if ":" in host else host}:{bound.getsockname()[1]}'
    request = {'model': next(iter(service.engines)), 'messages': [{'role': 'user', 'content': 'Hello'}]}
    header = ' -H "Authorization: Bearer $JAXTUNE_API_KEY"' if key else ''
    console.facts([('page', address), ('API', f'{address}/v1')])
    console.note(
        f"curl {address}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{json.dumps(request)}'"
    )
