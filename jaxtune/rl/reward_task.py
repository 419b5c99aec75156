"""A step of reinforcement learning: it samples answers, scores them, and makes several updates of them.

Answers, order and updates of step `t` are functions of the seed and `t`, so that a stopped run resumes bit for bit. The
reference is the trained half of the tree as it was at the start, beside the same frozen half: with an added method it
costs that method's weights alone; where `rl.kl_coef` is 0 there is none.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.common import console
from jaxtune.data.loader import Loader
from jaxtune.data.mixture import Mixture
from jaxtune.generation.generator import sample_record
from jaxtune.generation.prompts import Prompt
from jaxtune.metrics.samples import add_samples
from jaxtune.metrics.writer import MetricsWriter
from jaxtune.parallel import batch_shards, compiler_options, place_all
from jaxtune.rl import Reward, RolloutBatch
from jaxtune.rl.packing import RolloutPacker
from jaxtune.rl.policy import BoundAlgorithm
from jaxtune.rl.resample import resample
from jaxtune.rl.rollouts import Rollouts, Sampler
from jaxtune.rl.scoring import Scorer, may_share_prompts
from jaxtune.rl.selection import Selection
from jaxtune.training.logger import Diagnose, TrainLogger
from jaxtune.training.program import Program
from jaxtune.training.run_info import RunInfo
from jaxtune.training.step import State

_STEPS_TO_ADVISE = 3  # without a signal
_HELD_OUT, _RESAMPLED = 2**30, 3 * 2**29  # from where on the answers to such prompts are numbered, for their keys
_OF_UPDATES = ('loss', 'grad_norm', 'learning_rate')  # metrics that every update has, whatever it learns


@dataclasses.dataclass(frozen=True)
class StepSizes:
    """How much a step samples and learns.

    Attributes:
      rollouts: answers sampled.
      epochs: passes over them.
      batch_size: answers of an update.
      accumulate: micro-batches of an update.
      packing: answers share rows.
      resample: rounds in which groups without a signal are replaced, at most.
    """

    rollouts: int
    epochs: int
    batch_size: int
    accumulate: int
    packing: bool
    resample: int = 0


class PromptNumbers:
    """The numbers of `count` prompts from `first` on, as rows for a loader."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {'number': np.asarray(self.first + index, np.int32)}


class RewardTask:
    """What a run of reinforcement learning does in a step; a `training.trainer.Task`.

    Args:
      algorithm: how it learns.
      program: its update.
      compiled: that, compiled for whole batches.
      state: of the start, from which the reference is copied.
      frozen: the half of the tree that stays.
      sampler: answers prompts.
      reward: scores answers.
      prompts: those to train on.
      order: rows with their numbers, in which they are asked.
      held_out: those to evaluate on.
      sizes: of a step.
      selection: which of its answers are learnt from.
      info: of the run.
      workdir: of the run.
      diagnose: what a loss that is not finite comes from.
      export: writes the model.
      evaluation_batches: at most so many of held-out prompts; 0 = all.
    """

    def __init__(
        self,
        algorithm: BoundAlgorithm,
        program: Program,
        compiled: Callable,
        state: State,
        frozen: Any,
        sampler: Sampler,
        reward: Reward,
        prompts: Sequence[Prompt],
        order: PromptNumbers | Mixture,
        held_out: Sequence[Prompt],
        sizes: StepSizes,
        selection: Selection,
        info: RunInfo,
        workdir: pathlib.Path,
        diagnose: Diagnose,
        export: Callable[[Any, int], None],
        evaluation_batches: int = 0,
    ) -> None:
        self.algorithm, self.program, self.frozen = algorithm, program, frozen
        self.sampler, self.reward, self.prompts, self.held_out = sampler, reward, prompts, held_out
        self.selection, self.sizes = selection, sizes
        self.info, self.workdir, self.diagnose, self.export = info, workdir, diagnose, export
        self.title = algorithm.algorithm.name
        batches = -(-len(held_out) // sampler.batch_size)
        self.evaluation_batches = min(batches, evaluation_batches) if evaluation_batches else batches
        self.asked = sizes.rollouts // algorithm.group
        self.loader = Loader(order, self.asked, program.seed, shuffle=True)
        self.others = Loader(order, self.asked, program.seed + 1, shuffle=True)  # to ask in the place of equal groups
        self.reference = None
        if algorithm.algorithm.reference:
            self.reference = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(state['trainable'])
        # Packed, the answers of an update are fewer rows, a multiple of this.
        self.compiled, self.step = compiled, program.train_step(sizes.accumulate)
        self.unit = sizes.accumulate * batch_shards(program.mesh)
        self.whole = {name: field.shape for name, field in program.batch_shapes().items()}
        self.share = sizes.packing and algorithm.group > 1 and may_share_prompts(program.model)
        micro_batch = sizes.batch_size // sizes.accumulate
        self.scorer = Scorer(algorithm, program, micro_batch, sizes.packing, self.share)

        def compute_advantages(rollouts: RolloutBatch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
            return algorithm.algorithm.compute_advantages(algorithm.settings, rollouts)

        everywhere = NamedSharding(program.mesh, P())
        options = {'out_shardings': everywhere, 'compiler_options': compiler_options()}
        self.compute_advantages = jax.jit(compute_advantages, **options)
        self.without_signal = 0  # steps in a row whose answers were all worth the same
        self.shown = False  # what a prompt and its answer look like

    @contextlib.contextmanager
    def batches(self, start: int, steps: int) -> Iterator[Iterator[int]]:
        """The steps' numbers from 0: all that a step is made of follows from its number."""
        yield iter(range(start, steps))

    def update(self, state: State, batch: int) -> tuple[State, dict[str, float]]:
        """Samples, scores, learns: step `batch` of the run."""
        t, sizes = batch, self.sizes
        prompts = self._prompts(self.loader, t, self.asked)
        began = time.perf_counter()
        usage = self.sampler.usage
        steps, written = usage.steps, usage.written
        with self.info.timed('generate'):
            answers = self._sample(state, prompts, t * sizes.rollouts)
        seconds, occupancy = time.perf_counter() - began, usage.occupancy_since(steps, written)
        with self.info.timed('reward'):
            scores, by_part = self._scores(answers)
        if not self.shown:
            self._show(answers, scores)
        drawn, asked = scores, 0
        if sizes.resample:
            answers, scores, asked = self._resampled(state, t, answers, scores)
        with self.info.timed('step'):
            moved = int(state['step']) > 0  # the policy is no longer the reference
            reference = self.reference if moved else None
            rollouts = self.scorer(state['trainable'], self.frozen, reference, answers, scores)
            fields, metrics = jax.tree.map(np.asarray, self.compute_advantages(rollouts))
            learnt = self._learnt(t, answers, fields, rollouts, moved)
            state, sums = self._learn(state, t, answers, fields, learnt)
            if self.reference is not None:
                sums['kl'] = float((rollouts.old - rollouts.reference).sum() / len(prompts))
        return state, {
            **sums,
            **jax.tree.map(float, metrics),
            'reward': float(drawn.mean()),
            **{f'reward/{name}': float(values.mean()) for name, values in by_part.items()},
            'learnt_share': float(learnt.mean()),
            'reward_std': float(drawn.std()),
            **({'resampled': float(asked)} if sizes.resample else {}),
            'entropy': float(-rollouts.old.sum() / rollouts.mask.sum()),
            **({} if answers.turns is None else {'turns': float(answers.turns.mean())}),
            'length': float(answers.lengths.mean()),
            'eos_rate': float(answers.ended.mean()),
            'tokens': int(answers.end.sum()) * sizes.epochs,
            'occupancy': occupancy,
            'sampled_tokens_per_second': float(answers.lengths.sum() / seconds),
        }

    def _prompts(self, loader: Loader, batch: int, count: int) -> list[Prompt]:
        """The first prompts of a loader's batch, each as often as it is answered."""
        numbers = loader.rows(batch, 0, self.asked)['number'][:count].repeat(self.algorithm.group)
        return [self.prompts[number] for number in numbers]

    def _resampled(
        self, state: State, t: int, answers: Rollouts, scores: np.ndarray
    ) -> tuple[Rollouts, np.ndarray, int]:
        """See `resample`; what is asked in a round is a function of the seed, the step and the round."""
        rounds = self.sizes.resample

        def draw(number: int, groups: int) -> tuple[Rollouts, np.ndarray]:
            batch = t * rounds + number
            with self.info.timed('generate'):
                prompts = self._prompts(self.others, batch, groups)
                others = self._sample(state, prompts, _RESAMPLED + batch * self.sizes.rollouts)
            with self.info.timed('reward'):
                return others, self._scores(others)[0]

        return resample(answers, scores, self.selection, rounds, draw)

    def _show(self, answers: Rollouts, scores: np.ndarray) -> None:
        """Prints the first prompt as the model sees it, its answer, and what that is worth."""
        self.shown = True
        prompt = self.sampler.tokenizer.decode(answers.prompts[0].ids, skip_special_tokens=False)
        console.note(f'the first prompt, as the model reads it: {_beginning_and_end(prompt)}')
        reference = answers.prompts[0].reference
        known = '' if reference is None else f'; the record has {_beginning_and_end(reference)}'
        console.note(f'its first answer, worth {scores[0]:.4g}: {_beginning_and_end(answers.texts[0])}{known}')

    def _sample(self, state: State, prompts: Sequence[Prompt], first: int) -> Rollouts:
        return self.sampler(state['trainable'], self.frozen, prompts, first)

    def _scores(self, answers: Rollouts) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Rewards of answers, those that were cut off or are too long less; and what these are the sums of."""
        scores, by_part = self.reward.scores(answers.prompts, answers.texts)
        if answers.rewards is not None:
            scores, by_part = scores + answers.rewards, {**by_part, 'environment': answers.rewards}
        return scores - self.selection.penalties(answers.lengths, answers.ended), by_part

    def _learn(
        self, state: State, t: int, answers: Rollouts, fields: Mapping[str, np.ndarray], learnt: np.ndarray
    ) -> tuple[State, dict[str, float]]:
        """The updates of a step, of the answers that are learnt from; the new state and the means of their metrics."""
        sizes, updates = self.sizes, []
        for epoch in range(sizes.epochs if learnt.any() else 0):
            order = self._order(t, epoch)
            for low in range(0, len(order), sizes.batch_size):
                chosen = order[low : low + sizes.batch_size]
                chosen = chosen[learnt[chosen]]
                if not len(chosen):
                    continue
                parts = self.program.mesh.shape['sequence']
                length, divided = self.algorithm.seq_len, (self.unit, parts)
                rows = RolloutPacker(answers, chosen, length, sizes.packing, *divided, self.share)
                spread = {name: rows.spread(numbers[chosen]) for name, numbers in fields.items()}
                batch = place_all(rows.fields() | spread, self.program.mesh)
                step = self.compiled if {name: x.shape for name, x in batch.items()} == self.whole else self.step
                state, metrics = step(state, self.frozen, batch)
                updates.append(metrics)
        updates = updates or [self._no_update]
        means = jax.tree.map(lambda *values: float(np.mean([np.float64(value) for value in values])), *updates)
        means.pop('count')
        return state, means

    def _order(self, t: int, epoch: int) -> np.ndarray:
        """In which order an epoch of step `t` learns the answers; whole groups where an update takes whole ones.

        The answers of a group are measured by each other, and may share their prompt's tokens.
        """
        rng, group = np.random.default_rng([self.program.seed, t, epoch]), self.algorithm.group
        if self.sizes.batch_size % group:
            return rng.permutation(self.sizes.rollouts)
        return (rng.permutation(self.asked)[:, None] * group + np.arange(group)).ravel()

    def _learnt(
        self, t: int, answers: Rollouts, fields: Mapping[str, np.ndarray], rollouts: RolloutBatch, moved: bool
    ) -> np.ndarray:
        """Which answers step `t` learns from, `[answers]` bool; says so where no answer is better than another.

        Without a reward that differs, and with a policy that is still the reference, all that is left of the gradient
        is rounding, which Adam would scale up to whole updates.
        """
        scores, settings = np.asarray(rollouts.scores), self.algorithm.settings
        learnt = self.selection.learnt(scores, answers.ended)
        self._say_signal(t, scores, learnt)
        if self.algorithm.algorithm.value_head or fields['advantages'][learnt].any() or settings.entropy_coef:
            return learnt
        in_loss = settings.kl_coef > 0 and 'reference' in fields
        return learnt if in_loss and moved else np.zeros_like(learnt)

    def _say_signal(self, t: int, scores: np.ndarray, learnt: np.ndarray) -> None:
        """Says where a step has no signal, the first few times in a row."""
        if self.selection.equal(scores).all():
            what = f'the answers to each prompt are all worth the same, {scores.mean():.3g}'
        elif not learnt.any():
            what = 'every answer that could be learnt from was cut at generate.max_new_tokens'
        else:
            self.without_signal = 0
            return
        self.without_signal += 1
        if self.without_signal < _STEPS_TO_ADVISE:
            console.note(f'step {t + 1}: no signal: {what}')
        elif self.without_signal == _STEPS_TO_ADVISE:
            console.note(
                f'step {t + 1}: no signal: {what}, {_STEPS_TO_ADVISE} steps in a row; expected a reward that tells '
                'answers apart, prompts that are neither too easy nor too hard for the model, or a larger rl.group '
                f'({self.title}/frac_reward_zero_std says how many groups are so; not said again until one is not)'
            )

    @functools.cached_property
    def _no_update(self) -> dict[str, float]:
        """The metrics of no update."""
        frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.frozen)
        _, metrics = jax.eval_shape(self.step, self.program.shapes, frozen, self.program.batch_shapes())
        return dict.fromkeys(metrics, 0.0)

    def begin(self, state: State, writer: MetricsWriter) -> None:
        """Evaluates the policy of the start."""
        if self.evaluation_batches:
            with self.info.timed('eval'), console.progress(self.evaluation_batches, 'evaluate', 'batch') as bar:
                writer.write(0, self.evaluate(state, 0, bar.advance))

    def evaluate(self, state: State, step: int, advance: Callable[[], None]) -> dict[str, float]:
        """Answers to the held-out prompts, drawn with the same randomness every time; they go to `samples.jsonl`."""
        size, parts, scores, by_part = self.sampler.batch_size, [], [], []
        for batch in range(self.evaluation_batches):
            prompts = self.held_out[batch * size : (batch + 1) * size]
            answers = self._sample(state, prompts, _HELD_OUT + batch * size)
            parts.append(answers)
            own, own_parts = self._scores(answers)
            scores.append(own)
            by_part.append(own_parts)
            advance()
        rewards = np.concatenate(scores)
        of_parts = {name: np.concatenate([each[name] for each in by_part]) for name in by_part[0]}
        lengths = np.concatenate([answers.lengths for answers in parts])
        ended = np.concatenate([answers.ended for answers in parts])
        turns = [answers.turns for answers in parts if answers.turns is not None]
        if console.is_primary():
            pairs = [pair for answers in parts for pair in zip(answers.prompts, answers.texts, strict=True)]
            samples = [sample_record(prompt, text, step) for prompt, text in pairs]
            exchanges = [one for answers in parts for one in answers.parts]  # none without an environment
            for sample, exchange in zip(samples, exchanges, strict=False):
                sample['exchange'] = [{'from': part.who, 'text': part.text} for part in exchange]
            scored: list[dict[str, Any]] = [{'score': score} for score in rewards.tolist()]
            if of_parts:
                apart = zip(*(values.tolist() for values in of_parts.values()), strict=True)
                scored = [
                    score | {'scores': dict(zip(of_parts, values, strict=True))}
                    for score, values in zip(scored, apart, strict=True)
                ]
            add_samples(self.workdir, step, [sample | score for sample, score in zip(samples, scored, strict=True)])
        return {
            'eval/reward': float(rewards.mean()),
            **{f'eval/reward/{name}': float(values.mean()) for name, values in of_parts.items()},
            **({'eval/turns': float(np.concatenate(turns).mean())} if turns else {}),
            'eval/length': float(lengths.mean()),
            'eval/eos_rate': float(ended.mean()),
            'eval/answers': len(rewards),
        }

    def logger(self, writer: MetricsWriter, bar: console.Bar) -> TrainLogger:
        """Logs `train/…` of the updates, and the algorithm's own metrics."""
        return TrainLogger(
            self.info,
            writer,
            bar,
            group=lambda name: 'train' if name in _OF_UPDATES else self.title,
            shown={'reward': '.3f', 'kl': '.3f'},
            unit='step',
            counted='tokens',
            diagnose=self.diagnose,
        )


def _beginning_and_end(text: str, most: int = 600) -> str:
    """A text for a line of the log."""
    return repr(text if len(text) <= most else f'{text[: most // 2]} … {text[-most // 2 :]}')
