"""Rewards of answers: a reward model's, or those of the user's own function."""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.common import hub
from jaxtune.data.chat_encoder import ChatEncoder
from jaxtune.data.formats import Chat, FormatError
from jaxtune.data.templates import open_template
from jaxtune.errors import UserError
from jaxtune.generation.prompts import Prompt
from jaxtune.generation.sampling import pad_prompts
from jaxtune.objectives import completion_mask, reward
from jaxtune.parallel import compiler_options, hosts, place_all
from jaxtune.pretrained.load import ModelSpec, load_model, model_folder
from jaxtune.rl import Reward
from jaxtune.rl.reward_process import RewardProcess

_MULTIPLE = 64  # rows of the reward model are filled up to it, so that few shapes are compiled


def open_reward(
    name: str, seconds: float, model: ModelSpec, mesh: Mesh, batch_size: int, *, weights: bool = True
) -> Reward:
    """What `rl.reward` names.

    Args:
      name: a function, or a reward model's folder.
      seconds: that a call of a function may take.
      model: how a reward model is opened.
      mesh: where a reward model goes.
      batch_size: rows that it reads at a time.
      weights: False reads none of a reward model's, which then scores nothing.

    Raises:
      UserError: there is no such thing.
    """
    if _is_function(name):
        return Reward(name, ByFunction(name, seconds))
    check(name, seconds)
    return Reward(name, ByModel(model, mesh, batch_size, weights))


def check(name: str, seconds: float) -> None:
    """Imports the function, or finds the folder, that `rl.reward` names.

    Raises:
      UserError: there is no such thing.
    """
    if not name:
        raise UserError(
            "rl.reward='': expected a reward model's workdir or folder, @STAGE, module:function or file.py:function"
        )
    if _is_function(name):
        ByFunction(name, seconds)
    else:
        hub.resolve(model_folder(name, 'rl.reward'), 'rl.reward')


def _is_function(name: str) -> bool:
    return ':' in name and not pathlib.Path(name).exists()


class ByFunction:
    """`module:function` of `prompts`, `completions` and `references`, three lists of equal length.

    A prompt is a text or a list of turns, a reference what the data holds as its answer, or None. It returns as many
    numbers. It gets what it has names for (as TRL's reward functions do, `**kwargs` for the rest), or else two or three
    of them in this order. It runs in a process of its own, on a pod beside the first one alone.

    Args:
      name: of the function.
      seconds: that a call may take.

    Raises:
      UserError: there is none; or, when called, it fails, takes too long or returns something else.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self.name = f'rl.reward={name}'
        hosts.from_primary(functools.partial(self._open, name, seconds))

    def _open(self, name: str, seconds: float) -> None:
        self._function = RewardProcess(name, seconds)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """Scores `[answers]` float32."""
        return np.asarray(hosts.from_primary(lambda: self._ask(prompts, completions)), np.float32)

    def _ask(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        given = {
            'prompts': [prompt.text for prompt in prompts],
            'completions': list(completions),
            'references': [prompt.reference for prompt in prompts],
        }
        scores = self._function(given)
        if len(scores) != len(completions):
            count = f'{len(scores)}' if len(scores) < len(completions) else f'more than {len(completions)}'
            raise UserError(
                f'{self.name}: returned {count} numbers for {len(completions)} completions; expected one each'
            )
        wrong = next((number for number, value in enumerate(scores) if not math.isfinite(value)), None)
        if wrong is not None:
            raise UserError(
                f'{self.name}: returned {scores[wrong]} for {completions[wrong]!r:.60}; expected finite numbers'
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
