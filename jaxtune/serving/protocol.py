"""Requests as OpenAI's API has them, read strictly: what is not known, or not done here, is refused by its name.

Beside OpenAI's own parameters: `top_k`, and `chat_template_kwargs` for the template of a conversation. Parameters that
change no answer (`user`, `metadata`, `store`, …) are accepted and ignored; those that would change one, and are not
done here, are accepted with the value that changes nothing.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from jaxtune.errors import shown

MOST_CHOICES = 128  # answers that one request may ask for
MOST_ALTERNATIVES = 20
_MOST_STOPS = 16
_USUAL = 16  # tokens of a completion, as OpenAI has it
_IGNORED = ('user', 'metadata', 'store', 'service_tier', 'safety_identifier', 'parallel_tool_calls')
_IGNORED += ('prompt_cache_key', 'prompt_cache_retention')
# Parameters that would change an answer, with the values that do not.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    'frequency_penalty': (0,),
    'presence_penalty': (0,),
    'logit_bias': ({},),
    'suffix': ('',),
    'response_format': ({'type': 'text'},),
    'tools': ([],),
    'functions': ([],),
    'tool_choice': ('none', 'auto'),
    'function_call': ('none', 'auto'),
    'modalities': (['text'],),
    'best_of': (1,),
}
_COMMON = ('model', 'max_tokens', 'max_completion_tokens', 'temperature', 'top_p', 'top_k', 'n', 'stop', 'seed')
_COMMON += ('stream', 'stream_options')
_CHAT = (*_COMMON, 'messages', 'logprobs', 'top_logprobs', 'chat_template_kwargs')
_COMPLETION = (*_COMMON, 'prompt', 'logprobs', 'echo')


class ApiError(Exception):
    """A request that is not answered, as OpenAI's API says so.

    Attributes:
      status: HTTP's.
      param: the parameter that is wrong, or None.
      code: what programs tell errors apart by, or None.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kinds = {401: 'authentication_error', 403: 'permission_error', 429: 'rate_limit_error'}
        kind = kinds.get(self.status, 'server_error' if self.status >= 500 else 'invalid_request_error')
        return {'error': {'message': str(self), 'type': kind, 'param': self.param, 'code': self.code}}


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What applies where a request says nothing.

    Attributes:
      max_tokens: of an answer in a conversation.
      temperature: of sampling.
      top_k: sample from the k most likely tokens; 0 = all.
      top_p: sample from the most likely tokens of this total probability.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a request asks for.

    Attributes:
      model: the name of a model.
      record: a conversation's `messages` and template arguments; None of a completion.
      prompts: of a completion: texts, or token ids.
      max_tokens: of an answer; None = the request names none.
      usual_tokens: of an answer then, where the model has room for as many.
      n: answers to each prompt.
      stops: texts that end an answer and are no part of it.
      seed: of sampling; None = another each time.
      stream: answers come piece by piece.
      usage: the last piece of them counts tokens.
      alternatives: how many of the likeliest tokens are told in each place; None = nor the drawn one's log-probability.
      echo: an answer begins with its prompt.
    """

    model: str
    record: dict[str, Any] | None
    prompts: tuple[str | tuple[int, ...], ...]
    max_tokens: int | None
    usual_tokens: int
    temperature: float
    top_k: int
    top_p: float
    n: int
    stops: tuple[str, ...]
    seed: int | None
    stream: bool
    usage: bool
    alternatives: int | None
    echo: bool = False


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
      ApiError: it is none.
    """
    try:
        values = json.loads(body.decode('utf-8'), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        said = 'nested too deep' if isinstance(error, RecursionError) else ' '.join(str(error).split())[:200]
        raise ApiError(400, f'the body is no JSON: {said}; expected an object') from None
    if not isinstance(values, dict):
        raise ApiError(400, f'the body is {shown(values)}; expected a JSON object')
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f'{name} is no JSON')


def chat(values: Mapping[str, Any], defaults: Defaults) -> Wanted:
    """What `POST /v1/chat/completions` asks for.

    Raises:
      ApiError: a parameter is wrong, unknown or not done here.
    """
    _check_known(values, _CHAT)
    messages = values.get('messages')
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, f'messages: expected a list of messages, found {shown(messages)}', 'messages')
    args = values.get('chat_template_kwargs')
    if args is not None and not isinstance(args, dict):
        raise ApiError(400, f'chat_template_kwargs: expected an object, found {shown(args)}', 'chat_template_kwargs')
    wants = _flag(values, 'logprobs')
    alternatives = _whole(values, 'top_logprobs', 0, MOST_ALTERNATIVES)
    if alternatives is not None and not wants:
        raise ApiError(400, 'top_logprobs: expected logprobs=true with it', 'top_logprobs')
    record = {'messages': messages, **({'chat_template_kwargs': args} if args else {})}
    return _wanted(values, defaults, record, (), _max_tokens(values, 1), (alternatives or 0) if wants else None)


def completion(values: Mapping[str, Any], defaults: Defaults) -> Wanted:
    """What `POST /v1/completions` asks for; raises as `chat`."""
    _check_known(values, _COMPLETION)
    echo = _flag(values, 'echo')
    alternatives = _whole(values, 'logprobs', 0, MOST_ALTERNATIVES)
    prompts = _prompts(values.get('prompt'))
    return _wanted(values, defaults, None, prompts, _max_tokens(values, 0 if echo else 1), alternatives, echo)


def _max_tokens(values: Mapping[str, Any], least: int) -> int | None:
    limits = [_whole(values, name, least) for name in ('max_completion_tokens', 'max_tokens')]
    return limits[1] if limits[0] is None else limits[0]


def _wanted(
    values: Mapping[str, Any],
    defaults: Defaults,
    record: dict[str, Any] | None,
    prompts: tuple[str | tuple[int, ...], ...],
    max_tokens: int | None,
    alternatives: int | None,
    echo: bool = False,
) -> Wanted:
    model = values.get('model')
    if not isinstance(model, str) or not model:
        raise ApiError(400, f'model: expected the name of a model, found {shown(model)}', 'model')
    n = _whole(values, 'n', 1, MOST_CHOICES) or 1
    if n * max(1, len(prompts)) > MOST_CHOICES:
        raise ApiError(400, f'n={n} for {len(prompts)} prompts: expected at most {MOST_CHOICES} answers', 'n')
    temperature, top_p = _number(values, 'temperature', 2.0), _number(values, 'top_p', 1.0)
    top_k, seed = _whole(values, 'top_k', -1), _whole(values, 'seed', -(2**63), 2**64 - 1)
    stream, options = _flag(values, 'stream'), values.get('stream_options')
    if options is not None and not (stream and isinstance(options, dict)):
        raise ApiError(400, 'stream_options: expected an object, with stream=true', 'stream_options')
    return Wanted(
        model=model,
        record=record,
        prompts=prompts,
        max_tokens=max_tokens,
        usual_tokens=_USUAL if record is None else defaults.max_tokens,
        temperature=defaults.temperature if temperature is None else temperature,
        top_k=defaults.top_k if top_k is None else max(top_k, 0),
        top_p=defaults.top_p if top_p is None else top_p,
        n=n,
        stops=_stops(values.get('stop')),
        seed=None if seed is None else seed % 2**64,
        stream=stream,
        usage=_flag(options or {}, 'include_usage'),
        alternatives=alternatives,
        echo=echo,
    )


def _check_known(values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name, value in values.items():
        if name in known or name in _IGNORED or value is None:
            continue
        if name not in _NEUTRAL:
            raise ApiError(400, f'{name[:60]!r}: no such parameter', name[:60], 'unknown_parameter')
        if value not in _NEUTRAL[name]:
            raise ApiError(
                400, f'{name}={shown(value)}: not supported here; expected none', name, 'unsupported_parameter'
            )


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name)
    if value not in (None, True, False) or (isinstance(value, int | float) and not isinstance(value, bool)):
        raise ApiError(400, f'{name}={shown(value)}: expected true or false', name)
    return bool(value)


def _whole(values: Mapping[str, Any], name: str, least: int, most: int | None = None) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        expected = f'of at least {least}' if most is None else f'from {least} to {most}'
        raise ApiError(400, f'{name}={shown(value)}: expected a whole number {expected}', name)
    return min(value, 2**31 - 1) if most is None else value


def _number(values: Mapping[str, Any], name: str, most: float) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not 0 <= value <= most:
        raise ApiError(400, f'{name}={shown(value)}: expected a number from 0 to {most:g}', name)
    return float(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise ApiError(400, f'stop={shown(value)}: expected a text, or up to {_MOST_STOPS} texts', 'stop')
    return tuple(stop for stop in stops if stop)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    listed = value if isinstance(value, list) else [value]
    if listed and all(isinstance(one, int) for one in listed):
        listed = [listed]
    ids = [isinstance(one, list) and all(type(token) is int and token >= 0 for token in one) for one in listed]
    texts = [isinstance(one, str) for one in listed]
    if not listed or not (all(ids) or all(texts)):
        expected = 'a text, a list of texts, token ids, or lists of those'
        raise ApiError(400, f'prompt: expected {expected}, found {shown(value)}', 'prompt')
    return tuple(one if isinstance(one, str) else tuple(one) for one in listed)
