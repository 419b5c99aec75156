"""Model families. Outside this room a model is `apply(params, batch) -> outputs`; Flax lives only in here."""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxtune.errors import UserError
from jaxtune.models import decoder_families, encdec_families, encoder_families
from jaxtune.models.fields import read_fields
from jaxtune.models.model import Head, Model, Outputs

__all__ = ['KINDS', 'Head', 'Model', 'Outputs', 'build', 'read_config']

# Hugging Face's model_type -> the module of this package that builds it.
KINDS: dict[str, str] = dict.fromkeys(decoder_families.FAMILIES, 'decoder')
KINDS |= dict.fromkeys(encdec_families.FAMILIES, 'encdec')
KINDS |= dict.fromkeys(encoder_families.FAMILIES, 'encoder')


def read_config(source: str | Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face config fields, with the defaults of `transformers`' config classes filled in.

    Args:
      source: a folder or hub id with `config.json`, or fields such as a recipe's `model.config`.

    Raises:
      UserError: no such folder, an unknown `model_type` or key, or an impossible value; names
        `model.config.KEY` or the file's key.
    """
    return read_fields(source, tuple(KINDS), lambda fields: _module(fields).check(fields))


def build(
    fields: Mapping[str, Any],
    *,
    param_dtype: str = 'float32',
    compute_dtype: str = 'float32',
    remat: str = 'none',
    attention: str = 'auto',
    head: str = 'lm',
    labels: int = 0,
    own_head: bool = False,
) -> Model:
    """The model of config fields as `read_config` gives them.

    Args:
      fields: Hugging Face config fields.
      param_dtype: `float32` or `bfloat16`, what kernels and embeddings are kept in; norms and biases are float32.
      compute_dtype: what activations and matrix products use; norms, rotary angles and softmax stay in float32.
      remat: `none`, `full` or `dots`.
      attention: `auto`, `xla` or `flash`.
      head: what follows the last layer: `lm`, `classification` (of a whole row), `token_classification`, or a decoder's
        `reward` (one number a token).
      labels: classes that a classifier tells apart.
      own_head: the projection to the vocabulary is a parameter of its own, whatever the fields say; from a folder that
        lacks it, it begins as the embedding.

    Raises:
      UserError: the family has no such head; names the key `objective`.
    """
    dtypes = {'param_dtype': jnp.dtype(param_dtype), 'compute_dtype': jnp.dtype(compute_dtype)}
    module, added = _module(fields), {'own_head': own_head}
    if head != 'lm':
        kind = 'decoder' if head == 'reward' else 'encoder'
        if KINDS[fields['model_type']] != kind:
            raise UserError(
                f'objective: model_type={fields["model_type"]!r} has no {head} head in this version; expected one of '
                + ', '.join(name for name, its_kind in KINDS.items() if its_kind == kind)
            )
        added |= {'head': head} if kind == 'decoder' else {'head': head, 'labels': labels}
    return module.build(fields, **dtypes, remat=remat, attention=attention, **added)


def _module(fields: Mapping[str, Any]):
    kind = KINDS.get(fields.get('model_type'))
    if kind is None:
        near = difflib.get_close_matches(str(fields.get('model_type')), KINDS, 1)
        raise UserError(
            f'model.config.model_type={fields.get("model_type")!r}: expected one of {", ".join(KINDS)}'
            + (f' (nearest: {near[0]})' if near else '')
        )
    return importlib.import_module(f'jaxtune.models.{kind}')
