"""Learning from preference pairs without a reward model (DPO, Rafailov et al. 2023, arXiv:2305.18290) and its kin.

| `dpo.loss` | loss of a pair, with `c`, `r` the log-probabilities of its answers less the reference's |
|---|---|
| `sigmoid` | `-log sigmoid(beta (c - r))` |
| `ipo` | `(c / length - r / length - 1 / (2 beta))^2` (Azar et al. 2023, arXiv:2310.12036) |
| `hinge` | `max(0, 1 - beta (c - r))` (SLiC, arXiv:2305.10425) |
| `kto` | `1 - sigmoid(beta (c - z))` and `1 - sigmoid(beta (z - r))`, unpaired data too (arXiv:2402.01306) |
| `orpo` | the chosen answer's own loss, less `beta log sigmoid` of the log odds ratio (arXiv:2403.07691) |
| `simpo` | `-log sigmoid(beta (mean c - mean r) - gamma)` without reference (arXiv:2405.14734) |

The reference's log-probabilities are computed once, before training, into the workdir's cache.
"""

import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxtune.common import console, io
from jaxtune.data.loader import Loader
from jaxtune.objectives import preferences
from jaxtune.objectives.cross_entropy import token_logprobs
from jaxtune.objectives.preferences import SIDES, Pairs, preview, stacked
from jaxtune.parallel import hosts, place
from jaxtune.parallel.batches import check_rows
from jaxtune.weights import eval_mode

__all__ = ['COUNTED', 'KINDS', 'SEQUENCES', 'complete', 'dataset', 'loss', 'preview', 'row', 'statistics']

KINDS = ('decoder',)
COUNTED = 'pairs'
SEQUENCES = 2

_WITHOUT_REFERENCE = ('orpo', 'simpo')


def _sides(config: ConfigDict) -> tuple[str, ...]:
    return (*SIDES, 'mismatched') if config.dpo.loss == 'kto' else SIDES


def row(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds: a pair, and the reference's log-probability of each of its answers."""
    fields = preferences.make_row(config.data.seq_len, _sides(config))
    if config.dpo.loss not in _WITHOUT_REFERENCE:
        fields |= {f'reference_{side}': jax.ShapeDtypeStruct((), np.float32) for side in _sides(config)}
    return fields


def dataset(config: ConfigDict, split: str, tokenizer, cache: pathlib.Path) -> Pairs:
    """Pairs of `data.train` or `data.eval`; see `preferences.dataset`. KTO takes answers with a label too."""
    kto = config.dpo.loss == 'kto'
    return preferences.dataset(config, split, tokenizer, cache, unpaired=kto, mismatched=kto)


def complete(config: ConfigDict, rows: Pairs, model, params, mesh, cache: pathlib.Path, split: str) -> Pairs:
    """The rows with the reference's log-probabilities: of `dpo.reference`, or of the model before training."""
    if config.dpo.loss in _WITHOUT_REFERENCE:
        return rows
    digest = hashlib.sha256(np.ascontiguousarray(rows.examples.ids).tobytes())
    digest.update(np.ascontiguousarray(rows.examples.offsets).tobytes())
    names = [config.dpo.reference, config.model.path, config.model.compute_dtype, rows.seq_len, *rows.sides]
    digest.update(json.dumps(names).encode())
    path = cache / f'reference-{digest.hexdigest()[:16]}.npy'
    if not hosts.from_primary(path.is_file):
        if config.dpo.reference:
            model, params = load_reference(config, mesh)
        values = _reference(config, rows, model, eval_mode(params), mesh, f'reference of data.{split}')
        hosts.from_primary(lambda: _save(path, values))
    else:
        values = np.asarray(hosts.from_primary(lambda: np.load(path, allow_pickle=False).tolist()), np.float32)
    rows.more = {f'reference_{side}': values[:, number] for number, side in enumerate(rows.sides)}
    return rows


def _save(path: pathlib.Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.atomic_file(path, sync=False) as file:
        np.save(file, values, allow_pickle=False)


def load_reference(config: ConfigDict, mesh, *, weights: bool = True):
    """Model and parameters of `dpo.reference`, an adapter's own base with it; without weights, its shapes."""
    from jaxtune.pretrained.load import assemble_other

    parts = assemble_other(config, mesh, 'dpo.reference', weights=weights)
    return parts.model, parts.params


def _reference(config: ConfigDict, rows: Pairs, model, params, mesh, title: str) -> np.ndarray:
    """Log-probabilities `[pairs, sides]` of the answers under a model."""
    size = config.eval.batch_size or config.train.batch_size
    check_rows(mesh, 'eval.batch_size', size)
    loader = Loader(rows, size, shuffle=False)
    ask = jax.jit(
        lambda params, batch: logprobs(model, params, batch, rows.sides)[0], out_shardings=NamedSharding(mesh, P())
    )
    found = []
    with console.progress(len(loader), title, 'batch') as bar:
        for t in range(len(loader)):
            batch = place(lambda low, high, t=t: loader.rows(t, low, high), size, mesh)
            found.append(np.asarray(ask(params, batch)))
            bar.advance(1)
    return np.concatenate(found)[: len(rows)]


def logprobs(model, params, batch, sides: tuple[str, ...], rng=None) -> tuple[jax.Array, jax.Array]:
    """`(sums, lengths)`, each `[rows, sides]`: the log-probability of each answer in nats, and its tokens."""
    inputs = stacked(batch, sides)
    outputs = model.apply(params, inputs, rng=rng)
    found = token_logprobs(outputs.hidden, model.head(params), inputs['targets']) * inputs['weights']
    shape = (-1, len(sides))
    return found.sum(-1).reshape(shape), inputs['weights'].sum(-1).reshape(shape)


def statistics(config: ConfigDict):
    """KTO's `kl`: by how much answers to other prompts are likelier than under the reference, in nats an answer."""
    if config.dpo.loss != 'kto':
        return None

    def kl(model, params, batch):
        real = jnp.maximum(batch['chosen_weight'], batch['rejected_weight'])
        sums, _ = logprobs(model, params, batch, ('mismatched',))
        return {'kl': (((sums[:, 0] - batch['reference_mismatched']) * real).sum(), real.sum())}

    return kl


def loss(config, model, params, batch, rng):
    """Summed loss of the pairs (of KTO: of the answers), their number, and metrics.

    Rewards are `beta` times the log-probability less the reference's (SimPO's: the mean one, ORPO's: without it);
    `margin` is the chosen's less the rejected's, `accuracy` how often that is above 0.
    """
    sums, lengths = logprobs(model, params, batch, SIDES, rng)
    reference = jnp.zeros_like(sums)
    if config.dpo.loss not in _WITHOUT_REFERENCE:
        reference = jnp.stack([batch[f'reference_{side}'] for side in SIDES], axis=1)
    weights = jnp.stack([batch['chosen_weight'], batch['rejected_weight']], axis=1)
    kl = batch.get('kl', 0.0)
    losses, chosen, rejected = losses_of(config.dpo, sums, reference, jnp.maximum(lengths, 1), weights, kl)
    chosen, rejected = jax.lax.stop_gradient((chosen, rejected))
    paired = weights[:, 0] * weights[:, 1]
    count = weights.sum() if config.dpo.loss == 'kto' else paired.sum()
    metrics = {
        'accuracy': ((chosen > rejected) * paired, paired),
        'margin': ((chosen - rejected) * paired, paired),
        'reward_chosen': (chosen * weights[:, 0], weights[:, 0]),
        'reward_rejected': (rejected * weights[:, 1], weights[:, 1]),
    }
    return losses.sum(), count, jax.tree.map(jnp.sum, metrics)


def losses_of(settings, sums, reference, lengths, weights, kl=0.0):
    """Losses `[pairs]` and the rewards of chosen and rejected answers.

    Args:
      settings: the recipe's `dpo`.
      sums: log-probabilities `[pairs, 2]`.
      reference: the reference's.
      lengths: tokens of the answers, at least 1.
      weights: `[pairs, 2]`, 0 where a side is missing.
      kl: of `statistics`, the mean over the whole batch that KTO measures answers against.
    """
    beta, smooth = settings.beta, settings.label_smoothing
    ratios, means = sums - reference, sums / lengths
    both = weights[:, 0] * weights[:, 1]
    chosen, rejected = ratios[:, 0], ratios[:, 1]
    rewards = beta * chosen, beta * rejected
    if settings.loss == 'sigmoid':
        losses = _smoothed(beta * (chosen - rejected), smooth)
    elif settings.loss == 'hinge':
        losses = jax.nn.relu(1 - beta * (chosen - rejected))
    elif settings.loss == 'ipo':
        losses = jnp.square(chosen / lengths[:, 0] - rejected / lengths[:, 1] - 1 / (2 * beta))
    elif settings.loss == 'simpo':
        rewards = beta * means[:, 0], beta * means[:, 1]
        losses = _smoothed(rewards[0] - rewards[1] - settings.gamma, smooth)
    elif settings.loss == 'orpo':
        odds = means[:, 0] - means[:, 1] - (_log1mexp(means[:, 0]) - _log1mexp(means[:, 1]))
        rewards = beta * means[:, 0], beta * means[:, 1]
        losses = -means[:, 0] - beta * jax.nn.log_sigmoid(odds)
    else:
        base = jnp.maximum(kl, 0.0)
        good = settings.chosen_weight * (1 - jax.nn.sigmoid(beta * (chosen - base)))
        bad = settings.rejected_weight * (1 - jax.nn.sigmoid(beta * (base - rejected)))
        return good * weights[:, 0] + bad * weights[:, 1], *rewards
    return losses * both, *rewards


def _smoothed(logits: jax.Array, smooth: float) -> jax.Array:
    losses = -(1 - smooth) * jax.nn.log_sigmoid(logits)
    return losses - smooth * jax.nn.log_sigmoid(-logits) if smooth else losses


def _log1mexp(x: jax.Array) -> jax.Array:
    """`log(1 - exp(x))` for x < 0, also near 0 (Mächler 2012)."""
    near = x > -0.6931472
    small = jnp.log(-jnp.expm1(jnp.where(near, jnp.minimum(x, -1e-7), -1.0)))
    return jnp.where(near, small, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))
