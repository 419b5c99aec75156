"""The server's paths: models, conversations, completions, health, and a page to chat on."""

import asyncio
import base64
import dataclasses
import hashlib
import importlib.resources
import json
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxtune.data import formats
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.chat_encoder import ChatEncoder
from jaxtune.errors import UserError, reason
from jaxtune.generation.engine import Engine
from jaxtune.serving import protocol, shapes
from jaxtune.serving.answers import Answers
from jaxtune.serving.guard import Guard, refusal, too_large
from jaxtune.serving.protocol import ApiError, Defaults, Wanted
from jaxtune.serving.text import Names

_BODY_SECONDS = 30.0  # that a body may take to arrive


@dataclasses.dataclass(frozen=True)
class Service:
    """What the paths share.

    Attributes:
      engines: the models by name; the first is the base.
      aliases: further names of theirs.
      tokenizer: theirs, to make texts of tokens; not the encoder's own, which other threads use.
      encoder: renders conversations.
      rows: tokens that the model knows.
      stop_ids: tokens that end an answer.
      defaults: what applies where a request says nothing.
      system: the system prompt of conversations without one; '' = none.
      seconds: that an answer may take.
      max_body: bytes of a request at most.
      created: when the server started, in seconds since 1970.
    """

    engines: Mapping[str, Engine]
    aliases: Mapping[str, str]
    tokenizer: Any
    encoder: ChatEncoder
    rows: int
    stop_ids: tuple[int, ...]
    defaults: Defaults
    system: str = ''
    seconds: float = 600.0
    max_body: int = 2**20
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    _encoding: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def engine(self, model: str) -> Engine:
        """The engine of a model.

        Raises:
          ApiError: there is none.
        """
        name = self.aliases.get(model, model)
        if name not in self.engines:
            names = ', '.join(self.engines)
            raise ApiError(404, f'{model[:80]!r}: no such model; expected one of {names}', 'model', 'model_not_found')
        return self.engines[name]

    async def begin(self, wanted: Wanted) -> tuple[Answers, list[tuple[int, ...]]]:
        """Has the answers to a request written; also the prompts' token ids.

        Raises:
          ApiError: no such model, a prompt that is none, or is too long.
        """
        engine = self.engine(wanted.model)
        if wanted.record is not None:
            prompts = await asyncio.to_thread(self._encoded, self._render, [wanted.record])
        else:
            prompts = await asyncio.to_thread(self._encoded, self._ids, wanted.prompts)
        limits = [_limit(engine.context, len(prompt), wanted) for prompt in prompts]
        return Answers(engine, self.tokenizer, self.stop_ids, wanted, prompts, limits), prompts

    def _encoded(self, encode: Callable[[Any], tuple[int, ...]], prompts: Sequence[Any]) -> list[tuple[int, ...]]:
        with self._encoding:  # a tokenizer's settings are not for several threads at once
            return [encode(prompt) for prompt in prompts]

    def _render(self, record: dict[str, Any]) -> tuple[int, ...]:
        try:
            chat = formats.chat('messages', 'messages', record, answered=False)
            if self.system and chat.turns[0]['role'] != 'system':
                chat = dataclasses.replace(chat, turns=({'role': 'system', 'content': self.system}, *chat.turns))
            return tuple(self.encoder.prompt(chat)[1])
        except (formats.FormatError, UserError) as error:
            raise ApiError(400, f'messages: {error}', 'messages') from None

    def _ids(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            try:
                (ids,) = tokenizers.encode_batch(self.encoder.tokenizer, [prompt])
            except (UserError, UnicodeEncodeError) as error:
                raise ApiError(400, f'prompt: {error}', 'prompt') from None
            prompt = tuple(ids)
        if not prompt:
            first = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            prompt = tuple(token for token in first if token is not None)[:1]
        if not prompt:
            raise ApiError(400, 'prompt: expected at least one token', 'prompt')
        if max(prompt) >= self.rows:
            raise ApiError(400, f'prompt: holds the token {max(prompt)}; the model knows {self.rows}', 'prompt')
        return prompt


def _limit(context: int, length: int, wanted: Wanted) -> int:
    """Tokens that an answer may have."""
    asked = wanted.max_tokens
    if length + (1 if asked is None else asked) > context:
        more = f' and {asked} are wanted after it' if asked else ''
        raise ApiError(
            400,
            f'the prompt has {length} tokens{more}; expected at most {context} in all, the limit of the model',
            'prompt' if wanted.record is None else 'messages',
            'context_length_exceeded',
        )
    return min(wanted.usual_tokens, context - length) if asked is None else asked


def application(service: Service, *, local: bool, api_key: str = '') -> ASGIApp:
    """The server as an ASGI application.

    Args:
      service: what answers.
      local: it is reached from this machine alone.
      api_key: what requests must bring; '' = nothing.
    """
    paths = _Paths(service)
    routes = [
        Route('/', paths.page),
        Route('/health', paths.health),
        Route('/v1/models', paths.models),
        Route('/v1/models/{name:path}', paths.model),
        Route('/v1/chat/completions', _caught(paths.chat), methods=['POST']),
        Route('/v1/completions', _caught(paths.completion), methods=['POST']),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _not_found, Exception: _failed})
    return Guard(app, local=local, api_key=api_key, max_body=service.max_body)


class _Paths:
    """Answers requests that may pass."""

    def __init__(self, service: Service) -> None:
        self._service, self._names = service, Names(service.tokenizer)
        page = importlib.resources.files('jaxtune.serving').joinpath('page.html').read_text('utf-8')
        self._page, kinds = page, (('style', 'style'), ('script', 'script'))
        allowed = [f"{kind}-src '{_digest(page, tag)}'" for tag, kind in kinds]
        self._policy = '; '.join(
            ["default-src 'none'", *allowed, 'img-src data:', "connect-src 'self'", "frame-ancestors 'none'"]
        )

    async def page(self, request: Request) -> Response:
        headers = {'content-security-policy': self._policy, 'referrer-policy': 'no-referrer'}
        return HTMLResponse(self._page, headers=headers | {'x-content-type-options': 'nosniff'})

    async def health(self, request: Request) -> Response:
        engines = self._service.engines.values()
        alive = all(engine.alive for engine in engines)
        counts = {name: sum(getattr(engine, name) for engine in engines) for name in ('running', 'waiting')}
        return JSONResponse({'status': 'ok' if alive else 'stopping', **counts}, 200 if alive else 503)

    async def models(self, request: Request) -> Response:
        return JSONResponse({'object': 'list', 'data': [self._described(name) for name in self._service.engines]})

    async def model(self, request: Request) -> Response:
        name = request.path_params['name']
        try:
            self._service.engine(name)
        except ApiError as error:
            return refusal(error)
        return JSONResponse(self._described(self._service.aliases.get(name, name)))

    def _described(self, name: str) -> dict[str, Any]:
        service = self._service
        about = {'id': name, 'object': 'model', 'created': service.created, 'owned_by': 'jaxtune'}
        return about | {'max_model_len': service.engines[name].context}

    async def chat(self, request: Request) -> ASGIApp:
        wanted = protocol.chat(await self._body(request), self._service.defaults)
        return await self._answer(request, wanted, shapes.Chat(self._names, wanted, f'chatcmpl-{uuid.uuid4().hex}'))

    async def completion(self, request: Request) -> ASGIApp:
        wanted = protocol.completion(await self._body(request), self._service.defaults)
        shape = shapes.Completion(self._names, wanted, f'cmpl-{uuid.uuid4().hex}', self._service.tokenizer)
        return await self._answer(request, wanted, shape)

    async def _answer(self, request: Request, wanted: Wanted, shape: shapes.Shape) -> ASGIApp:
        answers, prompts = await self._service.begin(wanted)
        seconds = self._service.seconds
        if wanted.stream:
            return _Events(_pieces(shape, answers, prompts, wanted, seconds), answers)
        try:
            whole = _in_time(shape.whole(answers, prompts), seconds)
            return JSONResponse(await _unless_gone(whole, request.receive))
        finally:
            answers.cancel()

    async def _body(self, request: Request) -> dict[str, Any]:
        body, most = bytearray(), self._service.max_body
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_large(most)
        except TimeoutError:
            raise ApiError(408, f'the body did not arrive within {_BODY_SECONDS:g} seconds') from None
        return protocol.parse(bytes(body))


def _caught(answer: Callable[[Request], Coroutine[Any, Any, ASGIApp]]) -> Callable[[Request], Any]:
    """What is refused becomes an answer that says so."""

    async def endpoint(request: Request) -> ASGIApp:
        try:
            return await answer(request)
        except ApiError as error:
            return refusal(error)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it

    return endpoint


async def _in_time(answer: Coroutine[Any, Any, Any], seconds: float) -> Any:
    try:
        async with asyncio.timeout(seconds):
            return await answer
    except TimeoutError:
        raise _too_late(seconds) from None


def _too_late(seconds: float) -> ApiError:
    return ApiError(504, f'the answer took longer than {seconds:g} seconds', code='timeout')


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())['type'] != 'http.disconnect':
        pass


async def _unless_gone(work: Coroutine[Any, Any, Any], receive: Receive) -> Any:
    """The result of some work, which ends where the client goes away.

    Raises:
      ClientDisconnect: it has.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() or task.cancelled():  # cancelled: its time was over while the client read nothing
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _pieces(
    shape: shapes.Shape, answers: Answers, prompts: Sequence[tuple[int, ...]], wanted: Wanted, seconds: float
) -> AsyncIterator[str]:
    """The data of server-sent events; an error in the middle is one of them, and the last."""
    try:
        async with asyncio.timeout(seconds):
            async for piece in shape.pieces(answers, prompts):
                yield json.dumps(piece, ensure_ascii=False)
            if wanted.usage:
                yield json.dumps(shape.frame([]) | {'usage': shapes.usage(answers)})
            yield '[DONE]'
    except TimeoutError:
        yield json.dumps(_too_late(seconds).body)
    except ApiError as error:
        yield json.dumps(error.body)


class _Events:
    """Server-sent events, which end where the client goes away."""

    def __init__(self, pieces: AsyncIterator[str], answers: Answers) -> None:
        self._pieces, self._answers = pieces, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {'content-type': 'text/event-stream; charset=utf-8', 'cache-control': 'no-store'}
        headers |= {'x-accel-buffering': 'no'}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]

        async def write() -> None:
            await send({'type': 'http.response.start', 'status': 200, 'headers': raw})
            async for piece in self._pieces:
                body = f'data: {piece}\n\n'.encode()
                await send({'type': 'http.response.body', 'body': body, 'more_body': True})
            await send({'type': 'http.response.body', 'body': b'', 'more_body': False})

        try:
            await _unless_gone(write(), receive)
        except ClientDisconnect:
            pass
        finally:
            self._answers.cancel()


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # as it is registered for those
    said = {404: f'{request.url.path[:80]}: no such path', 405: f'{request.method}: expected another method here'}
    return refusal(ApiError(error.status_code, said.get(error.status_code, str(error.detail))))


async def _failed(request: Request, error: Exception) -> Response:
    return refusal(ApiError(500, reason(error)))


def _digest(page: str, tag: str) -> str:
    """What a page's policy calls the one element of this kind in it."""
    found = re.search(f'<{tag}>(.*?)</{tag}>', page, re.DOTALL)
    assert found is not None  # or it is another page
    return 'sha256-' + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
