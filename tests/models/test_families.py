"""Every family against `transformers`' model in PyTorch."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from comparing import (
    assert_a_mesh_computes_the_same,
    assert_bfloat16_is_near,
    assert_close,
    assert_gradients_equal,
    assert_remat_changes_no_gradient,
    compute_logits,
    open_model,
    torch_logits,
)
from model_cases import CASES

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.models import hf, kv_cache
from jaxtune.models.decoder_config import decoder_config
from jaxtune.models.model import leaf_paths
from jaxtune.models.safetensors import read_header
from jaxtune.parallel import make_mesh, match_rules

LENGTH = 24


def only(*names: str):
    return pytest.mark.parametrize('case', [case for case in CASES if case.name in names], ids=lambda case: case.name)


FAMILIES = {case.model_type for case in CASES}
few = only('llama', 'gemma2', 'gpt2', 'gemma3_text', 'cohere2')  # as different as families here are


def rows():
    """Four rows of one length: full, padded right, padded left, three documents packed (and padded)."""
    tokens = np.random.default_rng(0).integers(3, 97, (4, LENGTH)).astype(np.int32)
    places = np.arange(LENGTH, dtype=np.int32)
    lengths = (7, 11, 4)
    packed = np.repeat((1, 2, 3, 0), (*lengths, LENGTH - sum(lengths)))
    starts = np.concatenate([np.arange(n) for n in (*lengths, LENGTH - sum(lengths))])
    segment_ids = np.stack([np.ones(LENGTH), places < 15, places >= 9, packed]).astype(np.int32)
    positions = np.stack([places, places * (places < 15), np.maximum(places - 9, 0), starts]).astype(np.int32)
    return {'tokens': tokens, 'positions': positions, 'segment_ids': segment_ids}


def test_logits_equal_transformers_whole_padded_and_packed(case, folder, torch_model):
    batch = rows()
    tokens, positions, segment_ids = batch['tokens'], batch['positions'], batch['segment_ids']
    ours = compute_logits(*open_model(folder), batch)
    assert np.isfinite(ours).all()

    assert_close(ours[:1], torch_logits(torch_model, input_ids=tokens[:1]))
    for row in (1, 2):
        kept = segment_ids[row] > 0
        # Each row by itself: LongRoPE's choice in transformers depends on the rows beside it.
        part = slice(row, row + 1)
        padded = torch_logits(
            torch_model, input_ids=tokens[part], attention_mask=segment_ids[part], position_ids=positions[part]
        )[0]
        assert_close(ours[row, kept], padded[kept])
        assert_close(ours[row, kept], torch_logits(torch_model, input_ids=tokens[part, kept])[0])
    for segment in (1, 2, 3):
        kept = segment_ids[3] == segment
        assert_close(ours[3, kept], torch_logits(torch_model, input_ids=tokens[3:, kept])[0])


@only(
    *FAMILIES,
    'gemma3_text-capped-scaled',
    'glm4-whole-tied',
    'llama-grouped-tied-biased',
    'smollm3-windows-biased-untied',
)
def test_gradients_equal_transformers(folder, torch_model):
    assert_gradients_equal(*open_model(folder), torch_model, rows()['tokens'][:2])


def test_import_and_export_keep_every_bit(case, folder, torch_model, tmp_path):
    model, params = open_model(folder)
    hf.save(tmp_path, model, params)
    theirs, ours = (read_header(place / 'model.safetensors') for place in (folder, tmp_path))
    assert set(ours) == set(theirs)
    for name, entry in ours.items():
        assert entry.read().tobytes() == theirs[name].read().tobytes()
    family = models.families()[case.model_type]
    assert decoder_config(models.read_config(tmp_path), family) == model.config


@only(*FAMILIES, 'gemma3_text-capped-scaled', 'olmo3-yarn')
def test_transformers_reads_what_is_exported(folder, torch_model, tmp_path):
    import transformers

    model, params = open_model(folder)
    hf.save(tmp_path, model, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation='eager')
    assert type(again).__name__ == model.architecture
    tokens = rows()['tokens'][:1]
    np.testing.assert_array_equal(
        torch_logits(again, input_ids=tokens), torch_logits(torch_model, input_ids=tokens), strict=True
    )


@few
def test_positions_and_segments_have_defaults(folder):
    model, params = open_model(folder)
    full = {name: value[:1] for name, value in rows().items()}
    plain = {'tokens': full['tokens']}
    np.testing.assert_array_equal(compute_logits(model, params, plain), compute_logits(model, params, full))


@only(*FAMILIES, 'llama-yarn', 'llama-dynamic')
def test_cache_step_by_step_equals_the_whole(case, folder):
    model, params = open_model(folder)
    tokens = rows()['tokens'][:2]
    length = case.longest_step or LENGTH
    whole = jax.jit(model.apply)(params, {'tokens': tokens[:, :length]}).hidden

    # Prompts of 9 and 6 tokens, padded right; the padding's place is taken by the tokens that follow.
    prompts = np.array([9, 6])
    places = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    segment_ids = (places < prompts[:, None]).astype(np.int32)
    run = jax.jit(lambda p, b, c: model.apply(p, b, cache=c))
    batch = {'tokens': tokens[:, :9], 'positions': places, 'segment_ids': segment_ids}
    hidden, cache, _ = run(params, batch, model.init_cache(2, 9))
    cache = kv_cache.divided(cache, length - 9)
    scale = np.abs(whole).max()
    for row in (0, 1):
        np.testing.assert_allclose(hidden[row, : prompts[row]], whole[row, : prompts[row]], atol=1e-5 * scale)
    at = prompts.copy()
    while (at < length).any():
        now = np.minimum(at, length - 1)
        batch = {
            'tokens': np.take_along_axis(tokens, now[:, None], 1),
            'positions': now[:, None].astype(np.int32),
            'segment_ids': (at < length).astype(np.int32)[:, None],
        }
        hidden, cache, _ = run(params, batch, cache)
        for row in np.flatnonzero(at < length):
            np.testing.assert_allclose(hidden[row, 0], whole[row, at[row]], atol=1e-5 * scale)
        at += 1


@only(*FAMILIES, 'gpt2-untied')
def test_initialisation_has_huggingface_statistics(case, torch_model, tmp_path):
    model = models.build(models.read_config(case.config))
    params = leaf_paths(jax.jit(model.init)(jax.random.key(0)))
    type(torch_model)(torch_model.config).save_pretrained(tmp_path)
    fresh = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
    for path, value in params.items():
        assert value.dtype == np.float32
        theirs = np.stack([fresh[name] for name in model.tensors[path].names(value.shape) if name in fresh])
        ours = np.asarray(value)
        if (theirs == theirs.flat[0]).all():
            assert np.unique(ours) == np.unique(theirs)
        else:
            assert ours.std() == pytest.approx(theirs.std(), rel=max(0.15, 3 * ours.size**-0.5))
            assert abs(ours.mean()) < max(0.2, 3 * ours.size**-0.5) * ours.std()


def test_every_path_is_known_to_the_partition_rules(case):
    model = models.build(models.read_config(case.config))
    mesh = make_mesh({'data': 1, 'fsdp': 4, 'tensor': 2, 'sequence': 1})
    specs, leaves = leaf_paths(match_rules(model.shapes, mesh)), leaf_paths(model.shapes)
    assert set(specs) == set(model.tensors)
    for path, spec in specs.items():
        stacked = path.startswith(('layers/', 'dense_layers/'))
        assert bool(model.tensors[path].stacked) == stacked
        if '/experts/' in path:
            assert tuple(spec)[1] is None  # a mesh without `expert`
        elif path.endswith(('o_proj/kernel', 'down_proj/kernel')):
            both = ('tensor', 'fsdp') if leaves[path].shape[-2] % 8 == 0 else 'tensor'
            assert tuple(spec)[1:] == (both, None)
        elif path.endswith('kernel') and stacked and leaves[path].shape[-1] % 2 == 0:
            assert tuple(spec)[1:] == ('fsdp', 'tensor')
        elif path.endswith(('scale', 'bias')):
            assert not any(spec)


@few
def test_one_device_equals_a_mesh(folder):
    model, params = open_model(folder)
    assert_a_mesh_computes_the_same(model, folder, params, rows())


@few
def test_bfloat16_stays_near_float32(folder):
    assert_bfloat16_is_near(folder, rows())


@few
def test_remat_changes_no_gradient(case):
    assert_remat_changes_no_gradient(case.config, rows())


def test_real_checkpoint_equals_transformers(shared):
    folder = shared / 'data' / 'checkpoints' / 'stories260K' / 'hf'
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('torch')
    tokens = np.random.default_rng(0).integers(3, 512, (2, 64)).astype(np.int32)
    ours = compute_logits(*open_model(folder), {'tokens': tokens})
    assert_close(ours, torch_logits(transformers.AutoModelForCausalLM.from_pretrained(folder), input_ids=tokens))


@pytest.mark.parametrize('name', ['llama', 'llama-grouped-tied-biased', 'gpt2'])
def test_flops_are_six_a_parameter_and_twelve_a_score(name):
    case = next(case for case in CASES if case.name == name)
    model = models.build(models.read_config(case.config))
    leaves = leaf_paths(model.shapes)
    products = sum(leaf.size for path, leaf in leaves.items() if path.endswith('kernel'))
    products += 97 * 32 * ('lm_head/kernel' not in leaves)
    width = model.config.num_heads * model.config.head_dim
    assert model.flops_per_token(10) == 6 * products + 12 * 3 * width * 10


@pytest.mark.parametrize(
    ('name', 'stray'),
    [
        ('gemma2', {'hidden_act': 'relu'}),
        ('mistral', {'attention_bias': True}),
        ('qwen2', {'attention_bias': True, 'hidden_activation': 'relu'}),
        ('phi3', {'attention_bias': True}),
    ],
)
def test_a_field_that_the_family_does_not_read_changes_nothing(name, stray, tmp_path):
    case = next(case for case in CASES if case.name == name)
    (tmp_path / 'config.json').write_text(json.dumps(case.config | stray))
    found = models.read_config(tmp_path)
    family = models.families()[name]
    assert decoder_config(found, family) == decoder_config(models.read_config(case.config), family)
    assert {field: found[field] for field in stray} == stray  # it goes out as it came


def test_an_older_rotary_type_is_named(tmp_path):
    config = next(case for case in CASES if case.name == 'phi3-long-partial-tied').config
    rope = config.pop('rope_parameters')
    (tmp_path / 'config.json').write_text(json.dumps(config | {'rope_scaling': rope | {'rope_type': 'su'}}))
    with pytest.raises(UserError, match=r"config.json: rope_scaling: type='su': expected one of .*longrope"):
        models.read_config(tmp_path)


def test_flops_of_windows_stop_at_the_window():
    case = next(case for case in CASES if case.name == 'gemma2')
    model = models.build(models.read_config(case.config))
    width = model.config.num_heads * model.config.head_dim
    assert model.flops_per_token(50) - model.flops_per_token(5) == 12 * width * 45
