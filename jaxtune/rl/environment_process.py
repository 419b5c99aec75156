"""An environment in a process of its own.

Imports little: the child starts with it. States stay texts of JSON outside of it.
"""

import concurrent.futures
import contextlib
import functools
import json
import math
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.errors import UserError, reason, shown
from jaxtune.rl import ENVIRONMENTS, Environment, Problem
from jaxtune.rl.code_reward import at_once
from jaxtune.rl.user_process import UserProcess, answer_parent, shown_text

_TUPLE = '(state, reply, reward, done)'


class Reply(NamedTuple):
    """What an environment makes of a turn.

    Attributes:
      state: text of JSON, in which it is then.
      text: what is added, or None.
      reward: of the turn.
      done: the exchange is over.
    """

    state: str
    text: str | None
    reward: float
    done: bool


class EnvironmentProcess(UserProcess):
    """The environment that `rl.environment` names, in a child of this process.

    Args:
      name: of a shipped one, `module:NAME` or `file.py:NAME`.
      settings: the recipe's `rl`, as JSON values.
      seconds: that importing it, or the steps of one call, may take.

    Attributes:
      started: what the environment declares, by the name of the attribute.

    Raises:
      UserError: there is none, or importing it fails or takes too long; when called: it raises, does not return in
        time, or returns something else.
    """

    def __init__(self, name: str, settings: Mapping[str, Any], seconds: float) -> None:
        super().__init__(f'rl.environment={name}', seconds, __name__, (name, json.dumps(settings)), _TUPLE)

    def reset(self, problems: Sequence[Problem]) -> list[str]:
        """States, as texts of JSON."""
        self._send(('reset', [tuple(problem) for problem in problems]), [str(one.prompt) for one in problems])
        return self._answer()

    def step(self, states: Sequence[str], texts: Sequence[str], more_seconds: float = 0.0) -> list[Reply]:
        """What it makes of a turn in each of the states."""
        self._send(('step', list(zip(states, texts, strict=True))), texts, more_seconds)
        return [Reply(*reply) for reply in self._answer()]


def serve() -> None:
    """The child."""
    answer_parent(_begin)


def _begin(name: str, settings: str) -> tuple[dict[str, Any], Callable[[Any], tuple[str, Any]]]:
    environment = ENVIRONMENTS.get(name)
    label = f'rl.environment={name}'
    told = {key: getattr(environment, key) for key in ('stops', 'role', 'tools', 'references')}
    if environment.role not in ('tool', 'user'):
        raise UserError(f'{label}: its role is {shown(environment.role)}; expected tool or user')
    if not all(isinstance(stop, str) and stop for stop in environment.stops):
        raise UserError(f'{label}: its stops are {shown(environment.stops)}; expected texts')
    try:
        told = json.loads(json.dumps(told))
        rl: Any = types.SimpleNamespace(**json.loads(settings))
        options = dict(environment.options(rl))
    except Exception as error:
        raise UserError(f'{label}: {reason(error)}; expected attributes of JSON values') from None
    return told, functools.partial(_ask, environment, label, options)


def _ask(environment: Environment, label: str, options: Mapping[str, Any], message: Any) -> tuple[str, Any]:
    """What is wrong, or '', and the states or the replies."""
    what, asked = message
    one = _reset if what == 'reset' else functools.partial(_step, options)
    try:
        if environment.parallel and what == 'step':
            with concurrent.futures.ThreadPoolExecutor(at_once()) as pool:
                return '', list(pool.map(lambda given: one(environment, label, *given), asked))
        return '', [one(environment, label, *given) for given in asked]
    except UserError as error:
        return str(error), None
    finally:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()


def _reset(environment: Environment, label: str, prompt: Any, reference: str | None) -> str:
    with _named(label, 'the prompt', str(prompt)):
        return _json(environment.reset(Problem(prompt, reference)))


def _step(options: Mapping[str, Any], environment: Environment, label: str, state: str, text: str) -> tuple:
    with _named(label, 'the turn', text):
        outcome = environment.step(json.loads(state), text, **options)
        if not isinstance(outcome, tuple | list) or len(outcome) != 4:
            raise UserError(f'returned {shown(outcome)}; expected {_TUPLE}')
        following, reply, reward, done = outcome
        if reply is not None and not isinstance(reply, str):
            raise UserError(f'returned the reply {shown(reply)}; expected a text, or None')
        try:
            number = float(reward)
        except Exception:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f'returned the reward {shown(reward)}; expected a finite number')
        return _json(following), reply, number, bool(done)


def _json(state: Any) -> str:
    try:
        return json.dumps(state)
    except Exception as error:
        raise UserError(f'its state {shown(state)} is not of JSON values ({reason(error)})') from None


@contextlib.contextmanager
def _named(label: str, what: str, sample: str) -> Iterator[None]:
    """Names the environment, the place and the sample where its code fails.

    Raises:
      UserError: it fails.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f'{label}: {error}; it fails on {what} {shown_text(sample)}') from None
    except BaseException as error:  # where it leaves with sys.exit, too
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f'{label}: {frame.filename}:{frame.lineno}: {reason(error)}; it fails on {what} {shown_text(sample)}'
        ) from None
