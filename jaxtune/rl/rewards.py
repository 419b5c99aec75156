"""Rewards of answers: a reward model's, those of the user's own function, shipped ones, or several with weights."""

import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.common import hub
from jaxtune.common.settings import Settings
from jaxtune.data.chat_encoder import ChatEncoder
from jaxtune.data.formats import Chat, FormatError
from jaxtune.data.templates import open_template
from jaxtune.errors import StepError, UserError
from jaxtune.generation.prompts import Prompt
from jaxtune.generation.sampling import pad_prompts
from jaxtune.objectives import completion_mask, reward
from jaxtune.parallel import compiler_options, hosts, place_all
from jaxtune.pretrained.load import ModelSpec, load_model, model_folder
from jaxtune.rl import Reward, RewardPart, code_reward, sandbox
from jaxtune.rl.reward_process import RewardProcess
from jaxtune.rl.shipped import SHIPPED
from jaxtune.rl.user_process import shown_text

_PROCESSES = min(8, os.cpu_count() or 1)  # of a reward that can be divided
_MULTIPLE = 32  # rows of the reward model are filled up to it, so that few shapes are compiled


def open_reward(
    settings: Settings, model: Callable[[str], ModelSpec], mesh: Mesh, batch_size: int, *, weights: bool = True
) -> Reward:
    """What `rl.reward` names.

    Args:
      settings: the recipe's `rl`.
      model: how a reward model that a path names is opened.
      mesh: where a reward model goes.
      batch_size: rows that it reads at a time.
      weights: False reads none of a reward model's, which then scores nothing.

    Raises:
      UserError: there is no such thing.
    """
    named = split(settings.reward)
    scores = []
    for name, _ in named:
        if kind_of(name) == MODEL:
            _check_model(name)
            scores.append(ByModel(model(name), mesh, batch_size, weights))
        else:
            scores.append(_by_function(name, settings))
    references = any(name in SHIPPED and SHIPPED[name].references for name, _ in named)
    if len(named) == 1 and named[0][1] is None:
        return Reward(settings.reward, scores[0], references=references)
    parts = tuple(
        RewardPart(name, 1.0 if weight is None else weight, score)
        for name, (_, weight), score in zip(_short_names(named), named, scores, strict=True)
    )

    def total(prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        return reward.scores(prompts, completions)[0]

    reward = Reward(settings.reward, total, parts, references)
    return reward


def check(settings: Settings) -> None:
    """Imports the functions, or finds the folders, that `rl.reward` names.

    Raises:
      UserError: there is no such thing.
    """
    for name, _ in split(settings.reward):
        if kind_of(name) == MODEL:
            _check_model(name)
        else:
            _by_function(name, settings, few=True)


def check_references(reward: Reward, prompts: Sequence[Prompt], key: str) -> None:
    """Refuses prompts without what their answers are measured by.

    Raises:
      UserError: there is one.
    """
    missing = [prompt for prompt in prompts if prompt.reference is None] if reward.references else []
    if missing:
        raise UserError(
            f"rl.reward={reward.name}: needs the records' answers; {len(missing):,} of {len(prompts):,} prompts of "
            f'{key} have none, such as {shown_text(str(missing[0].text))}; expected completion, answer or a last turn '
            'that answers'
        )


def split(value: str) -> list[tuple[str, float | None]]:
    """The names in `rl.reward` with their weights; None where none is given.

    Raises:
      UserError: there is no name, a weight is not finite, or `@STAGE` is one of several.
    """
    expected = (
        f"a reward model's workdir or folder, @STAGE, module:function, file.py:function, {', '.join(SHIPPED)}, "
        'or several with weights, NAME:WEIGHT,NAME:WEIGHT'
    )
    if value and pathlib.Path(value).exists():
        return [(value, None)]
    named: list[tuple[str, float | None]] = []
    for part in value.split(','):
        name, _, weight = part.strip().rpartition(':')
        number = _number(weight) if name else None
        if number is not None and not math.isfinite(number):
            raise UserError(f'rl.reward={value}: the weight {weight} of {name}: expected a finite number')
        named.append((part.strip(), None) if number is None else (name, number))
    if not all(name for name, _ in named):
        raise UserError(f'rl.reward={value!r}: expected {expected}')
    if len(named) > 1 and any(name.startswith('@') for name, _ in named):
        raise UserError(f"rl.reward={value}: expected a stage's own folder among several, for @STAGE stands alone")
    return named


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


MODEL, FUNCTION, WORD = 'model', 'function', 'word'


def kind_of(name: str) -> str:
    """Whether a name is that of a reward model, of a function, or a word for one that is shipped."""
    if name in SHIPPED:
        return WORD
    return FUNCTION if ':' in name and not pathlib.Path(name).exists() else MODEL


def _short_names(named: Sequence[tuple[str, float | None]]) -> list[str]:
    """Names for metrics: a function's own, a word, or `model`; numbered where there would be two."""
    names: list[str] = []
    for name, _ in named:
        kind = kind_of(name)
        short = name.rpartition(':')[2] if kind == FUNCTION else MODEL if kind == MODEL else name
        again = sum(other.rpartition('_')[0] == short or other == short for other in names)
        names.append(f'{short}_{again + 1}' if again else short)
    return names


def _check_model(name: str) -> None:
    hub.resolve(model_folder(name, 'rl.reward'), 'rl.reward')


def _by_function(name: str, settings: Settings, few: bool = False) -> 'ByFunction':
    """A function of the user's, or one that is shipped; `few`: in one process, to be checked."""
    shipped = SHIPPED.get(name)
    if shipped is None:
        return ByFunction(name, settings.reward_timeout)
    if name == 'code':
        check_sandbox(settings, 'rl.reward=code')
    count = _PROCESSES if shipped.parallel and not few else 1
    each = (settings.code_seconds + 1) / code_reward.at_once() if name == 'code' else 0.0
    return ByFunction(shipped.place, settings.reward_timeout, name, shipped.options(settings), count, each)


def check_sandbox(settings: Settings, label: str) -> None:
    """Refuses to run programs where they cannot be kept apart.

    Args:
      settings: the recipe's `rl`.
      label: what would run them, for the message.

    Raises:
      UserError: so it is.
    """
    limits = sandbox.Limits(settings.code_seconds, settings.code_memory, settings.code_unsafe)
    if why := hosts.from_primary(lambda: sandbox.unavailable(limits)):
        raise UserError(
            f'{label}: programs cannot be run apart here: {why}; expected Linux with user namespaces, or '
            'rl.code_unsafe=True, with which they can read and write what you can'
        )


class ByFunction:
    """`module:function` of `prompts`, `completions` and `references`, three lists of equal length.

    A prompt is a text or a list of turns, a reference what the data holds as its answer, or None. It returns as many
    numbers. It gets what it has names for (as TRL's reward functions do, `**kwargs` for the rest), or else two or three
    of them in this order. It runs in a process of its own, on a pod beside the first one alone.

    Args:
      name: of the function.
      seconds: that a call may take.
      called: what `rl.reward` calls it; by default its name.
      options: what else it is given, by name.
      processes: between which the completions are divided.
      each: seconds that every completion may take beside, for each has a limit of its own.

    Raises:
      UserError: there is none.
      StepError: when called: it fails, takes too long or returns something else.
    """

    def __init__(
        self,
        name: str,
        seconds: float,
        called: str = '',
        options: Mapping[str, Any] | None = None,
        processes: int = 1,
        each: float = 0.0,
    ) -> None:
        self.each = each
        self.name, self.options = f'rl.reward={called or name}', dict(options or {})
        hosts.from_primary(functools.partial(self._open, name, seconds, called, processes))

    def _open(self, name: str, seconds: float, called: str, processes: int) -> None:
        self._processes = [RewardProcess(name, seconds, called) for _ in range(processes)]

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """Scores `[answers]` float32."""
        try:
            scores = hosts.from_primary(lambda: self._ask(prompts, completions))
        except UserError as error:
            raise StepError(str(error)) from None
        return np.asarray(scores, np.float32)

    def _ask(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        size = -(-len(completions) // len(self._processes))
        parts = [slice(low, low + size) for low in range(0, len(completions), size)]
        for process, part in zip(self._processes, parts, strict=False):
            given = {
                'prompts': [prompt.text for prompt in prompts[part]],
                'completions': list(completions[part]),
                'references': [prompt.reference for prompt in prompts[part]],
            }
            process.send(given | self.options, self.each * len(given['completions']))
        scores: list[float] = []
        for process, part in zip(self._processes, parts, strict=False):
            scores += self._checked(process.receive(), completions[part])
        return scores

    def _checked(self, scores: list[float], completions: Sequence[str]) -> list[float]:
        if len(scores) != len(completions):
            count = f'{len(scores)}' if len(scores) < len(completions) else f'more than {len(completions)}'
            raise UserError(
                f'{self.name}: returned {count} numbers for {len(completions)} completions, the first of them '
                f'{shown_text(completions[0])}; expected one each'
            )
        wrong = next((number for number, value in enumerate(scores) if not math.isfinite(value)), None)
        if wrong is not None:
            raise UserError(
                f'{self.name}: returned {scores[wrong]} for {shown_text(completions[wrong])}; expected finite numbers'
            )
        return scores


class ByModel:
    """The reward model of a workdir or folder, with its own tokenizer and chat template.

    Raises:
      UserError: it is no reward model.
    """

    def __init__(self, spec: ModelSpec, mesh: Mesh, batch_size: int, weights: bool = True) -> None:
        self.mesh, self.batch_size = mesh, batch_size
        bundle = load_model(spec, mesh, weights=weights)
        if 'score' not in bundle.params or any(path.startswith('score/') for path in bundle.newly_initialized):
            raise UserError(
                f'rl.reward={spec.path}: holds no reward model; expected the workdir of objective=reward '
                '(configs/reward_model.py), or a sequence classifier with one label'
            )
        self.model, self.params, self.tokenizer = bundle.model, bundle.params, bundle.tokenizer
        self.limit = self.model.config.max_positions
        self._encoders: dict[bool, ChatEncoder] = {}  # for prompts that are texts, and for conversations

        def score(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            inputs = completion_mask.inputs(batch['tokens'], batch['end'], batch['end'])
            return reward.rewards(self.model, params, inputs)

        whole = NamedSharding(mesh, P())
        self._score = jax.jit(score, out_shardings=whole, compiler_options=compiler_options())

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """Scores `[answers]` float32."""
        rows = [self._row(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        # Those of like length together, so that little is padding.
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        parts = []
        for low in range(0, len(rows), self.batch_size):
            some = [rows[number] for number in order[low : low + self.batch_size]]
            tokens, ends = pad_prompts(some + some[-1:] * (self.batch_size - len(some)), 0, _MULTIPLE)
            parts.append(self._score(self.params, place_all({'tokens': tokens, 'end': ends}, self.mesh)))
        scores = np.zeros(len(rows), np.float32)
        scores[order] = np.concatenate([np.asarray(part) for part in parts])[: len(rows)]
        return scores

    def _row(self, prompt: Prompt, completion: str) -> list[int]:
        """The tokens of a prompt and its answer, as the reward model was trained to read them; the last that it can."""
        raw = isinstance(prompt.text, str)
        turns: list[dict[str, Any]] = [{'role': 'user', 'content': prompt.text}] if raw else list(prompt.text)
        chat = Chat((*turns, {'role': 'assistant', 'content': completion}), raw=raw)
        if raw not in self._encoders:
            template = open_template('auto', self.tokenizer, 'preference', raw)
            self._encoders[raw] = ChatEncoder(template, self.tokenizer, 'last', vocab_size=self.model.config.vocab_size)
        try:
            (encoded,) = self._encoders[raw](chat)
            ids = encoded.ids.tolist()
        except FormatError as error:
            raise UserError(
                f'rl.reward: the reward model cannot read an answer to {prompt.text!r:.60}: {error}'
            ) from None
        return ids[-self.limit :] if self.limit else ids
