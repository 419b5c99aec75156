"""Mixtures of experts: routing, dispatch and the grouped product, against `transformers` and against plain loops."""

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_same_gradients, open_model
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import CASES

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.models import hf
from jaxtune.models.dispatch import collect, dispatch, spread, spread_weights
from jaxtune.models.model import leaf_paths
from jaxtune.models.routing import Experts, Routing, balance, balance_loss, moved_correction, route, z_loss
from jaxtune.models.safetensors import read_header, write_file
from jaxtune.weights import NF4, Codec, LoRA, grouped_dot
from jaxtune.weights import grouped as grouped_module
from jaxtune.weights.grouped import Groups

LENGTH = 20
MIXTURES = [case for case in CASES if any('expert' in name for name in case.fields)]
mixtures = pytest.mark.parametrize('case', MIXTURES, ids=lambda case: case.name)


def batch():
    """Two rows, the second padded right."""
    tokens = np.random.default_rng(1).integers(3, 97, (2, LENGTH)).astype(np.int32)
    segment_ids = np.ones((2, LENGTH), np.int32)
    segment_ids[1, 13:] = 0
    return {'tokens': tokens, 'segment_ids': segment_ids}


def our_loss(model, params, rows, weight):
    """Mean negative log-likelihood of the next token, and the weighed auxiliary loss."""
    outputs = model.apply(params, rows)
    logps = jax.nn.log_softmax(model.logits(params, outputs.hidden)[:, :-1])
    seen = rows['segment_ids'][:, 1:] > 0
    picked = jnp.take_along_axis(logps, rows['tokens'][:, 1:, None], -1)[..., 0]
    aux = balance_loss(outputs.routing)
    return -jnp.where(seen, picked, 0).sum() / seen.sum() + weight * aux, aux


@mixtures
def test_gradients_and_auxiliary_loss_equal_transformers(case, folder, torch_model):
    import torch

    rows, weight = batch(), 0.0 if case.model_type == 'deepseek_v3' else 0.5
    model, params = open_model(folder)
    grads, aux = jax.jit(jax.grad(lambda p: our_loss(model, p, rows, weight), has_aux=True))(params)

    torch_model.zero_grad()
    inputs = {'input_ids': torch.tensor(rows['tokens']).long(), 'attention_mask': torch.tensor(rows['segment_ids'])}
    labels = inputs['input_ids'].masked_fill(inputs['attention_mask'] == 0, -100)
    settings = {'output_router_logits': True} if weight else {}
    outputs = torch_model(**inputs, labels=labels, **settings)
    loss = outputs.loss
    if weight:
        loss = loss + (weight - torch_model.config.router_aux_loss_coef) * outputs.aux_loss
        np.testing.assert_allclose(aux, outputs.aux_loss.item(), rtol=1e-4)
    loss.backward()
    assert_same_gradients(model, grads, torch_model)


@mixtures
def test_tokens_go_to_the_experts_that_transformers_sends_them_to(case, folder, torch_model):
    import torch

    model, params = open_model(folder)
    tokens, chosen = batch()['tokens'], []
    routers = [module for module in torch_model.modules() if type(module).__name__.lower().endswith('topkrouter')]
    hooks = [router.register_forward_hook(lambda *args: chosen.append(args[2][2])) for router in routers]
    with torch.no_grad():
        torch_model(input_ids=torch.tensor(tokens))
    for hook in hooks:
        hook.remove()
    routing = jax.jit(model.apply)(params, {'tokens': tokens}).routing
    assert len(chosen) == sum(model.config.sparse)
    theirs = np.stack([np.bincount(one.flatten().numpy(), minlength=model.config.experts.count) for one in chosen])
    np.testing.assert_array_equal(routing.counts, theirs)
    assert routing.tokens == tokens.size


@st.composite
def choices(draw):
    tokens, experts = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    top_k = draw(st.integers(1, experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    chosen = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    chosen[rng.random(tokens) < 0.2] = experts  # padding
    return chosen, experts, rng


def run_mixture(x, weights, kernel, chosen, experts):
    plan = dispatch(jnp.asarray(chosen), experts, chosen.shape[1])
    rows = grouped_dot(spread(x, plan.pairs, plan.slots), kernel, plan.groups)
    rows = rows * spread_weights(weights, plan.pairs, plan.slots)[:, None]
    return collect(rows, plan.pairs, plan.slots)


def plain_mixture(x, weights, kernel, chosen, experts):
    """Every token by every expert, of which it takes those it chose."""
    kernel = kernel if isinstance(kernel, jax.Array) else kernel.materialise()
    shares = ((chosen[..., None] == np.arange(experts)) * weights[..., None]).sum(1)
    return jnp.einsum('ti,eio,te->to', x, kernel, shares, precision='highest')


def assert_same_mixture(kernel, chosen, experts, rng, of_kernel):
    x = jnp.asarray(0.1 * rng.normal(size=(len(chosen), kernel.shape[-2])), jnp.float32)
    weights = jnp.asarray(rng.random(chosen.shape), jnp.float32)

    def loss(function):
        return lambda x, weights, kernel: jnp.sin(function(x, weights, kernel, chosen, experts)).sum()

    args = (0, 1, 2) if of_kernel else (0, 1)
    ours = jax.jit(jax.value_and_grad(loss(run_mixture), args))(x, weights, kernel)
    theirs = jax.jit(jax.value_and_grad(loss(plain_mixture), args))(x, weights, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@settings(max_examples=25, deadline=None)
@given(choices())
def test_a_grouped_product_is_that_of_every_token_by_its_experts(drawn):
    chosen, experts, rng = drawn
    kernel = jnp.asarray(rng.normal(size=(experts, 6, 5)), jnp.float32)
    assert_same_mixture(kernel, chosen, experts, rng, True)


@pytest.mark.parametrize('kind', ['lora', 'shared', 'dora', 'nf4', 'lora over nf4'])
def test_typed_leaves_of_experts_multiply_as_what_they_stand_for(kind):
    rng, experts = np.random.default_rng(0), 5
    chosen = np.stack([rng.permutation(experts)[:3] for _ in range(30)]).astype(np.int32)
    base = jnp.asarray(rng.normal(size=(experts, 32, 12)), jnp.float32)
    if 'nf4' in kind:
        base = Codec(16, True).encode_kernel(base)
    stack = () if kind == 'shared' else (experts,)
    a, b = (jnp.asarray(rng.normal(size=(*stack, *s)), jnp.float32) for s in ((32, 4), (4, 12)))
    scale = jnp.asarray(rng.random(stack), jnp.float32)
    leaf = base if kind == 'nf4' else LoRA(base, a, b, scale, shared=kind == 'shared')
    if kind == 'dora':
        leaf = LoRA(base, a, b, scale, magnitude=jnp.asarray(rng.random((experts, 12)), jnp.float32))
    assert_same_mixture(leaf, chosen, experts, rng, False)
    if isinstance(leaf, LoRA) and kind != 'dora':
        x = jnp.asarray(rng.normal(size=(30, 32)), jnp.float32)
        weights = jnp.ones(chosen.shape)
        factors = lambda function: jax.grad(  # noqa: E731
            lambda pair: jnp.sin(
                function(x, weights, LoRA(base, *pair, scale, shared=kind == 'shared'), chosen, experts)
            ).sum()
        )((a, b))
        jax.tree.map(
            lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-3, atol=1e-3),
            factors(run_mixture),
            factors(plain_mixture),
        )


def test_nf4_of_stacked_experts_has_the_bits_of_each_alone():
    kernels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 64, 24)), jnp.float32)
    stacked = Codec(64, True).encode_kernel(kernels)
    for layer in range(2):
        for expert in range(3):
            alone = Codec(64, True).encode(kernels[layer, expert].T)
            one = jax.tree.map(lambda leaf: leaf[layer, expert], stacked)  # noqa: B023
            assert isinstance(one, NF4)
            jax.tree.map(np.testing.assert_array_equal, one, alone)


@pytest.mark.parametrize('small', [0, 2**28], ids=['in chunks', 'all blocks at once'])
def test_the_loop_of_a_gpu_computes_what_that_of_a_cpu_does(monkeypatch, small):
    rng, sizes = np.random.default_rng(0), np.array([16, 0, 32, 8], np.int32)
    rows = 16 * 16
    x = np.zeros((rows, 6), np.float32)
    x[:56] = rng.normal(size=(56, 6))
    kernel = jnp.asarray(rng.normal(size=(4, 6, 5)), jnp.float32)
    groups = Groups(jnp.asarray(sizes), rows, 8, 'blocks')
    loss = lambda x, kernel: (grouped_dot(x, kernel, groups)[:56] ** 2).sum()  # noqa: E731
    expected = jax.value_and_grad(loss, (0, 1))(jnp.asarray(x), kernel)
    monkeypatch.setattr(grouped_module, 'platform', lambda: 'gpu')
    monkeypatch.setattr(grouped_module, '_SMALL', small)
    found = jax.value_and_grad(loss, (0, 1))(jnp.asarray(x), kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize('here', [0, 2, 5], ids=lambda here: f'{here} of 5 experts are here')
def test_the_kernels_of_a_tpu_compute_what_the_loop_of_a_cpu_does(monkeypatch, here):
    """In Pallas' interpreter; rows of experts that are elsewhere are zeros."""
    module = importlib.import_module('jax.experimental.pallas.ops.tpu.megablox.gmm')
    rng, experts = np.random.default_rng(0), 5
    chosen = np.stack([rng.permutation(experts)[:2] for _ in range(300)]).astype(np.int32)
    chosen = np.where(chosen < here, chosen, experts)
    for name in ('gmm', 'tgmm'):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), interpret=True))
    monkeypatch.setattr(grouped_module, 'platform', lambda: 'tpu')
    plan = dispatch(jnp.asarray(chosen), experts, 2)
    assert plan.groups.name == 'megablox'
    assert plan.groups.sizes.sum() == (chosen < experts).sum()
    kernel = jnp.asarray(rng.normal(size=(experts, 6, 5)), jnp.float32)
    rows = grouped_dot(spread(jnp.ones((300, 6)), plan.pairs, plan.slots), kernel, plan.groups)
    assert not rows[plan.groups.sizes.sum() :].any()
    assert_same_mixture(kernel, chosen, experts, rng, True)


def test_experts_are_chosen_by_groups_and_by_a_bias_that_weighs_nothing():
    logits = jnp.asarray([[2.0, 1.0, 0.0, -1.0, 3.0, -3.0]])
    experts = Experts(6, 2, 4, (True,), scores='sigmoid', normalised=True, groups=3, top_groups=1, scale=2.0)
    weights, chosen = route(logits, experts)
    assert sorted(chosen[0].tolist()) == [0, 1]  # the best pair, not the best expert
    np.testing.assert_allclose(weights.sum(), 2.0, rtol=1e-6)
    weights, chosen = route(logits, experts, jnp.asarray([0.0, 0.0, 0.0, 0.0, 1.0, 1.0]))
    assert sorted(chosen[0].tolist()) == [4, 5]
    chances = jax.nn.sigmoid(logits[0, chosen[0]])
    np.testing.assert_allclose(weights[0], 2.0 * chances / chances.sum(), rtol=1e-6)


def test_balance_of_even_and_of_uneven_routing():
    even = Routing(jnp.full((2, 4), 5.0), jnp.full((2, 4), 2.5), jnp.zeros(2), jnp.asarray(10.0))
    assert balance_loss(even) == pytest.approx(2.0)  # two experts a token
    assert z_loss(even) == 0
    told = balance(jnp.asarray([[5.0, 5.0, 5.0, 5.0], [20.0, 0.0, 0.0, 0.0]]))
    assert told['busiest_expert'] == pytest.approx(4.0)
    assert told['router_entropy'] == pytest.approx(0.0, abs=1e-6)
    moved = moved_correction(jnp.zeros((1, 4)), jnp.asarray([[3.0, 1.0, 2.0, 2.0]]), 0.1)
    np.testing.assert_allclose(moved, [[-0.1, 0.1, 0.0, 0.0]])


def test_four_bits_of_gpt_oss_are_read_as_transformers_widens_them(tmp_path):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    case = next(case for case in CASES if case.model_type == 'gpt_oss')
    sizes = {'hidden_size': 64, 'intermediate_size': 32}
    config = models.read_config({**case.config, **sizes})
    model = models.build(config)
    hf.save(tmp_path / 'wide', model, jax.jit(model.init)(jax.random.key(0)))
    rng, tensors, expected = np.random.default_rng(0), {}, {}
    for name, entry in read_header(tmp_path / 'wide' / 'model.safetensors').items():
        if not name.endswith(('experts.gate_up_proj', 'experts.down_proj')):
            tensors[name] = entry.read()
            continue
        experts, inputs, outputs = entry.shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
        scales = rng.integers(118, 128, blocks.shape[:-1]).astype(np.uint8)
        tensors |= {f'{name}_blocks': blocks, f'{name}_scales': scales}
        expected[name] = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).float().numpy()
    folder = tmp_path / 'narrow'
    folder.mkdir()
    given = json.loads((tmp_path / 'wide' / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(given | {'quantization_config': {'quant_method': 'mxfp4'}}))
    write_file(
        folder / 'model.safetensors', {n: (v.dtype, v.shape) for n, v in tensors.items()}, iter(tensors.values())
    )
    model, params = open_model(folder)
    leaves = leaf_paths(params)
    for path, tensor in model.tensors.items():
        for at, name in enumerate(tensor.names(leaves[path].shape)):
            if name in expected:
                np.testing.assert_array_equal(leaves[path][at], expected.pop(name))
    assert not expected

    (folder / 'config.json').write_text(json.dumps(given | {'quantization_config': {'quant_method': 'gptq'}}))
    with pytest.raises(UserError, match=r"quantization_config: quant_method='gptq': expected"):
        models.read_config(folder)


@mixtures
def test_experts_that_are_split_over_files_are_found(case, folder, torch_model, tmp_path):
    torch_model.save_pretrained(tmp_path, max_shard_size='20KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 2
    jax.tree.map(np.testing.assert_array_equal, open_model(tmp_path)[1], open_model(folder)[1])
