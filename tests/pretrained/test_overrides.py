"""`model.config` over a loaded model: as `transformers` has it, and refused where the stored tensors would not fit."""

import json
import types

import jax
import numpy as np
import pytest

from jaxtune import chat, models
from jaxtune.data import tokenizer as tokenizers
from jaxtune.errors import UserError
from jaxtune.models import hf
from jaxtune.parallel import make_mesh
from jaxtune.pretrained import overrides
from jaxtune.pretrained.load import load_model
from jaxtune.recipe import recipes
from jaxtune.tasks import specs

SMALL = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4}
LLAMA = {**SMALL, 'model_type': 'llama', 'vocab_size': 320, 'num_key_value_heads': 2, 'max_position_embeddings': 32}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32}
LONGER = {'max_position_embeddings': 128}
OLDER = {'type': 'yarn', 'factor': 4.0}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A small Llama of 32 positions, with large weights so that a scaling shows."""
    place = tmp_path_factory.mktemp('model') / 'small'
    model = models.build(models.read_config({**LLAMA, 'initializer_range': 0.3}))
    hf.save(place, model, jax.jit(model.init)(jax.random.key(0)))
    tokenizers.load('bytes').save_pretrained(str(place))
    return place


@pytest.fixture
def described(tmp_path):
    """Writes a folder that holds a config.json alone."""

    def write(fields):
        (tmp_path / 'config.json').write_text(json.dumps(fields))
        return str(tmp_path)

    return write


def loaded(path, **keys):
    config = recipes.defaults()
    recipes.apply_overrides(config, {'task': 'generate', 'model.path': str(path), **keys})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return load_model(specs.model_spec(config), mesh)


@pytest.mark.parametrize(
    ('ours', 'theirs'),
    [
        ({**LONGER, 'rope_scaling': YARN}, {**LONGER, 'rope_parameters': {**YARN, 'rope_theta': 10000.0}}),
        ({**LONGER, 'rope_scaling': OLDER}, {**LONGER, 'rope_parameters': {**YARN, 'rope_theta': 10000.0}}),
        ({**LONGER, 'rope_parameters': {**YARN, 'rope_theta': 5e4}},) * 2,
        ({'rope_theta': 5e4}, {'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e4}}),
        ({'rms_norm_eps': 0.1, 'hidden_act': 'gelu'},) * 2,
    ],
    ids=['rope_scaling', 'older', 'rope_parameters', 'rope_theta', 'others'],
)
def test_logits_are_those_of_transformers_with_the_same_fields(folder, ours, theirs, capsys):
    torch = pytest.importorskip('torch')
    from transformers import AutoConfig, AutoModelForCausalLM

    bundle = loaded(folder, **{'model.config': ours})
    said = capsys.readouterr().out
    assert all(f'{name}: ' in said for name in theirs)
    tokens = np.random.default_rng(0).integers(3, 259, (2, 96)).astype(np.int32)
    logits = np.asarray(
        bundle.model.logits(bundle.params, bundle.model.apply(bundle.params, {'tokens': tokens}).hidden)
    )
    config = AutoConfig.from_pretrained(folder, **theirs)
    reference = AutoModelForCausalLM.from_pretrained(folder, config=config)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    plain = loaded(folder)
    before = plain.model.logits(plain.params, plain.model.apply(plain.params, {'tokens': tokens}).hidden)
    assert np.abs(np.asarray(before) - expected).max() > 0.1  # it does change something


REFUSED = [
    ({'hidden_size': 64}, r'model\.config\.hidden_size=64: .*embed_tokens.*\[320, 64\].*expected 32'),
    ({'num_hidden_layers': 1}, r'model\.config\.num_hidden_layers=1: .*expected 2'),
    ({'vocab_size': 400}, r'model\.config\.vocab_size=400: .*expected 320.*tokenizer\.add'),
    ({'tie_word_embeddings': True}, r'model\.config\.tie_word_embeddings=True: .*without.*lm_head.*expected False'),
    ({'attention_bias': True}, r'model\.config\.attention_bias=True: .*with the tensor .*bias; expected False'),
    ({**LONGER, 'head_dim': 16, 'rope_theta': 5.0}, r'^model\.config\.head_dim=16: .*expected 8'),
    ({'max_positions': 64}, r'model\.config\.max_positions: unknown key.*model\.config\.max_position_embeddings'),
    ({'max_position_embeddings': 0}, r'model\.config\.max_position_embeddings=0: expected an integer >= 1'),
    ({'hidden_act': 'step'}, r"model\.config\.hidden_act='step': expected one of"),
    ({'model_type': 'gpt2'}, r"model\.config\.model_type='gpt2': expected 'llama'"),
    ({'eos_token_id': 5}, r'model\.config\.eos_token_id=5: expected 2'),
    ({'dtype': 'bfloat16'}, r'model\.config\.dtype: .*model\.param_dtype'),
    ({'rope_scaling': '{yarn'}, r"model\.config\.rope_scaling='\{yarn': expected fields by name"),
    ({'rope_scaling': ''}, r"model\.config\.rope_scaling='': expected fields by name"),
    ({'rope_scaling': {'rope_type': 'yrn'}}, r"model\.config\.rope_scaling\.rope_type='yrn': expected one of"),
    ({'rope_scaling': {'rope_type': 'yarn'}}, r'model\.config\.rope_scaling\.factor: is missing'),
    ({'rope_scaling': {**YARN, 'beta': 1}}, r'model\.config\.rope_scaling\.beta: unknown key of rope_type=yarn'),
    ({'rope_scaling': {**YARN, 'factor': 'x'}}, r"model\.config\.rope_scaling\.factor='x': expected a number > 0"),
    ({'rope_scaling': {'factor': 2.0}}, r'model\.config\.rope_scaling\.factor: unknown key of rope_type=default'),
    ({'rope_scaling': YARN, 'rope_parameters': YARN}, r'model\.config\.rope_scaling: is an older name'),
    ({'rope_theta': 2.0, 'rope_parameters': {'rope_theta': 2.0}}, r'model\.config\.rope_theta: stands in'),
]


@pytest.mark.parametrize(('fields', 'message'), REFUSED, ids=[','.join(fields) for fields, _ in REFUSED])
def test_what_is_impossible_or_changes_tensors_is_refused_before_weights(described, fields, message):
    # There are none in the folder.
    with pytest.raises(UserError, match=message) as error:
        overrides.read(described({**LLAMA, 'tie_word_embeddings': False}), [fields])
    assert '\n' not in str(error.value)


def test_a_learned_position_table_is_as_long_as_it_is(described):
    gpt2 = {'model_type': 'gpt2', 'n_embd': 32, 'n_layer': 2, 'n_head': 4, 'vocab_size': 320, 'n_positions': 64}
    place = described(gpt2)
    for name in ('n_positions', 'max_position_embeddings'):
        with pytest.raises(UserError, match=r'model\.config\.n_positions=128: .*wpe.*expected 64'):
            overrides.read(place, [{name: 128}])
    with pytest.raises(UserError, match=r'model\.config\.rope_scaling: unknown key of model_type=gpt2'):
        overrides.read(place, [{'rope_scaling': YARN}])


def test_a_scaling_without_a_type_changes_that_of_the_folder(described):
    place = described({**LLAMA, 'rope_theta': 77.0, 'rope_scaling': OLDER, **LONGER})
    read = overrides.read(place, [{'rope_scaling': {'factor': 8.0}, 'max_position_embeddings': 256}])
    expected = {**YARN, 'factor': 8.0, 'original_max_position_embeddings': 128, 'rope_theta': 77.0}
    assert {name: read.fields['rope_parameters'][name] for name in expected} == expected
    assert set(read.changes) == {'rope_parameters', 'max_position_embeddings'}
    # The length that it was trained at stays, with or without a word of the scaling.
    read = overrides.read(place, [{'max_position_embeddings': 512}])
    assert read.changes == {'max_position_embeddings': 512}
    assert read.fields['rope_parameters']['original_max_position_embeddings'] == 128
    # Another scaling keeps the base of the frequencies, and no scaling too.
    read = overrides.read(place, [{'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}])
    assert read.fields['rope_parameters'] == {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 77.0}
    read = overrides.read(place, [{'rope_scaling': None}])
    assert read.fields['rope_parameters'] == {'rope_type': 'default', 'rope_theta': 77.0}
    # Layers lie over each other.
    read = overrides.read(place, [{'rope_scaling': {'factor': 8.0}}, {'rope_theta': 5.0}])
    assert (read.fields['rope_parameters']['factor'], read.fields['rope_parameters']['rope_theta']) == (8.0, 5.0)


def test_fields_that_a_class_reads_by_older_names_stay(described):
    phi3 = {**SMALL, 'model_type': 'phi3', 'vocab_size': 320, 'partial_rotary_factor': 0.5, 'rope_theta': 77.0}
    read = overrides.read(described({**phi3, 'pad_token_id': 0}), [{'rms_norm_eps': 0.5}])
    assert read.changes == {'rms_norm_eps': 0.5}
    assert read.fields['rope_parameters']['partial_rotary_factor'] == 0.5
    modernbert = {**SMALL, 'model_type': 'modernbert', 'vocab_size': 320, 'global_rope_theta': 77.0}
    place = described(modernbert)
    assert overrides.read(place, [{'local_attention': 8}]).changes == {'local_attention': 8}
    read = overrides.read(place, [{'rope_parameters': {'sliding_attention': {'rope_theta': 5.0}}}])
    thetas = {name: part['rope_theta'] for name, part in read.fields['rope_parameters'].items()}
    assert thetas == {'full_attention': 77.0, 'sliding_attention': 5.0}


def test_what_a_class_derives_follows_and_what_it_does_not_know_stays(described):
    qwen2 = {**SMALL, 'model_type': 'qwen2', 'vocab_size': 320, 'num_key_value_heads': 2, 'sliding_window': 8}
    place = described({**qwen2, 'max_window_layers': 1, 'use_sliding_window': False, 'mine': 3})
    read = overrides.read(place, [{'use_sliding_window': True, 'sliding_window': 4}])
    assert read.fields['layer_types'] == ['full_attention', 'sliding_attention']
    assert (read.fields['sliding_window'], read.fields['mine']) == (4, 3)
    same = overrides.read(place, [{'model_type': 'qwen2', 'hidden_size': 32}])
    assert same.changes == {}
    assert same.fields == models.read_config(place)


def test_a_mixture_s_fields_are_known_by_each_of_their_names(described):
    fields = {**SMALL, 'model_type': 'qwen3_moe', 'vocab_size': 320, 'head_dim': 16, 'num_experts_per_tok': 2}
    place = described({**fields, 'num_experts': 8})
    same = overrides.read(place, [{**fields, 'num_experts': 8, 'rms_norm_eps': 0.1}])
    assert same.changes == {'rms_norm_eps': 0.1}
    assert (same.fields['num_local_experts'], same.fields['head_dim']) == (8, 16)
    with pytest.raises(UserError, match=r'model\.config\.num_\w*experts=4'):
        overrides.read(place, [{'num_experts': 4}])


def test_other_models_of_a_recipe_stay_as_they_are(folder):
    config = recipes.defaults()
    keys = {'task': 'ppo', 'model.path': str(folder), 'model.config': LONGER, 'rl.reward': str(folder)}
    recipes.apply_overrides(config, keys)
    assert specs.model_spec(config).overrides == LONGER
    assert specs.reward_model_spec(config).overrides == {}
    assert specs.other_model_spec(config, 'dpo.reference', str(folder)).overrides == {}


def test_chat_takes_them_as_json(folder):
    flags = {name: default for name, (default, _) in chat.FLAGS.items()} | {'model': str(folder)}
    config = chat.recipe_of(types.SimpleNamespace(**flags | {'model_config': json.dumps(LONGER)}))
    assert chat.Chat(config).limit == 128
    with pytest.raises(UserError, match='--model_config=x: expected JSON'):
        chat.recipe_of(types.SimpleNamespace(**flags | {'model_config': 'x'}))


def test_adapters_of_one_run_have_one_base(tmp_path):
    for name, changes in (('a', LONGER), ('b', LONGER), ('c', {'rms_norm_eps': 0.5}), ('d', {})):
        (tmp_path / name).mkdir()
        overrides.keep(tmp_path / name, changes, 'base')
    assert overrides.of_adapters([str(tmp_path / name) for name in 'ab']) == LONGER
    assert overrides.of_adapters([]) == overrides.of_adapters([str(tmp_path / 'd')]) == {}
    for other in 'cd':
        with pytest.raises(UserError, match='expected adapters of one base'):
            overrides.of_adapters([str(tmp_path / 'a'), str(tmp_path / other)])
    assert "from_pretrained('base', max_position_embeddings=128)" in (tmp_path / 'a' / 'README.md').read_text()
