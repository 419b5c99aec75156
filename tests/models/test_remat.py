"""Activation checkpointing: the same gradients whatever is kept, and what is listed is kept."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.models.remat import NAMES
from jaxtune.parallel import make_mesh
from jaxtune.recipe import recipes

TINY = {
    'vocab_size': 64, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'max_position_embeddings': 64,
}  # fmt: skip
LLAMA = {**TINY, 'model_type': 'llama', 'num_key_value_heads': 2}
GEMMA2 = {**LLAMA, 'model_type': 'gemma2', 'head_dim': 8, 'query_pre_attn_scalar': 8, 'sliding_window': 4}
BERT = {**TINY, 'model_type': 'bert'}
T5 = {
    'model_type': 't5', 'vocab_size': 64, 'd_model': 32, 'd_kv': 8, 'd_ff': 48, 'num_layers': 2, 'num_heads': 4,
    'feed_forward_proj': 'gated-gelu', 'decoder_start_token_id': 0,
}  # fmt: skip


FIELDS = {'llama': LLAMA, 'gemma2': GEMMA2, 'bert': BERT, 't5': T5}


@functools.cache
def gradients(family: str, remat: str) -> list[np.ndarray]:
    """Of a model from scratch, by rows of two segments and padding."""
    model = models.build(models.read_config(FIELDS[family]), remat=remat)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(4, 60, (2, 12))
    segment_ids = np.repeat([[1, 2, 0], [1, 1, 1]], 4, axis=1)
    batch = {'tokens': tokens, 'segment_ids': segment_ids}
    if family == 't5':
        batch |= {'decoder_tokens': tokens, 'decoder_segment_ids': segment_ids}
    loss = lambda p: jnp.square(model.apply(p, batch).hidden).mean()  # noqa: E731
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params))]


def check(family: str, remat: str) -> None:
    for a, b in zip(gradients(family, 'none'), gradients(family, remat), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6 * np.abs(a).max() + 1e-9, err_msg=remat)


@hypothesis.settings(max_examples=3, deadline=None, derandomize=True)
@hypothesis.given(
    family=st.sampled_from(['llama', 'bert']),
    names=st.lists(st.sampled_from(sorted(NAMES)), min_size=1, max_size=3, unique=True),
)
def test_names_change_no_gradient(family, names):
    check(family, ','.join(names))


@pytest.mark.parametrize('family', ['llama', *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ('bert', 't5'))])
def test_offload_changes_no_gradient(family):
    check(family, 'offload')


@pytest.mark.exhaustive
@pytest.mark.parametrize('family', FIELDS)
def test_each_name_by_itself(family):
    for name in NAMES:
        check(family, name)


def _products(remat: str, fields=LLAMA, length: int = 16) -> int:
    """Matrix products in a model's forward and backward pass."""
    model = models.build(models.read_config(fields), remat=remat)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    loss = lambda p, t: jnp.square(model.apply(p, {'tokens': t}).hidden).mean()  # noqa: E731
    return str(jax.make_jaxpr(jax.grad(loss))(params, tokens)).count('dot_general')


def test_what_is_kept_is_not_computed_again():
    # Forward: q, k, v, scores, their sum, o, gate, up, down. Backward: two for each of the seven kernels; attention's
    # five and one that sums its output times the gradient.
    everything = 9 + 2 * 7 + 5 + 1
    assert _products('none') == _products('dots') == everything
    # Not the last product, which nothing reads; nor attention's two, whose output is kept.
    assert _products('full') == _products('offload') == everything + 9 - 3
    assert _products('attn_out,qkv') == everything + 9 - 3 - 3
    assert _products('mlp_in') == everything + 9 - 1 - 2
    assert _products('attn_out,attn_proj') == everything + 9 - 3 - 1
    # Gemma 2's norm behind the feed-forward layer reads the last product too.
    assert _products('full', GEMMA2) == everything + 9 - 2
    assert _products('attn_out,mlp_out', GEMMA2) == everything + 9 - 3


def test_offload_changes_nothing_on_a_mesh():
    mesh = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}, jax.devices()[:8])
    with jax.set_mesh(mesh):
        models_by = {remat: models.build(models.read_config(LLAMA), remat=remat) for remat in ('full', 'offload')}
        params = jax.jit(models_by['full'].init)(jax.random.key(0))
        batch = {'tokens': jnp.arange(64).reshape(4, 16)}
        full, offload = (
            jax.jit(jax.grad(lambda p, model=model: jnp.square(model.apply(p, batch).hidden).mean()))(params)
            for model in models_by.values()
        )
    for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(offload), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(a).max()) + 1e-9)


def test_a_wrong_name_is_refused():
    config = recipes.defaults()
    recipes.apply_overrides(config, {'model.remat': 'attn_out, mlp_out'})
    assert config.model.remat == 'attn_out,mlp_out'
    for wrong in ('attn_out,mlp_outs', 'full,qkv', '', 3):
        with pytest.raises(UserError, match=r'model\.remat.*none, full, dots, offload, or some of qkv, attn_out'):
            recipes.apply_overrides(config, {'model.remat': wrong})
    with pytest.raises(UserError, match='nearest: mlp_out'):
        recipes.apply_overrides(config, {'model.remat': 'attn_out,mlp_outs'})
