"""`task=ppo` and `task=grpo`: a step samples answers, scores them, and makes several updates of them.

Answers, order and updates of step `t` are functions of the seed and `t`, so that a stopped run resumes bit for bit. The
reference is the trained half of the tree as it was at the start, beside the same frozen half: with an added method it
costs that method's weights alone.
"""

import copy
import functools
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxtune import rl
from jaxtune.common import console, preemption
from jaxtune.data.loader import Loader
from jaxtune.errors import UserError
from jaxtune.generation.generator import sample_record
from jaxtune.generation.prompts import Prompt, read_prompts
from jaxtune.metrics.samples import add_samples
from jaxtune.metrics.writer import peak_memory_bytes
from jaxtune.models import value_head
from jaxtune.parallel import compiler_options, make_mesh, place_all
from jaxtune.parallel.batches import check_batch, check_rows
from jaxtune.pretrained.load import Assembly, assemble, folder_head
from jaxtune.rl.packing import Packed
from jaxtune.rl.policy import Found, read
from jaxtune.rl.rewards import open_reward
from jaxtune.rl.rollouts import Rollouts, Sampler
from jaxtune.rl.run_info import Facts
from jaxtune.tasks import present
from jaxtune.training import trainer
from jaxtune.weights import eval_mode
from jaxtune.weights.tree import combine


def as_policy(config: ConfigDict) -> ConfigDict:
    """A copy of the recipe whose objective says that the model is one that writes."""
    config = copy.deepcopy(config)
    config.objective = 'causal_lm'
    return config


def run(config: ConfigDict, workdir: pathlib.Path, command) -> dict:
    """Trains to the end, or until it is to stop; returns `result.json`'s content.

    Raises:
      UserError: the recipe, the prompts, the model or the reward is wrong, or the loss is no longer finite.
      SystemExit: status 143 after SIGTERM, 130 after Ctrl-C, with a checkpoint saved.
    """
    config = as_policy(config)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        return Run(config, workdir, mesh, command).to_the_end()


def check(config: ConfigDict, mesh: Mesh) -> None:
    """Refuses sizes that do not go into each other, naming the key.

    Raises:
      UserError: so it is.
    """
    algorithm = rl.get(config.task)
    accumulate = 1 if config.train.accumulate == 'auto' else config.train.accumulate
    check_batch(mesh, config.train.batch_size, accumulate, algorithm.row(config))
    rollouts = f'rl.rollouts={config.rl.rollouts}: expected a multiple of'
    if config.rl.rollouts % config.train.batch_size:
        raise UserError(f'{rollouts} train.batch_size={config.train.batch_size}')
    if config.rl.rollouts % algorithm.group(config):
        raise UserError(f'{rollouts} rl.group={algorithm.group(config)}')
    check_rows(mesh, 'generate.batch_size', config.generate.batch_size)
    if config.generate.temperature == 0:
        raise UserError('generate.temperature=0: expected more, for answers are compared with what else was likely')
    for name, neutral in (('top_k', 0), ('top_p', 1.0), ('beams', 1)):
        if config.generate[name] != neutral:
            raise UserError(
                f'generate.{name}={config.generate[name]}: expected {neutral}; answers are drawn from the whole policy'
            )
    if config.generate.max_new_tokens >= config.data.seq_len:
        raise UserError(
            f'generate.max_new_tokens={config.generate.max_new_tokens}: expected less than data.seq_len='
            f'{config.data.seq_len}, which prompt and answer share'
        )
    if not config.data.train:
        raise UserError("data.train='': expected the prompts: a path, a glob, a folder, python-stdlib or @STAGE")
    present.check(config)


def check_policy(config: ConfigDict, parts: Assembly) -> None:
    """Refuses a model that cannot be a policy.

    Raises:
      UserError: it is a reward model, or its logits cannot be tempered.
    """
    if parts.folder and folder_head(parts.folder) != 'lm':
        raise UserError(f'model.path={config.model.path}: a reward model writes no text; expected a policy')
    head = jax.eval_shape(parts.model.head, value_head.policy(parts.params))
    if config.generate.temperature != 1.0 and head.softcap:
        raise UserError(
            f'generate.temperature={config.generate.temperature}: expected 1 for a model that caps its logits'
        )


def all_prompts(config: ConfigDict, parts: Assembly) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and those held out, of each what leaves room for an answer.

    Raises:
      UserError: there are none to train on.
    """
    read_all = functools.partial(read_prompts, parts=parts, fitting=True, limit=config.data.seq_len)
    everything = copy.deepcopy(config)
    everything.generate.prompts = 0
    return read_all(everything, split='train'), read_all(config) if config.data.eval else []


class _Numbers:
    """The prompts' numbers, as rows for a loader."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {'number': np.asarray(index, np.int32)}


class Run(trainer.Run):
    """One run of an algorithm of `rl`."""

    warned = False  # that a step had nothing to learn from

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, command):
        metric = 'eval/reward' if config.eval.metric == 'eval/loss' else config.eval.metric
        super().__init__(config, workdir, mesh, command, metric)
        self.info = Facts(command, config, mesh)
        self.algorithm = rl.get(config.task)
        check(config, mesh)
        with self.info.timed('load'):
            parts = assemble(config, mesh)
            check_policy(config, parts)
            self.reward = open_reward(config, mesh, config.generate.batch_size)
        with self.info.timed('data'):
            self.prompts, self.held_out = all_prompts(config, parts)
        self.asked = config.rl.rollouts // self.algorithm.group(config)
        self.loader = Loader(_Numbers(len(self.prompts)), self.asked, config.seed, shuffle=True)
        self.steps = config.train.steps or max(1, math.ceil(config.train.epochs * len(self.prompts) / self.asked))
        self.updates = config.rl.epochs * (config.rl.rollouts // config.train.batch_size)  # a step

        self._open_program(parts, self.steps * self.updates, self.algorithm)
        self.reference = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(self.state['trainable'])
        # Packed, the answers of an update are fewer rows, a multiple of this.
        self.update = self.program.train_step(self.accumulate)
        self.unit = self.accumulate * mesh.shape['data'] * mesh.shape['fsdp']
        self.sampler = Sampler(config, mesh, self.parts, [*self.prompts, *self.held_out])
        self.look, self.learn = self._functions(self.parts.model)
        self.evaluator = range(-(-len(self.held_out) // config.generate.batch_size)) or None
        if config.eval.batches and self.evaluator:
            self.evaluator = self.evaluator[: config.eval.batches]
        self._open_checkpoints()

    def _functions(self, model):
        """What the policy and the reference say of answers, and what the algorithm makes of it."""
        config, whole = self.config, NamedSharding(self.mesh, P())

        def look(trainable, frozen, reference, batch):
            old, values = read(config, model, eval_mode(combine(trainable, frozen)), batch)
            kept, _ = read(config, model, eval_mode(combine(reference, frozen)), batch)
            return {'old': old, 'reference': kept, 'values': values, 'weights': batch['weights']}

        def learn(found):
            return self.algorithm.learn(config, found)

        options = {'out_shardings': whole, 'compiler_options': compiler_options()}
        return jax.jit(look, **options), jax.jit(learn, **options)

    def _loop(self) -> int:
        with console.progress(self.steps, self.config.task, 'step', initial=self.start) as bar:
            for done in range(self.start + 1, self.steps + 1):
                began = time.perf_counter()
                try:
                    metrics = self._step(done - 1)
                except preemption.Interrupted:
                    self._leave_inside(done - 1)
                self._check(done, metrics)
                bar.advance(1, reward=f'{metrics["reward"]:.3f}', kl=f'{metrics["kl"]:.3f}')
                due, stop = self._due(done), preemption.received(done)
                if due['log']:
                    self._log(done, metrics, time.perf_counter() - began)
                ended, _ = self._settle(done, due, stop)
                if ended:
                    return done
        return self.steps

    def _step(self, t: int) -> dict[str, float]:
        """Samples, scores, learns: step `t` of the run; returns its metrics."""
        config, size = self.config, self.config.train.batch_size
        numbers = self.loader.rows(t, 0, self.asked)['number'].repeat(self.algorithm.group(config))
        prompts = [self.prompts[number] for number in numbers]
        began = time.perf_counter()
        made = self._answers(prompts, t * config.rl.rollouts)
        seconds = time.perf_counter() - began
        with self.info.timed('reward'):
            scores = self._scores(made)
        with self.info.timed('step'):
            found = self._found(made, scores)
            fields, metrics = jax.tree.map(np.asarray, self.learn(found))
            waiting = []
            signal = self._signal(t, fields, found)
            for epoch in range(config.rl.epochs if signal else 0):
                order = np.random.default_rng([config.seed, t, epoch]).permutation(len(prompts))
                for low in range(0, len(order), size):
                    chosen = order[low : low + size]
                    rows = Packed(made, chosen, config.data.seq_len, config.data.packing, self.unit)
                    spread = {name: rows.spread(numbers[chosen]) for name, numbers in fields.items()}
                    batch = place_all(rows.fields() | spread, self.mesh)
                    update = self.step if rows.shape[0] == size else self.update
                    self.state, new = update(self.state, self.frozen, batch)
                    waiting.append(new)
            waiting = waiting or [self._still]
            sums = jax.tree.map(
                lambda *values: float(np.mean([np.float64(value_head) for value_head in values])), *waiting
            )
            sums.pop('count')
        return {
            **sums,
            **jax.tree.map(float, metrics),
            'reward': float(scores.mean()),
            'reward_std': float(scores.std()),
            'kl': float((found.old - found.reference).sum() / len(prompts)),
            'entropy': float(-found.old.sum() / found.weights.sum()),
            'length': float((made.end - made.start).mean()),
            'ended': float(made.ended.mean()),
            'tokens': int(made.end.sum()) * config.rl.epochs,
            'sampled_tokens_per_second': float((made.end - made.start).sum() / seconds),
        }

    def _signal(self, t: int, fields: dict[str, np.ndarray], found: Found) -> bool:
        """Whether there is anything to learn from in step `t`; says so where no answer is better than another, once.

        Without a reward that differs, and with a policy that is still the reference, all that is left of the gradient
        is rounding, which Adam would scale up to whole updates.
        """
        if self.algorithm.VALUE or fields['advantages'].any():
            return True
        if not self.warned:
            self.warned = True
            console.note(
                f'step {t + 1}: the answers to each prompt are all worth the same, {found.scores.mean():.3g}, so that '
                'nothing is learnt from them; expected a reward that tells them apart, or a larger rl.group'
            )
        return self.config.rl.kl_coef > 0 and not np.array_equal(found.old, found.reference)

    @functools.cached_property
    def _still(self) -> dict[str, float]:
        """The metrics of no update."""
        _, metrics = jax.eval_shape(self.update, self.state, self.frozen, self.program.batch_shapes())
        return dict.fromkeys(metrics, 0.0)

    def _answers(self, prompts: list[Prompt], first: int) -> Rollouts:
        with self.info.timed('generate'):
            return self.sampler(self.state['trainable'], self.frozen, prompts, first)

    def _scores(self, made: Rollouts) -> np.ndarray:
        """Rewards of answers, those that were cut off less."""
        penalty = np.float32(self.config.rl.missing_eos_penalty)
        return self.reward(made.prompts, made.texts) - penalty * ~made.ended

    def _found(self, made: Rollouts, scores: np.ndarray) -> Found:
        """What policy and reference say of answers, as many rows at a time as a micro-batch has at most."""
        size = self.config.train.batch_size // self.accumulate
        rows = Packed(made, np.arange(len(scores)), self.config.data.seq_len, self.config.data.packing, size)
        fields, parts = rows.fields(), []
        for low in range(0, rows.used, size):
            batch = place_all({name: x[low : low + size] for name, x in fields.items()}, self.mesh)
            parts.append(self.look(self.state['trainable'], self.frozen, self.reference, batch))
        whole = jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts]), *parts)
        return Found(**{name: rows.gather(numbers) for name, numbers in whole.items()}, scores=scores)

    def _check(self, step: int, metrics: dict[str, float]) -> None:
        """Ends a run whose loss is no longer finite."""
        wrong = next((name for name in ('loss', 'grad_norm') if not math.isfinite(metrics[name])), None)
        if wrong is None:
            return
        self.checkpoints.wait()
        newest, rate = self.checkpoints.newest(), self.config.optimizer.lr
        good = f'the last good checkpoint is {newest}' if newest is not None else 'no checkpoint was saved yet'
        raise UserError(
            f'step {step}: {wrong} is {metrics[wrong]}; expected a smaller optimizer.lr than {rate:g}, or more '
            f'rl.kl_coef than {self.config.rl.kl_coef:g}; {good} (in {self.workdir}/checkpoints)'
        )

    def _log(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        of_update, tokens = ('loss', 'grad_norm', 'learning_rate'), metrics.pop('tokens')
        line = {f'{"train" if name in of_update else self.config.task}/{name}': x for name, x in metrics.items()}
        line |= self.info.speed(1.0 / seconds, tokens)
        self.writer.write(step, line | {'memory/peak_bytes': peak_memory_bytes()})

    def _begin(self) -> None:
        if self.evaluator:
            with self.info.timed('eval'), console.progress(len(self.evaluator), 'evaluate', 'batch') as bar:
                self.writer.write(0, self._measure(0, bar.advance))

    def _measure(self, step: int, advance) -> dict[str, float]:
        """Answers to the held-out prompts, drawn with the same randomness every time; they go to `samples.jsonl`."""
        size, made, scores = self.config.generate.batch_size, [], []
        for batch in self.evaluator:
            prompts = self.held_out[batch * size : (batch + 1) * size]
            found = self._answers(prompts, 2**30 + batch * size)
            made.append(found)
            scores.append(self._scores(found))
            advance()
        rewards = np.concatenate(scores)
        lengths = np.concatenate([found.end - found.start for found in made])
        ended = np.concatenate([found.ended for found in made])
        if console.is_primary():
            answers = [pair for found in made for pair in zip(found.prompts, found.texts, strict=True)]
            samples = [sample_record(prompt, text, step) for prompt, text in answers]
            scored = zip(samples, rewards.tolist(), strict=True)
            add_samples(self.workdir, step, [sample | {'score': score} for sample, score in scored])
        return {
            'eval/reward': float(rewards.mean()),
            'eval/length': float(lengths.mean()),
            'eval/ended': float(ended.mean()),
            'eval/answers': len(rewards),
        }

    def _model(self, trainable: Any) -> Any:
        return value_head.policy(super()._model(trainable))
