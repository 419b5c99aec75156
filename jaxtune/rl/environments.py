"""The environment of a run: opened from its name, checked early, and asked on a pod by the first process alone."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxtune.common.settings import Settings
from jaxtune.errors import StepError, UserError
from jaxtune.generation.prompts import Prompt
from jaxtune.parallel import hosts
from jaxtune.rl import Problem, code_reward
from jaxtune.rl.environment_process import EnvironmentProcess, Reply
from jaxtune.rl.rewards import check_sandbox
from jaxtune.rl.user_process import shown_text


class RunningEnvironment:
    """What `rl.environment` names, in a process of its own, on a pod beside the first one alone.

    Args:
      settings: the recipe's `rl`.

    Attributes:
      stops, role, tools, references: as the `Environment` declares them.

    Raises:
      UserError: there is none, or it cannot run here.
      StepError: when asked: it fails, takes too long or returns something else.
    """

    def __init__(self, settings: Settings) -> None:
        self.name = settings.environment
        if self.name == 'python':
            check_sandbox(settings, 'rl.environment=python')
        # A program has a limit of its own beside that of the call.
        self._each = (settings.code_seconds + 1) / code_reward.at_once() if self.name == 'python' else 0.0
        declared = hosts.from_primary(functools.partial(self._open, settings))
        self.stops, self.tools = tuple(declared['stops']), declared['tools']
        self.role, self.references = declared['role'], declared['references']
        self._states: list[str] = []

    def _open(self, settings: Settings) -> dict[str, Any]:
        values = settings.to_dict()
        self._process = EnvironmentProcess(self.name, values, settings.reward_timeout)
        return self._process.started

    def reset(self, prompts: Sequence[Prompt]) -> None:
        """Begins an exchange about each prompt, in place of those before."""
        self._ask(functools.partial(self._reset, prompts))

    def _reset(self, prompts: Sequence[Prompt]) -> None:
        self._states = self._process.reset([Problem(prompt.text, prompt.reference) for prompt in prompts])

    def step(self, numbers: Sequence[int], texts: Sequence[str]) -> list[Reply]:
        """What it makes of a turn of each of these exchanges; the states of the replies are kept here."""
        return [Reply('', *reply) for reply in self._ask(functools.partial(self._step, numbers, texts))]

    def _step(self, numbers: Sequence[int], texts: Sequence[str]) -> list[tuple[str | None, float, bool]]:
        states = [self._states[number] for number in numbers]
        replies = self._process.step(states, texts, self._each * len(texts))
        for number, reply in zip(numbers, replies, strict=True):
            self._states[number] = reply.state
        return [(reply.text, reply.reward, reply.done) for reply in replies]

    def _ask(self, function: Callable[[], Any]) -> Any:
        try:
            return hosts.from_primary(function)
        except UserError as error:
            raise StepError(str(error)) from None


def check(settings: Settings) -> None:
    """Imports what `rl.environment` names.

    Raises:
      UserError: there is no such thing, or it cannot run here.
    """
    if settings.environment:
        RunningEnvironment(settings)


def check_references(environment: RunningEnvironment | None, prompts: Sequence[Prompt]) -> None:
    """Refuses prompts without an answer where the environment needs those.

    Raises:
      UserError: there is one.
    """
    if environment is None or not environment.references:
        return
    missing = [prompt for prompt in prompts if prompt.reference is None]
    if missing:
        raise UserError(
            f"rl.environment={environment.name}: needs the records' answers; {len(missing):,} of {len(prompts):,} "
            f'prompts have none, such as {shown_text(str(missing[0].text))}; expected completion or answer'
        )
