"""What policy and reference say of answers, in as few forward passes as the algorithm needs.

The policy's log-probabilities are the sampler's where that computes as training does but for the last bits, and where a
step is one update, which takes those of its own forward pass (`BoundAlgorithm.one_update`); else a forward pass makes
them. Its values need one without the vocabulary. The reference's log-probabilities need one too, but before the first
update they are the policy's.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.models import Model
from jaxtune.parallel import batch_shards, compiler_options, place_all, platform
from jaxtune.rl import RolloutBatch
from jaxtune.rl.packing import RolloutPacker
from jaxtune.rl.policy import BoundAlgorithm, per_token_logps, per_token_values
from jaxtune.rl.rollouts import Rollouts
from jaxtune.training.program import Program
from jaxtune.weights import eval_mode
from jaxtune.weights.tree import combine

_FULL = ('highest', 'float32')  # values of `jax_default_matmul_precision`


def samples_as_it_trains(model: Model) -> bool:
    """Whether a token's log-probability is the same when it is drawn and in a row, but for the last bits of float32.

    With fewer bits in a product the two differ by what these are worth (0.01 in bfloat16): the same products are summed
    in another order. Accelerators round the factors of float32 products unless told otherwise.
    """
    full = platform() == 'cpu' or jax.config.values['jax_default_matmul_precision'] in _FULL
    return full and jnp.dtype(model.compute_dtype) == jnp.float32


def may_share_prompts(model: Model) -> bool:
    """Whether a segment of a row may be seen by the others, and all come out as they do alone.

    Blocks of attention on a CPU allow it; the fused kernels attend within a segment. Windows skip blocks by their place
    in the row, some rotary frequencies and the losses of experts depend on what else is in it.
    """
    config = model.config
    if platform() != 'cpu' or model.kind != 'decoder' or config.experts is not None:
        return False
    turned = [rope for rope in config.ropes if rope is not None]
    return set(config.windows) <= {None} and all(rope.long_frequencies is None for rope in turned)


class Scorer:
    """Scores answers by policy and reference.

    Args:
      algorithm: what is needed.
      program: whose model and mesh it is.
      rows: of a forward pass, of `seq_len` tokens: at most twice as many tokens.
      packing: answers share rows.
      share: and prompts; see `RolloutPacker`.
    """

    def __init__(
        self, algorithm: BoundAlgorithm, program: Program, rows: int, packing: bool, share: bool = False
    ) -> None:
        self.algorithm, self.mesh, self.rows = algorithm, program.mesh, rows
        self.packing, self.share = packing, share
        model, temperature = program.model, algorithm.temperature
        self.values = algorithm.algorithm.value_head
        self.logps = not samples_as_it_trains(model) and (self.values or not algorithm.one_update)

        def score_rows(
            policy: tuple[Any, Any] | None, reference: tuple[Any, Any] | None, batch: Mapping[str, jax.Array]
        ) -> dict[str, jax.Array]:
            found = {}
            if policy and self.logps:
                params = eval_mode(combine(*policy))
                found['old'], found['values'] = per_token_logps(model, params, batch, temperature)
            elif policy:
                found['values'] = per_token_values(model, eval_mode(combine(*policy)), batch)
            if reference:
                params = eval_mode(combine(*reference))
                found['reference'], _ = per_token_logps(model, params, batch, temperature)
            return found

        whole = NamedSharding(self.mesh, P())
        self.score_rows = jax.jit(score_rows, out_shardings=whole, compiler_options=compiler_options())

    def __call__(
        self, trainable: Any, frozen: Any, reference: Any | None, answers: Rollouts, scores: np.ndarray
    ) -> RolloutBatch:
        """What both say of answers, on the host.

        Args:
          trainable: the policy's trained half.
          frozen: the other half.
          reference: the reference's trained half; None: not asked, or still the policy.
          answers: what is scored.
          scores: their rewards.
        """
        policy = (trainable, frozen) if self.values or self.logps else None
        against = None if reference is None else (reference, frozen)
        found: dict[str, Any] = {}
        if policy or against:
            everything, length, unit = np.arange(len(scores)), self.algorithm.seq_len, batch_shards(self.mesh)
            divided = (unit, self.mesh.shape['sequence'])
            rows = RolloutPacker(answers, everything, length, self.packing, *divided, self.share)
            passes = -(-rows.layout.places // (2 * self.rows * length))
            size, parts = -(-rows.shape[0] // (passes * unit)) * unit, []
            more = -(-rows.shape[0] // size) * size - rows.shape[0]
            fields = {name: np.pad(x, ((0, more), (0, 0))) for name, x in rows.fields().items()}
            for low in range(0, rows.used, size):
                batch = place_all({name: x[low : low + size] for name, x in fields.items()}, self.mesh)
                parts.append(self.score_rows(policy, against, batch))
            whole = jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts]), *parts)
            found = {name: rows.gather(numbers) for name, numbers in whole.items()}
        old = found.setdefault('old', answers.logprobs)
        found.setdefault('reference', old)
        found.setdefault('values', np.zeros_like(old))
        mask = (np.arange(old.shape[1]) < answers.lengths[:, None]).astype(np.float32)
        return RolloutBatch(**found | {'mask': mask, 'scores': scores})
