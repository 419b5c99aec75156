"""Every encoder family and head against `transformers`' model in PyTorch."""

import json

import jax
import numpy as np
import pytest
from comparing import (
    assert_a_mesh_computes_the_same,
    assert_bfloat16_is_near,
    assert_close,
    assert_remat_changes_no_gradient,
    compute_logits,
    open_model,
    torch_logits,
)
from encoder_cases import CASES, LABELS, reference

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.models import hf
from jaxtune.models.model import leaf_paths
from jaxtune.models.safetensors import read_header, write_file

LENGTH = 24


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture
def torch_model(case, folders):
    pytest.importorskip('torch')
    return reference(case, folders / case.name)


@pytest.fixture
def folder(case, folders, torch_model):
    return folders / case.name


def head_of(case) -> dict:
    return {} if case.head == 'lm' else {'head': case.head, 'labels': LABELS}


def find(name: str):
    return next(case for case in CASES if case.name == name)


def rows():
    """Three rows of one length: full, padded right, three documents packed (and padded)."""
    tokens = np.random.default_rng(0).integers(3, 97, (3, LENGTH)).astype(np.int32)
    places = np.arange(LENGTH, dtype=np.int32)
    lengths = (7, 11, 4)
    packed = np.repeat((1, 2, 3, 0), (*lengths, LENGTH - sum(lengths)))
    starts = np.concatenate([np.arange(n) for n in (*lengths, LENGTH - sum(lengths))])
    segment_ids = np.stack([np.ones(LENGTH), places < 15, packed]).astype(np.int32)
    positions = np.stack([places, places * (places < 15), starts]).astype(np.int32)
    return {'tokens': tokens, 'positions': positions, 'segment_ids': segment_ids}


def padded(batch, pad: int):
    """The first two rows as transformers wants them: its padding has a number of its own."""
    mask = batch['segment_ids'][:2]
    return np.where(mask > 0, batch['tokens'][:2], pad), mask


def test_logits_equal_transformers_whole_padded_and_packed(case, folder, torch_model):
    batch = rows()
    model, params = open_model(folder, **head_of(case))
    assert model.architecture == type(torch_model).__name__
    ours = compute_logits(model, params, batch)
    assert np.isfinite(ours).all()
    tokens, mask = padded(batch, case.config['pad_token_id'])
    theirs = torch_logits(torch_model, input_ids=tokens, attention_mask=mask)
    if case.head == 'classification':
        assert ours.shape == (3, 1, LABELS)
        assert_close(ours[:2, 0], theirs)
        return
    assert_close(ours[:2][mask > 0], theirs[mask > 0])
    for segment in (1, 2, 3):
        kept = batch['segment_ids'][2] == segment
        assert_close(ours[2, kept], torch_logits(torch_model, input_ids=batch['tokens'][2:, kept])[0])


@pytest.mark.parametrize('name', ['bert-lm', 'bert-classification'])
def test_token_types_tell_two_texts_apart(name, folders):
    pytest.importorskip('torch')
    case = find(name)
    torch_model = reference(case, folders / name)
    model, params = open_model(folders / name, **head_of(case))
    tokens = rows()['tokens']
    types = np.broadcast_to((np.arange(LENGTH) > 9).astype(np.int32), tokens.shape)
    ours = compute_logits(model, params, {'tokens': tokens, 'token_types': types})
    theirs = torch_logits(torch_model, input_ids=tokens, token_type_ids=types.astype(np.int64))
    assert_close(ours.reshape(theirs.shape), theirs)


def test_import_and_export_keep_every_bit(case, folder, tmp_path):
    model, params = open_model(folder, **head_of(case))
    hf.save(tmp_path / 'out', model, params)
    theirs, ours = (read_header(path / 'model.safetensors') for path in (folder, tmp_path / 'out'))
    unused = {'cls.predictions.bias'} if not model.config.tied else set()
    assert set(ours) == set(theirs) - unused
    for name, entry in ours.items():
        assert entry.read().tobytes() == theirs[name].read().tobytes()
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architectures'] == json.loads((folder / 'config.json').read_text())['architectures']


def test_transformers_reads_what_is_exported(case, folder, torch_model, tmp_path):
    model, params = open_model(folder, **head_of(case))
    hf.save(tmp_path / 'out', model, params)
    again, report = type(torch_model).from_pretrained(
        tmp_path / 'out', output_loading_info=True, attn_implementation='eager'
    )
    assert not report['missing_keys'] or not model.config.tied
    assert not report['unexpected_keys']
    tokens = rows()['tokens'][:1]
    np.testing.assert_allclose(
        torch_logits(again.eval(), input_ids=tokens), torch_logits(torch_model, input_ids=tokens), atol=1e-5
    )


def test_initialisation_has_huggingface_statistics(case, torch_model):
    head = {} if case.head == 'lm' else {'head': case.head, 'labels': LABELS}
    model = models.build(models.read_config(case.config), **head)
    params = leaf_paths(jax.jit(model.init)(jax.random.key(0)))
    fresh = type(torch_model)(torch_model.config).state_dict()
    for path, value in params.items():
        assert value.dtype == np.float32
        name = model.tensors[path].names(value.shape)[0]
        theirs, ours = fresh[name].numpy(), np.asarray(value)
        if path.endswith(('scale', 'bias')):
            assert np.unique(ours) == np.unique(theirs)
        else:
            spread = 4 / np.sqrt(min(ours.size, theirs.size))
            assert ours.std() == pytest.approx(theirs.std(), rel=max(0.15, spread))
            assert abs(ours.mean()) < 2 * spread * ours.std()


@pytest.mark.parametrize('case', [find('bert-lm'), find('modernbert-classification')], ids=lambda case: case.name)
def test_one_device_equals_a_mesh(case, folder):
    batch = {name: np.concatenate([value, value[:1]]) for name, value in rows().items()}
    model, params = open_model(folder, **head_of(case))
    assert_a_mesh_computes_the_same(model, folder, params, batch)


@pytest.mark.parametrize('case', [find('bert-lm'), find('modernbert-lm')], ids=lambda case: case.name)
def test_bfloat16_stays_near_float32(case, folder):
    assert_bfloat16_is_near(folder, rows())


@pytest.mark.parametrize('name', ['bert-lm', 'modernbert-lm'])
def test_remat_changes_no_gradient(name):
    assert_remat_changes_no_gradient(find(name).config, rows())


@pytest.mark.parametrize('family', ['bert', 'roberta', 'xlm_roberta', 'camembert', 'distilbert', 'modernbert'])
def test_another_head_is_fresh_and_the_folders_own_is_left_out_quietly(family, folders, caplog):
    pytest.importorskip('torch')
    folder = folders / f'{family}-lm'
    reference(find(f'{family}-lm'), folder)
    model = models.build(models.read_config(folder), head='classification', labels=7)
    params, fresh = hf.load(folder, model)
    assert {'classifier/kernel', 'classifier/bias'} <= fresh
    assert {path.split('/')[0] for path in fresh} <= {'classifier', 'pooler'}
    assert params['classifier']['kernel'].shape == (32, 7)
    assert not caplog.records


def test_a_folder_without_prefix_and_with_old_norm_names(folders, tmp_path):
    pytest.importorskip('torch')
    reference(find('bert-lm'), folders / 'bert-lm')
    model, params = open_model(folders / 'bert-lm')
    entries = read_header(folders / 'bert-lm' / 'model.safetensors')
    old = {}
    for name, entry in entries.items():
        name = name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')
        old[name.removeprefix('bert.')] = entry
    specs = {name: (entry.dtype, entry.shape) for name, entry in old.items()}
    write_file(tmp_path / 'model.safetensors', specs, (entry.read() for entry in old.values()))
    again, fresh = hf.load(tmp_path, model)
    assert not fresh
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_only_encoders_have_these_heads():
    fields = models.read_config({'model_type': 'gpt2'})
    with pytest.raises(UserError, match=r'objective: model_type=.gpt2. has no classification head'):
        models.build(fields, head='classification', labels=2)


def test_an_encoder_writes_no_text():
    model = models.build(models.read_config(find('bert-lm').config))
    with pytest.raises(UserError, match='an encoder cannot write text'):
        model.init_cache(1, 8)
