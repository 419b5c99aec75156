"""What holds for every method on every kind of model: it begins at the model, trains its own leaves only, merges into
the same function, and is the same on any mesh."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.methods import apply as tuning
from jaxtune.methods import lora, targets
from jaxtune.objectives.cross_entropy import cross_entropy
from jaxtune.parallel import make_mesh, match_rules, place, shardings
from jaxtune.recipe import recipes
from jaxtune.tasks import specs
from jaxtune.tasks.export import merged
from jaxtune.training.program import make_program
from jaxtune.weights import eval_mode, is_weight, tree

_TOKENS = {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0, 'vocab_size': 96}
_LIKE_LLAMA = {
    'hidden_size': 128, 'intermediate_size': 96, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'max_position_embeddings': 64,
}  # fmt: skip
# Kernels of several blocks a row, which a mesh divides, and in the encoder some with none that ends with a row.
KINDS = {
    'decoder': {'model_type': 'llama', 'num_key_value_heads': 2, **_LIKE_LLAMA, **_TOKENS, 'intermediate_size': 256},
    'encoder': {'model_type': 'bert', **_LIKE_LLAMA, **_TOKENS},
    'encdec': {
        'model_type': 't5', 'd_model': 128, 'd_kv': 32, 'd_ff': 256, 'num_layers': 2, 'num_heads': 4,
        'decoder_start_token_id': 0, **_TOKENS,
    },
}  # fmt: skip
VARIANTS = {
    'lora': {'method.name': 'lora', 'method.dropout': 0.1},
    'qlora': {'method.name': 'qlora'},
    'adapter': {'method.name': 'adapter', 'method.bottleneck': 8},
    'prompt': {'method.name': 'prompt', 'method.virtual_tokens': 4},
    'prefix': {'method.name': 'prompt', 'method.virtual_tokens': 4, 'method.prefix': True},
}
MORE = {
    'dora': {'method.dora': True},
    'some layers': {'method.layers': '1:2', 'method.dora': True},
    'pissa': {'method.init': 'pissa'},
    'ranks': {'method.ranks': 'layers.0.self_attn.q_proj=2,up_proj=3', 'method.rslora': True},
    'embedding': {'method.targets': 'embed_tokens, lm_head,q_proj'},
    'qlora and dora': {'method.name': 'qlora', 'method.dora': True},
    'pfeiffer': {'method.name': 'adapter', 'method.placement': 'pfeiffer'},
}


def settings(**changes):
    config = recipes.defaults()
    common = {'method.name': 'lora', 'method.rank': 4, 'optimizer.lr': 2e-3, 'train.batch_size': 8, 'data.seq_len': 16}
    recipes.apply_overrides(config, common | changes)
    return config


@functools.cache
def build(kind):
    model = models.build(models.read_config(KINDS[kind]))
    return model, jax.jit(model.init)(jax.random.key(0))


def one_device():
    return make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1}, jax.devices()[:1])


def tuned(config, model, params, mesh, tokenizer=None):
    """`(stored, tuned)`: the model as the method stores it, and with what it adds."""
    method = specs.method(config)
    codecs = tuning.codecs(method, model)
    stored = jax.jit(lambda params: tuning.encoded(params, codecs))(params)
    stored = jax.device_put(stored, shardings(match_rules(stored, mesh), mesh))
    return stored, tuning.attach(
        lambda params: tuning.begin(method, model, params, frozenset(), tokenizer), stored, mesh
    )


def batch_of(kind):
    rng = np.random.default_rng(0)
    batch = {'tokens': rng.integers(3, 96, (8, 16)), 'targets': rng.integers(3, 96, (8, 16))}
    if kind == 'encdec':
        batch['decoder_tokens'] = rng.integers(3, 96, (8, 16))
    return {name: value.astype(np.int32) for name, value in batch.items()}


class Targets:
    """Any targets for any kind of model: something to learn."""

    def batch_spec(self):
        return {'tokens': jax.ShapeDtypeStruct((16,), np.int32)}

    def statistics(self, model):
        return None

    def loss(self, model, params, batch, rng):
        outputs = model.apply(params, {k: v for k, v in batch.items() if k != 'targets'}, rng=rng)
        weights = jnp.ones(batch['targets'].shape, jnp.float32)
        nll, correct = cross_entropy(outputs.hidden, model.head(params), batch['targets'], weights)
        return nll, weights.sum(), {'accuracy': correct}


TARGETS = Targets()


def outputs(model, params, kind):
    inputs = {name: value[:2] for name, value in batch_of(kind).items() if name != 'targets'}
    return np.asarray(jax.jit(lambda params: model.logits(params, model.apply(params, inputs).hidden))(params))


def program_of(config, mesh, model, trainable, steps):
    keys = {'optimizer': config.optimizer, 'batch_size': 8, 'method': specs.method(config)}
    return make_program(mesh, model, trainable, TARGETS, steps=steps, **keys)


def moved(config, params):
    trainable, frozen = tuning.partition(specs.method(config).method, params, frozenset())
    keys = iter(jax.random.split(jax.random.key(3), 200))
    return tree.combine(jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), trainable), frozen)


CASES = [(kind, name) for kind in KINDS for name in VARIANTS] + [('decoder', name) for name in MORE]


@pytest.mark.parametrize(('kind', 'name'), CASES)
def test_begins_at_the_model_and_merges_into_the_same_function(kind, name):
    config, (model, params) = settings(**(VARIANTS | MORE)[name]), build(kind)
    stored, params = tuned(config, model, params, one_device())
    reference, found = outputs(model, stored, kind), outputs(model, params, kind)
    if config.method.dora:
        np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-6)
    elif config.method.name != 'prompt':  # further tokens always change what comes after them
        np.testing.assert_array_equal(found, reference)
    params = moved(config, params)
    found = outputs(model, params, kind)
    assert np.abs(found - reference).max() > 1e-3
    if specs.method(config).method.merges:
        plain = merged(params, '')
        assert not any(is_weight(leaf) for leaf in jax.tree.leaves(plain, is_leaf=is_weight))
        np.testing.assert_allclose(outputs(model, plain, kind), found, rtol=1e-5, atol=1e-5 * np.abs(found).max())
    else:
        with pytest.raises(UserError, match='cannot be merged'):
            merged(params, 'model.path=x')


@pytest.mark.parametrize(
    ('kind', 'name'),
    [
        pytest.param(
            kind, name, marks=() if kind == 'decoder' or (kind, name) == ('encoder', 'lora') else pytest.mark.exhaustive
        )
        for kind in KINDS
        for name in VARIANTS
    ],
)
def test_trains_its_own_leaves_alike_on_any_mesh(kind, name):
    config, (model, params) = settings(**VARIANTS[name]), build(kind)
    losses = {}
    eight = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2, 'sequence': 1})
    for mesh in (one_device(), eight):
        with jax.set_mesh(mesh):
            stored, whole = tuned(config, model, params, mesh)
            trainable, frozen = tuning.partition(specs.method(config).method, whole, frozenset())
            before = jax.tree.map(np.asarray, (trainable, frozen, stored))
            program = program_of(config, mesh, model, trainable, 10)
            state, step = program.init_state(trainable), program.train_step(1)
            batch = place(lambda low, high: {k: v[low:high] for k, v in batch_of(kind).items()}, 8, mesh)
            found = []
            for _ in range(10):
                state, metrics = step(state, frozen, batch)
                found.append(float(metrics['loss']))
        losses[mesh.size] = found
        # Nothing of the base moved; all that the method added did.
        for now, then in ((frozen, before[1]), (stored, before[2])):
            jax.tree.map(np.testing.assert_array_equal, now, then)
        for path, now, then in zip(
            tree.paths(state['trainable']),
            jax.tree.leaves(state['trainable']),
            jax.tree.leaves(before[0]),
            strict=True,
        ):
            assert specs.method(config).method.trains(path)
            assert np.any(np.asarray(now) != then), path
        assert found[-1] < found[0]
    np.testing.assert_allclose(losses[8], losses[1], rtol=1e-5)


@pytest.mark.parametrize('name', ['qlora', pytest.param('lora', marks=pytest.mark.exhaustive)])
def test_wide_factors_train_alike_on_a_mesh_of_one_dividing_axis(name):
    """Factors of 2^20 numbers, which their rules' own axes leave whole where the mesh has only the other."""
    fields = KINDS['decoder'] | {'hidden_size': 64, 'intermediate_size': 8192, 'num_key_value_heads': 4}
    model = models.build(models.read_config(fields))
    params = jax.jit(model.init)(jax.random.key(0))
    config = settings(**{'method.name': name, 'method.rank': 64, 'optimizer.eps': 1e-4})
    losses = {}
    for axis in ('', 'fsdp', 'tensor'):
        mesh = one_device()
        if axis:
            sizes = {'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1} | {axis: 4}
            mesh = make_mesh(sizes, jax.devices()[:4])
        with jax.set_mesh(mesh):
            _, whole = tuned(config, model, params, mesh)
            trainable, frozen = tuning.partition(specs.method(config).method, whole, frozenset())
            mlp = trainable['layers']['mlp']
            factors = mlp['down_proj']['kernel'].a, mlp['up_proj']['kernel'].b
            assert [factor.size for factor in factors] == [2**20, 2**20]
            assert not axis or not any(factor.sharding.is_fully_replicated for factor in factors)
            program = program_of(config, mesh, model, trainable, 3)
            state, step = program.init_state(trainable), program.train_step(1)
            batch = place(lambda low, high: {k: v[low:high] for k, v in batch_of('decoder').items()}, 8, mesh)
            losses[axis] = []
            for _ in range(3):
                state, metrics = step(state, frozen, batch)
                losses[axis].append(float(metrics['loss']))
    assert losses[''][-1] < losses[''][0]
    np.testing.assert_allclose(losses['fsdp'], losses[''], rtol=1e-5)
    np.testing.assert_allclose(losses['tensor'], losses[''], rtol=1e-5)


def test_dropout_is_for_training_alone():
    config, (model, params) = settings(**{'method.dropout': 0.5}), build('decoder')
    params = moved(config, tuned(config, model, params, one_device())[1])
    batch = {'tokens': batch_of('decoder')['tokens']}
    apply = jax.jit(lambda params, rng: model.apply(params, batch, rng=rng).hidden)
    keys = jax.random.split(jax.random.key(0), 2)
    assert np.any(apply(params, keys[0]) != apply(params, keys[1]))
    np.testing.assert_array_equal(apply(eval_mode(params), keys[0]), apply(eval_mode(params), keys[1]))


@pytest.mark.parametrize('name', ['prompt', 'prefix'])
def test_a_prompt_serves_every_segment_of_a_packed_row(name):
    config, (model, params) = settings(**VARIANTS[name]), build('decoder')
    params = moved(config, tuned(config, model, params, one_device())[1])
    tokens = batch_of('decoder')['tokens'][:1]
    places = {'positions': np.r_[np.arange(10), np.arange(6)][None], 'segment_ids': np.r_[[1] * 10, [2] * 6][None]}
    packed = model.apply(params, {'tokens': tokens, **{k: v.astype(np.int32) for k, v in places.items()}}).hidden
    apart = [model.apply(params, {'tokens': part}).hidden for part in (tokens[:, :10], tokens[:, 10:])]
    np.testing.assert_allclose(packed, np.concatenate(apart, axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['prompt', 'prefix'])
def test_a_prompt_begins_as_its_text_and_generation_reads_it(name):
    config, (model, params) = settings(**VARIANTS[name]), build('decoder')
    config.method.init_text = 'four tokens'
    ids = (5, 9, 3, 40)

    def tokenizer(text, add_special_tokens):
        assert (text, add_special_tokens) == ('four tokens', False)
        return SimpleNamespace(input_ids=ids)

    _, prompted = tuned(config, model, params, one_device(), tokenizer)
    tokens = batch_of('decoder')['tokens'][:2]
    text = np.concatenate([np.tile(np.asarray([ids]), (2, 1)), tokens], axis=1)
    apply = jax.jit(lambda params, tokens: model.apply(params, {'tokens': tokens}).hidden)
    expected = apply(params, text)[:, 4:]
    np.testing.assert_allclose(apply(prompted, tokens), expected, rtol=1e-5, atol=1e-5)

    prefill, step = jax.jit(model.prefill, static_argnums=3), jax.jit(model.step)
    hidden, cache, positions = prefill(prompted, tokens[:, :10], np.full(2, 10, np.int32), 6)
    found = [hidden]
    for at in range(10, 16):
        hidden, cache = step(prompted, cache, tokens[:, at], positions, np.ones(2, bool))
        found.append(hidden)
        positions = positions + 1
    np.testing.assert_allclose(np.stack(found, 1), expected[:, 9:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('given', [('all-linear', 'embed_tokens'), 'all-linear,embed_tokens'])
def test_more_than_all_linear(given):
    model, _ = build('decoder')
    chosen = targets.select(model, given)
    assert set(chosen) == set(targets.linear(model)) | {'embed_tokens/embedding'}
    assert chosen.keys() - targets.select(model, 'all-linear').keys() == {'embed_tokens/embedding'}


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'method.targets': 'query'}, ("method.targets: 'query' matches no module", 'q_proj', 'all-linear')),
        ({'method.rank': 129}, ('method.rank=129', '128', 'down_proj')),
        ({'method.ranks': 'v_proj=70'}, ('method.rank=70', '64', 'v_proj')),
        ({'method.layers': '5:'}, ("method.layers='5:'",)),
        ({'method.targets': 'embed_tokens', 'method.dora': True}, ('method.targets', 'embedding')),
    ],
)
def test_impossible_settings_are_one_line(changes, words):
    config, (model, params) = settings(**changes), build('decoder')
    with pytest.raises(UserError) as caught:
        lora.METHOD.init(params, model, config.method, jax.random.key(0))
    assert '\n' not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
