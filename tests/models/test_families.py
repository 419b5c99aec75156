"""Every family against `transformers`' model in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import CASES

from jaxtune import models
from jaxtune.models import hf
from jaxtune.models.model import leaf_paths
from jaxtune.parallel import make_mesh, match_rules, shardings

LENGTH = 24
TOLERANCE = 1e-4

one_a_family = pytest.mark.parametrize('case', [c for c in CASES if c.name == c.model_type], ids=lambda c: c.name)


def open_model(folder, **settings):
    model = models.build(models.read_config(folder), **settings)
    params, fresh = hf.load(folder, model)
    assert not fresh
    return model, params


def compute_logits(model, params, batch):
    return np.asarray(jax.jit(lambda p, b: model.logits(p, model.apply(p, b).hidden))(params, batch))


def torch_logits(torch_model, tokens, mask=None, positions=None):
    import torch

    inputs = {'input_ids': tokens, 'attention_mask': mask, 'position_ids': positions}
    with torch.no_grad():
        inputs = {name: torch.tensor(value) for name, value in inputs.items() if value is not None}
        return torch_model(**inputs).logits.numpy()


def assert_close(ours, theirs):
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


def rows():
    """Four rows of one length: full, padded right, padded left, three documents packed (and padded)."""
    tokens = np.random.default_rng(0).integers(3, 97, (4, LENGTH)).astype(np.int32)
    places = np.arange(LENGTH, dtype=np.int32)
    lengths = (7, 11, 4)
    packed = np.repeat((1, 2, 3, 0), (*lengths, LENGTH - sum(lengths)))
    starts = np.concatenate([np.arange(n) for n in (*lengths, LENGTH - sum(lengths))])
    segments = np.stack([np.ones(LENGTH), places < 15, places >= 9, packed]).astype(np.int32)
    positions = np.stack([places, places * (places < 15), np.maximum(places - 9, 0), starts]).astype(np.int32)
    return {'tokens': tokens, 'positions': positions, 'segments': segments}


def test_logits_equal_transformers_whole_padded_and_packed(case, folder, torch_model):
    batch = rows()
    tokens, positions, segments = batch['tokens'], batch['positions'], batch['segments']
    ours = compute_logits(*open_model(folder), batch)
    assert np.isfinite(ours).all()

    assert_close(ours[:1], torch_logits(torch_model, tokens[:1]))
    for row in (1, 2):
        kept = segments[row] > 0
        # Each row by itself: LongRoPE's choice in transformers depends on the rows beside it.
        part = slice(row, row + 1)
        padded = torch_logits(torch_model, tokens[part], segments[part], positions[part])[0]
        assert_close(ours[row, kept], padded[kept])
        assert_close(ours[row, kept], torch_logits(torch_model, tokens[part, kept])[0])
    for segment in (1, 2, 3):
        kept = segments[3] == segment
        assert_close(ours[3, kept], torch_logits(torch_model, tokens[3:, kept])[0])


def test_positions_and_segments_have_defaults(folder):
    model, params = open_model(folder)
    full = {name: value[:1] for name, value in rows().items()}
    plain = {'tokens': full['tokens']}
    np.testing.assert_array_equal(compute_logits(model, params, plain), compute_logits(model, params, full))


def test_cache_step_by_step_equals_the_whole(case, folder):
    model, params = open_model(folder)
    tokens = rows()['tokens'][:2]
    length = case.longest_step or LENGTH
    whole = jax.jit(model.apply)(params, {'tokens': tokens[:, :length]}).hidden

    # Prompts of 9 and 6 tokens, padded right; the padding's place is taken by the tokens that follow.
    prompts = np.array([9, 6])
    places = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    segments = (places < prompts[:, None]).astype(np.int32)
    run = jax.jit(lambda p, b, c: model.apply(p, b, cache=c))
    batch = {'tokens': tokens[:, :9], 'positions': places, 'segments': segments}
    hidden, cache = run(params, batch, model.init_cache(2, length))
    scale = np.abs(whole).max()
    for row in (0, 1):
        np.testing.assert_allclose(hidden[row, : prompts[row]], whole[row, : prompts[row]], atol=1e-5 * scale)
    at = prompts.copy()
    while (at < length).any():
        now = np.minimum(at, length - 1)
        batch = {
            'tokens': np.take_along_axis(tokens, now[:, None], 1),
            'positions': now[:, None].astype(np.int32),
            'segments': (at < length).astype(np.int32)[:, None],
        }
        hidden, cache = run(params, batch, cache)
        for row in np.flatnonzero(at < length):
            np.testing.assert_allclose(hidden[row, 0], whole[row, at[row]], atol=1e-5 * scale)
        at += 1


def test_initialisation_has_huggingface_statistics(case, torch_model):
    model = models.build(models.read_config(case.config))
    params = leaf_paths(jax.jit(model.init)(jax.random.key(0)))
    fresh = type(torch_model)(torch_model.config).state_dict()
    for path, value in params.items():
        assert value.dtype == np.float32
        name = model.tensors[path].name.format(0)
        theirs, ours = fresh[name].numpy(), np.asarray(value)
        if path.endswith(('scale', 'bias')):
            assert np.unique(ours) == np.unique(theirs)
        else:
            assert ours.std() == pytest.approx(theirs.std(), rel=0.15)
            assert abs(ours.mean()) < 0.2 * ours.std()


def test_every_path_is_known_to_the_partition_rules(case):
    model = models.build(models.read_config(case.config))
    mesh = make_mesh({'data': 1, 'fsdp': 4, 'tensor': 2, 'sequence': 1})
    specs = leaf_paths(match_rules(model.shapes, mesh))
    assert set(specs) == set(model.tensors)
    for path, spec in specs.items():
        stacked = path.startswith('layers/')
        assert model.tensors[path].stacked == stacked
        if path.endswith(('o_proj/kernel', 'down_proj/kernel')):
            assert tuple(spec)[1:] == ('tensor', 'fsdp')
        elif path.endswith('kernel') and stacked:
            assert tuple(spec)[1:] == ('fsdp', 'tensor')
        elif path.endswith(('scale', 'bias')):
            assert not any(spec)


@one_a_family
def test_one_device_equals_a_mesh(folder):
    batch = rows()
    model, params = open_model(folder)
    one = compute_logits(model, params, batch)
    mesh = make_mesh({'data': 1, 'fsdp': 2, 'tensor': 2, 'sequence': 2})
    placed = shardings(match_rules(model.shapes, mesh), mesh)
    params, _ = hf.load(folder, model, placed)
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True):
        assert leaf.sharding == sharding
    with jax.set_mesh(mesh):
        many = compute_logits(model, params, batch)
    np.testing.assert_allclose(many, one, atol=1e-5 * np.abs(one).max())


@one_a_family
def test_bfloat16_stays_near_float32(folder):
    batch = rows()
    exact = compute_logits(*open_model(folder), batch)
    model, params = open_model(folder, param_dtype='bfloat16', compute_dtype='bfloat16')
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
    assert jax.eval_shape(model.apply, params, batch).hidden.dtype == jnp.bfloat16
    rough = compute_logits(model, params, batch)
    kept = batch['segments'] > 0
    error = np.sqrt(np.mean((rough - exact)[kept] ** 2) / np.mean(exact[kept] ** 2))
    assert error < 0.1


@pytest.mark.parametrize('name', ['llama', 'gemma2', 'gpt2'])
def test_remat_changes_no_gradient(name):
    config = next(case.config for case in CASES if case.name == name)
    batch = rows()

    def gradients(remat):
        model = models.build(models.read_config(config), remat=remat)
        params = jax.jit(model.init)(jax.random.key(0))
        loss = lambda p: jnp.square(model.logits(p, model.apply(p, batch).hidden)).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    expected = gradients('none')
    for remat in ('full', 'dots'):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(a).max()) + 1e-12),
            expected,
            gradients(remat),
        )


def test_real_checkpoint_equals_transformers(shared):
    folder = shared / 'data' / 'checkpoints' / 'stories260K' / 'hf'
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('torch')
    tokens = np.random.default_rng(0).integers(3, 512, (2, 64)).astype(np.int32)
    ours = compute_logits(*open_model(folder), {'tokens': tokens})
    assert_close(ours, torch_logits(transformers.AutoModelForCausalLM.from_pretrained(folder), tokens))


@pytest.mark.parametrize('name', ['llama', 'llama-grouped-tied-biased', 'gpt2'])
def test_flops_are_six_a_parameter_and_twelve_a_score(name):
    case = next(case for case in CASES if case.name == name)
    model = models.build(models.read_config(case.config))
    leaves = leaf_paths(model.shapes)
    products = sum(leaf.size for path, leaf in leaves.items() if path.endswith('kernel'))
    products += 97 * 32 * ('lm_head/kernel' not in leaves)
    width = model.config.num_heads * model.config.head_dim
    assert model.flops_per_token(10) == 6 * products + 12 * 3 * width * 10


def test_flops_of_windows_stop_at_the_window():
    case = next(case for case in CASES if case.name == 'gemma2')
    model = models.build(models.read_config(case.config))
    width = model.config.num_heads * model.config.head_dim
    assert model.flops_per_token(50) - model.flops_per_token(5) == 12 * width * 45
