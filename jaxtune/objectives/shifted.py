"""What encoder-decoder objectives share: the shape of a row, and the loss of targets that the decoder reads shifted."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.objectives.cross_entropy import cross_entropy

KINDS = ('encdec',)


def make_row(seq_len: int, target_len: int) -> dict[str, jax.ShapeDtypeStruct]:
    """`tokens`, `segments` `[seq_len]`: the source; `targets`, `weights` `[target_len]`: what the decoder writes."""
    return {
        'tokens': jax.ShapeDtypeStruct((seq_len,), np.int32),
        'segments': jax.ShapeDtypeStruct((seq_len,), np.int32),
        'targets': jax.ShapeDtypeStruct((target_len,), np.int32),
        'weights': jax.ShapeDtypeStruct((target_len,), np.float32),
    }


def fill_row(source: np.ndarray, target: np.ndarray, seq_len: int, target_len: int) -> dict[str, np.ndarray]:
    """A source and its target as a row, padded right."""
    row = {name: np.zeros(field.shape, field.dtype) for name, field in make_row(seq_len, target_len).items()}
    row['tokens'][: len(source)] = source
    row['segments'][: len(source)] = 1
    row['targets'][: len(target)] = target
    row['weights'][: len(target)] = 1
    return row


def loss(model, params, batch, rng, name_ids: Callable[[jax.Array], jax.Array] = lambda ids: ids):
    """Summed negative log-likelihood of the targets in nats, their number, and how many were predicted right.

    Args:
      model: an encoder-decoder; its decoder begins with the family's start token, then reads the targets one late.
      params: its parameters.
      batch: rows of `make_row`.
      rng: for dropout of added weights.
      name_ids: turns the ids of rows into the model's.
    """
    targets, written = name_ids(batch['targets']), (batch['weights'] > 0).astype(jnp.int32)
    inputs = {
        'tokens': name_ids(batch['tokens']),
        'segments': batch['segments'],
        'decoder_tokens': jnp.concatenate(
            [jnp.full_like(targets[:, :1], model.config.start_id), targets[:, :-1]], axis=1
        ),
        'decoder_segments': written,
    }
    outputs = model.apply(params, inputs, rng=rng)
    nll, correct = cross_entropy(outputs.hidden, model.head(params), targets, batch['weights'])
    return nll, batch['weights'].sum(), {'accuracy': correct}
