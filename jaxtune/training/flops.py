"""What a training step costs."""

from collections.abc import Iterable, Mapping

import jax

from jaxtune.methods import Method
from jaxtune.models import Model


def flops_per_token(
    model: Model,
    method: Method,
    seq_len: int,
    batch_spec: Mapping[str, jax.ShapeDtypeStruct],
    asked: Iterable[Model] = (),
) -> float:
    """Training FLOPs a token of rows: of an encoder-decoder, one of the source with its share of the target.

    Args:
      model: the model.
      method: the tuning method: frozen kernels have no gradient of their own.
      seq_len: tokens of a row.
      batch_spec: what one row of a batch holds; an encoder-decoder's `targets` among it.
      asked: decoders that only read the same tokens.

    Raises:
      NotImplementedError: this kind of model has no formula.
    """
    return _counted(model, method, seq_len, batch_spec, 1.0) + sum(one.flops_per_token(seq_len) / 3 for one in asked)


def causal_flops_per_token(
    model: Model,
    method: Method,
    seq_len: int,
    batch_spec: Mapping[str, jax.ShapeDtypeStruct],
    asked: Iterable[Model] = (),
) -> float:
    """The same with attention's masked scores left out: what a step needs at least."""
    flops = _counted(model, method, seq_len, batch_spec, model.attended(seq_len))
    for one in asked:
        parts = one.count_flops(seq_len)
        flops += (parts.products + parts.attention * one.attended(seq_len)) / 3
    return flops


def _counted(
    model: Model, method: Method, seq_len: int, batch_spec: Mapping[str, jax.ShapeDtypeStruct], attended: float
) -> float:
    targets = (batch_spec['targets'].shape[0],) if model.kind == 'encdec' else ()
    flops = model.count_flops(seq_len, *targets)
    return flops.products * method.flops_share + flops.attention * attended
