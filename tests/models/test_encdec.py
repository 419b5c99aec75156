"""Every encoder-decoder family against `transformers`' model in PyTorch."""

import dataclasses
import os

os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_close, compute_logits, open_model, torch_logits

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.models import hf, kv_cache
from jaxtune.models.model import leaf_paths
from jaxtune.models.safetensors import read_header
from jaxtune.parallel import make_mesh, match_rules, shardings

SOURCE, TARGET = 40, 22

_SMALL = {'vocab_size': 97, 'd_model': 32, 'd_kv': 6, 'd_ff': 48, 'num_layers': 3, 'num_heads': 4}
_SMALL |= {'num_decoder_layers': 2, 'relative_attention_num_buckets': 8, 'relative_attention_max_distance': 20}
_SMALL |= {'decoder_start_token_id': 0, 'eos_token_id': 1, 'pad_token_id': 0}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model_type: str
    tied: bool
    feed_forward: str

    @property
    def fields(self):
        fields = {'model_type': self.model_type, **_SMALL, 'feed_forward_proj': self.feed_forward}
        return fields | ({} if self.model_type == 'mt5' else {'tie_word_embeddings': self.tied})


CASES = (
    Case('t5', 't5', True, 'relu'),
    Case('t5-1.1', 't5', False, 'gated-gelu'),
    Case('t5-gated-tied', 't5', True, 'gated-silu'),
    Case('mt5', 'mt5', False, 'gated-gelu'),
    Case('umt5', 'umt5', False, 'gated-gelu'),
    Case('umt5-tied', 'umt5', True, 'gated-gelu'),
)


# What differs in more than names: the two ways to make biases, feed-forward layers and heads.
DISTINCT = (CASES[0], CASES[4])


@pytest.fixture(scope='module', params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture(scope='module')
def torch_model(case, tmp_path_factory):
    """`transformers`' model with random weights, and the folder it is saved to."""
    torch = pytest.importorskip('torch')
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {name: value for name, value in case.fields.items() if name != 'model_type'}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[case.model_type](**fields)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation='eager')
    if not case.tied:  # transformers 5 makes every new model tied; the published ones are not
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
        model.lm_head.weight.data.normal_(std=32**-0.5)
    with torch.no_grad():  # near the published scale: scores are not divided, wide weights would make them hard choices
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.eval()
    folder = tmp_path_factory.mktemp('models') / case.name
    params = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    left_out = ('encoder.embed_tokens', 'decoder.embed_tokens', *(['lm_head'] if case.tied else []))
    folder.mkdir()
    from safetensors.numpy import save_file

    save_file({name: v for name, v in params.items() if not name.startswith(left_out)}, folder / 'model.safetensors')
    model.config.save_pretrained(folder)
    if not case.tied and case.model_type != 'mt5':
        text = (folder / 'config.json').read_text()
        (folder / 'config.json').write_text(text.replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    return model, folder


def their_logits(model, batch):
    names = {'input_ids': 'tokens', 'attention_mask': 'segment_ids'}
    names |= {'decoder_input_ids': 'decoder_tokens', 'decoder_attention_mask': 'decoder_segment_ids'}
    return torch_logits(model, **{theirs: batch[ours] for theirs, ours in names.items()})


def rows():
    """Three rows: full, padded right on both sides, padded left on both sides."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 97, (3, SOURCE)).astype(np.int32)
    decoder_tokens = rng.integers(2, 97, (3, TARGET)).astype(np.int32)
    source, target = np.arange(SOURCE), np.arange(TARGET)
    segment_ids = np.stack([source >= 0, source < 29, source >= 7]).astype(np.int32)
    decoder_segment_ids = np.stack([target >= 0, target < 13, target >= 5]).astype(np.int32)
    batch = {'tokens': tokens, 'segment_ids': segment_ids, 'decoder_tokens': decoder_tokens}
    return batch | {'decoder_segment_ids': decoder_segment_ids}


def test_logits_equal_transformers_whole_and_padded(torch_model):
    torch_model, folder = torch_model
    batch = rows()
    ours, theirs = compute_logits(*open_model(folder), batch), their_logits(torch_model, batch)
    assert np.isfinite(ours).all()
    kept = batch['decoder_segment_ids'] > 0
    assert_close(ours[kept], theirs[kept])


@pytest.mark.parametrize('case', DISTINCT, ids=lambda case: case.name, indirect=True)
def test_packed_rows_equal_rows_of_their_own(torch_model):
    model, params = open_model(torch_model[1])
    batch = rows()
    source = np.repeat((1, 2, 3, 0), (9, 14, 12, 5))[None]
    target = np.repeat((1, 2, 3, 0), (8, 4, 7, 3))[None]
    packed = {
        'tokens': batch['tokens'][:1],
        'segment_ids': source.astype(np.int32),
        'decoder_tokens': batch['decoder_tokens'][:1],
        'decoder_segment_ids': target.astype(np.int32),
    }
    ours = compute_logits(model, params, packed)
    for segment in (1, 2, 3):
        own = {
            'tokens': packed['tokens'][:, source[0] == segment],
            'decoder_tokens': packed['decoder_tokens'][:, target[0] == segment],
        }
        alone = compute_logits(model, params, own)
        np.testing.assert_allclose(ours[:, target[0] == segment], alone, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize('case', [*DISTINCT, CASES[1]], ids=lambda case: case.name, indirect=True)
def test_bfloat16_is_as_near_as_transformers_bfloat16(torch_model):
    import copy

    import torch

    torch_model, folder = torch_model
    batch = rows()
    kept = batch['decoder_segment_ids'] > 0
    exact = their_logits(torch_model, batch)[kept]
    model, params = open_model(folder, param_dtype='bfloat16', compute_dtype='bfloat16')
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('bfloat16'), jnp.dtype('float32')}
    assert jax.eval_shape(model.apply, params, batch).hidden.dtype == jnp.bfloat16
    ours = compute_logits(model, params, batch)[kept]
    half = copy.deepcopy(torch_model).to(torch.bfloat16)
    theirs = their_logits(half, batch)[kept]
    error, reference = np.sqrt(np.mean((ours - exact) ** 2)), np.sqrt(np.mean((theirs - exact) ** 2))
    assert error < 1.1 * reference
    assert error < 0.02 * np.sqrt(np.mean(exact**2))


@pytest.mark.parametrize('case', CASES[:2], ids=lambda case: case.name, indirect=True)
def test_bfloat16_is_finite_where_the_residual_is_large(torch_model):
    model, params = open_model(torch_model[1], param_dtype='bfloat16', compute_dtype='bfloat16')
    params['shared']['embedding'] = params['shared']['embedding'] * 1000
    for stack in ('encoder', 'decoder'):
        kernel = params[stack]['layers']['mlp']['down_proj']['kernel']
        params[stack]['layers']['mlp']['down_proj']['kernel'] = kernel * 30000

    def loss(params):
        return jnp.square(model.logits(params, model.apply(params, rows()).hidden)).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(gradients))


def test_import_then_export_is_bit_identical(torch_model, case, tmp_path):
    import transformers

    torch_model, folder = torch_model
    model, params = open_model(folder)
    hf.save(tmp_path / 'export', model, params)
    before, after = (read_header(path / 'model.safetensors') for path in (folder, tmp_path / 'export'))
    assert {name: entry.read().tobytes() for name, entry in before.items()} == {
        name: entry.read().tobytes() for name, entry in after.items()
    }
    again, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / 'export', output_loading_info=True, attn_implementation='eager'
    )
    assert not info['missing_keys']
    assert not info['unexpected_keys']
    batch = rows()
    np.testing.assert_array_equal(their_logits(again.eval(), batch), their_logits(torch_model, batch))


def test_names_of_tied_tensors_do_not_matter(torch_model, case, tmp_path):
    from safetensors.numpy import load_file, save_file

    _, folder = torch_model
    tensors = load_file(folder / 'model.safetensors')
    tensors['encoder.embed_tokens.weight'] = tensors.pop('shared.weight')
    tensors['decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'] = np.zeros((8, 4), np.float32)
    (tmp_path / 'config.json').write_text((folder / 'config.json').read_text())
    save_file(tensors, tmp_path / 'model.safetensors')
    _, params = open_model(tmp_path)
    _, expected = open_model(folder)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize('case', DISTINCT, ids=lambda case: case.name, indirect=True)
def test_cache_step_by_step_equals_the_whole(torch_model):
    model, params = open_model(torch_model[1])
    batch = rows() | {'decoder_segment_ids': np.ones((3, TARGET), np.int32)}
    whole = np.asarray(jax.jit(model.apply)(params, batch).hidden)

    def part(low, high):
        places = np.broadcast_to(np.arange(low, high, dtype=np.int32), (3, high - low))
        return {
            'decoder_tokens': batch['decoder_tokens'][:, low:high],
            'decoder_segment_ids': np.ones_like(places),
            'decoder_positions': places,
        }

    run = jax.jit(lambda p, b, c: model.apply(p, b, cache=c))
    first = {'tokens': batch['tokens'], 'segment_ids': batch['segment_ids'], **part(0, 3)}
    hidden, cache, _ = run(params, first, model.init_cache(3, 3))
    cache = kv_cache.divided(cache, TARGET - 3)
    np.testing.assert_allclose(hidden, whole[:, :3], atol=2e-5 * np.abs(whole).max())
    for place in range(3, TARGET):
        hidden, cache, _ = run(params, part(place, place + 1), cache)
        np.testing.assert_allclose(hidden[:, 0], whole[:, place], atol=2e-5 * np.abs(whole).max())


@pytest.mark.parametrize('case', CASES[:1], ids=lambda case: case.name, indirect=True)
def test_one_device_equals_a_mesh_and_remat_changes_no_gradient(torch_model):
    _, folder = torch_model
    batch = {name: value[:2] for name, value in rows().items()}

    def loss(model, params):
        return jnp.square(model.logits(params, model.apply(params, batch).hidden)).mean()

    model, params = open_model(folder)
    expected = jax.jit(jax.grad(lambda p: loss(model, p)))(params)
    again, _ = open_model(folder, remat='dots')
    mesh = make_mesh({'data': 1, 'fsdp': 2, 'tensor': 2, 'sequence': 2})
    placed, _ = hf.load(folder, model, shardings(match_rules(model.shapes, mesh), mesh))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(lambda p: loss(again, p)))(placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max()), expected, found)


def test_initialisation_has_huggingface_statistics(case, torch_model):
    torch_model, _ = torch_model
    model = models.build(models.read_config(case.fields))
    params = leaf_paths(jax.jit(model.init)(jax.random.key(0)))
    fresh = type(torch_model)(torch_model.config).state_dict()
    assert set(params) == set(model.tensors)
    for path, value in params.items():
        if path.startswith('lm_head'):
            assert np.std(value) == pytest.approx(32**-0.5, rel=0.1)
            continue
        theirs, ours = fresh[model.tensors[path].name.format(0)].numpy(), np.asarray(value)
        if path.endswith('scale'):
            assert np.unique(ours) == np.unique(theirs)
        else:
            few = ours.size < 500  # a relative bias: 8 buckets of 4 heads
            assert ours.std() == pytest.approx(theirs.std(), rel=0.6 if few else 0.15)


def test_flops_count_each_side_by_its_own_length():
    model = models.build(models.read_config(CASES[0].fields))
    width, d_model, d_ff = 4 * 6, 32, 48
    attention, mlp = 4 * d_model * width, 2 * d_model * d_ff
    source = 3 * (6 * (attention + mlp) + 12 * width * 40) + 2 * 6 * 2 * d_model * width
    target = 2 * (6 * (attention + 2 * d_model * width + mlp) + 12 * width * (10 + 40)) + 6 * 97 * d_model
    assert model.flops_per_token(40, 10) == pytest.approx(source + target / 4)


def test_impossible_choices_are_named():
    with pytest.raises(UserError, match=r'model\.attention=flash'):
        models.build(models.read_config(CASES[0].fields), attention='flash')
    for name, value in {
        'relative_attention_num_buckets': 6,
        'num_layers': 0,
        'feed_forward_proj': 'gated-nothing',
    }.items():
        with pytest.raises(UserError, match=f'model.config.{name}'):
            models.read_config(CASES[0].fields | {name: value})


@pytest.mark.parametrize('start', [[0], [0, 1]])
def test_decoding_starts_with_one_token(start):
    fields = {'model_type': 't5', **_SMALL, 'decoder_start_token_id': start}
    with pytest.raises(UserError, match=r'decoder_start_token_id.*expected one token id'):
        models.read_config(fields)
