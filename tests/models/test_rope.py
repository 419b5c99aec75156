"""Rotary frequencies against `transformers`', far positions, and LongRoPE on both sides of its border."""

import json

import jax
import numpy as np
import pytest
from comparing import assert_close, compute_logits, open_model, torch_logits
from model_cases import CASES, reference

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.generation.beam import beam_search
from jaxtune.generation.sampling import Sampling, Stream, pad_prompts, sample
from jaxtune.models.rope import make_rope

BORDER = 16
LONG = next(case for case in CASES if case.name == 'phi3-long-partial-tied')
LLAMA3 = {'rope_type': 'llama3', 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32768}
PARAMETERS = {
    'default': {'rope_type': 'default'},
    'linear': {'rope_type': 'linear', 'factor': 3.7},
    'llama-3.1': {**LLAMA3, 'factor': 8.0, 'original_max_position_embeddings': 8192},
    'llama-3.2': {**LLAMA3, 'factor': 32.0, 'original_max_position_embeddings': 8192},
    'yarn': YARN,
    'yarn-untruncated': {**YARN, 'factor': 40.0, 'original_max_position_embeddings': 4096, 'truncate': False},
    'proportional': {'rope_type': 'proportional', 'partial_rotary_factor': 0.3, 'factor': 1.7},
    'longrope': {'rope_type': 'longrope', 'original_max_position_embeddings': 4096},
}


@pytest.mark.parametrize('name', PARAMETERS)
@pytest.mark.parametrize('theta', [1e4, 5e5, 1e6])
def test_frequencies_are_those_of_transformers(name, theta):
    """To the last bit, but where PyTorch's vectorised power is itself not correctly rounded."""
    pytest.importorskip('torch')
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for dim in (64, 96, 128, 256):
        parameters = {**PARAMETERS[name], 'rope_theta': theta}
        if name == 'longrope':
            factors = np.random.default_rng(dim).uniform(1, 60, (2, dim // 2))
            parameters |= {'short_factor': factors[0].tolist(), 'long_factor': factors[1].tolist()}
        fields = {'hidden_size': 2 * dim, 'num_attention_heads': 2, 'max_position_embeddings': 131072}
        theirs = LlamaRotaryEmbedding(LlamaConfig(**fields, rope_parameters=dict(parameters))).inv_freq.numpy()
        ours = np.asarray(make_rope(parameters, dim, 131072).frequencies, np.float32)
        units = np.abs(ours.view(np.int32) - theirs.view(np.int32))
        assert (units > 0).sum() <= 1
        assert units.max() <= 2


@pytest.mark.parametrize('name', ['default', 'llama-3.1', 'yarn'])
def test_logits_far_out_equal_transformers(name, tmp_path):
    pytest.importorskip('torch')
    case = next(case for case in CASES if case.name == 'llama')
    fields = {**case.fields, 'head_dim': 128, 'max_position_embeddings': 131072}
    fields['rope_parameters'] = {**PARAMETERS[name], 'rope_theta': 5e5}
    case = type(case)(f'far-{name}', 'llama', fields)
    theirs = reference(case, tmp_path)
    tokens = np.random.default_rng(0).integers(3, 97, (1, 24)).astype(np.int32)
    positions = np.linspace(0, 100_000, 24).astype(np.int32)[None]
    ours = compute_logits(*open_model(tmp_path), {'tokens': tokens, 'positions': positions})
    assert_close(ours, torch_logits(theirs, input_ids=tokens, position_ids=positions))


@pytest.fixture
def dynamic(tmp_path):
    """`transformers`' model with a base that grows beyond 64 positions, ours, and its parameters."""
    pytest.importorskip('torch')
    case = next(case for case in CASES if case.name == 'llama-dynamic')
    return reference(case, tmp_path / 'model'), *open_model(tmp_path / 'model')


def test_the_base_of_dynamic_frequencies_grows_with_each_document_alone(dynamic, tmp_path):
    import transformers

    _, model, params = dynamic
    rng, lengths = np.random.default_rng(3), (90, 64, 66, 20)
    tokens = rng.integers(3, 97, (1, sum(lengths) + 4)).astype(np.int32)
    segment_ids = np.repeat((1, 2, 3, 4, 0), (*lengths, 4)).astype(np.int32)[None]
    positions = np.concatenate([np.arange(n) for n in (*lengths, 4)]).astype(np.int32)[None]
    ours = compute_logits(model, params, {'tokens': tokens, 'positions': positions, 'segment_ids': segment_ids})
    for segment in (1, 2, 3, 4):
        own = segment_ids[0] == segment
        # It keeps the longest row that it ever read in mind.
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'model', attn_implementation='eager')
        assert_close(ours[0, own], torch_logits(theirs, input_ids=tokens[:, own])[0])


def test_dynamic_frequencies_with_a_cache_are_those_of_transformers(dynamic):
    theirs, model, params = dynamic
    prompt = np.random.default_rng(4).integers(3, 97, 60).tolist()
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    import torch

    found = theirs.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 60), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    tokens, lengths = pad_prompts([prompt], 0, multiple=4)
    done = jax.jit(lambda p: sample(model, sampling, p, tokens, lengths, jax.random.split(jax.random.key(0), 1)))(
        params
    )
    assert np.asarray(done.tokens[0]).tolist() == found[0, 60:].tolist()


@pytest.mark.parametrize('kind', ['linear', 'dynamic', 'llama3', 'yarn', 'longrope', 'proportional'])
def test_older_and_newer_names_mean_the_same(kind, tmp_path):
    case = next(case for case in CASES if case.name == 'llama')
    scaling = {'factor': 2.0}
    if kind in ('llama3', 'yarn', 'longrope'):
        scaling['original_max_position_embeddings'] = 16
    scaling |= {
        'llama3': {'low_freq_factor': 1.0, 'high_freq_factor': 4.0},
        'longrope': {'short_factor': [1.0] * 4, 'long_factor': [2.0] * 4},
        'proportional': {'partial_rotary_factor': 0.5},
    }.get(kind, {})
    older = {'rope_theta': 5e5, 'rope_scaling': {'rope_type': kind, **scaling}}
    oldest = {'rope_theta': 5e5, 'rope_scaling': {'type': kind, **scaling}}
    newer = {'rope_parameters': {'rope_type': kind, 'rope_theta': 5e5, **scaling}}
    for name, fields in (('older', older), ('oldest', oldest), ('newer', newer)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text(json.dumps({**case.config, **fields}))
    ropes = {models.build(models.read_config(tmp_path / name)).config.ropes for name in ('older', 'oldest', 'newer')}
    (rope,) = set(ropes.pop())
    assert not ropes
    assert rope == make_rope(newer['rope_parameters'], 8, 64)


def test_layers_without_scaling_take_their_own_parameters(tmp_path):
    """Gemma 3's older fields, and today's by layer type."""
    fields = next(case for case in CASES if case.name == 'gemma3_text').config
    older = {'rope_theta': 1e6, 'rope_local_base_freq': 2e4, 'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}}
    newer = {
        'rope_parameters': {
            'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 2e4},
        }
    }
    (tmp_path / 'config.json').write_text(json.dumps({**fields, **older}))
    found = [models.build(models.read_config(source)).config for source in (tmp_path, {**fields, **newer})]
    assert found[0] == found[1]
    local, full = (make_rope(newer['rope_parameters'][f'{kind}_attention'], 12, 64) for kind in ('sliding', 'full'))
    assert found[0].ropes == (*[local] * 5, full)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'rope_parameters': {'full_attention': {'rope_type': 'mrope'}}}, r'rope_parameters: type=.mrope.'),
        ({'rope_parameters': {'full_attention': {'rope_type': 'linear'}}}, r'rope_parameters.*factor'),
        ({'layer_types': ['full_attention', 'chunked_attention'] * 3}, 'layer_types'),
        ({'use_bidirectional_attention': True}, 'use_bidirectional_attention'),
    ],
)
def test_what_layers_cannot_have_is_refused_by_name(fields, message):
    case = next(case for case in CASES if case.name == 'gemma3_text')
    with pytest.raises(UserError, match=message):
        models.read_config({**case.config, **fields})


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """`transformers`' LongRoPE model, ours, and its parameters."""
    pytest.importorskip('torch')
    folder = tmp_path_factory.mktemp('long')
    theirs = reference(LONG, folder)
    return theirs, *open_model(folder)


def test_a_long_document_leaves_its_neighbours_in_a_row_alone(both):
    theirs, model, params = both
    lengths = (5, 20, 7)
    tokens = np.random.default_rng(1).integers(3, 97, (2, sum(lengths) + 2)).astype(np.int32)
    segment_ids = np.repeat((1, 2, 3, 0), (*lengths, 2)).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (*lengths, 2)]).astype(np.int32)
    batch = {'tokens': tokens, 'positions': np.stack([positions] * 2), 'segment_ids': np.stack([segment_ids] * 2)}
    ours = compute_logits(model, params, batch)
    for row in range(2):
        for segment in (1, 2, 3):
            own = segment_ids == segment
            assert_close(ours[row, own], torch_logits(theirs, input_ids=tokens[row : row + 1, own])[0])


def greedy(theirs, prompt, count):
    """Greedy decoding without a cache: each token from a pass over all before it."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(torch_logits(theirs, input_ids=[ids])[0, -1].argmax()))
    return ids[len(prompt) :]


def test_completions_cross_the_border_as_without_a_cache(both):
    """Rows that cross at different steps, one that began beyond, and one that never comes there."""
    theirs, model, params = both
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 97, count).tolist() for count in (10, 15, 3, 16, 17, 1)]
    tokens, lengths = pad_prompts(prompts, 0, multiple=8)
    sampling = Sampling(max_new_tokens=14, temperature=0.0)
    keys = jax.random.split(jax.random.key(0), len(prompts))
    done = jax.jit(lambda p: sample(model, sampling, p, tokens, lengths, keys))(params)
    stream = Stream(model, sampling, params)
    for row, prompt in enumerate(prompts):
        expected = greedy(theirs, prompt, 14)
        assert np.asarray(done.tokens[row]).tolist() == expected
        assert list(stream(prompt, keys[row])) == expected


def test_beams_cross_the_border_as_without_a_cache(both):
    theirs, model, params = both
    prompts = [[5, 9, 3, 20, 21, 33, 41, 8, 60, 77], [7, 11, 90]]
    tokens, lengths = pad_prompts(prompts, 0, multiple=8)
    sampling = Sampling(max_new_tokens=15, temperature=0.0)
    found = jax.jit(lambda p: beam_search(model, sampling, p, tokens, lengths, 3))(params)
    for row, prompt in enumerate(prompts):
        beams = [((), 0.0)]
        for _ in range(15):
            logits = [torch_logits(theirs, input_ids=[[*prompt, *ids]])[0, -1] for ids, _ in beams]
            scores = [score + np.asarray(jax.nn.log_softmax(x)) for (_, score), x in zip(beams, logits, strict=True)]
            best = np.argsort(-np.concatenate(scores))[:3]
            beams = [((*beams[i // 97][0], i % 97), np.concatenate(scores)[i]) for i in best]
        assert np.asarray(found.tokens[row]).tolist() == list(beams[0][0])


def test_a_trained_prompt_counts_towards_the_border(both):
    _, model, params = both
    virtual = 0.5 * jax.random.normal(jax.random.key(4), (6, 32))
    params = {**params, 'prompt': {'embedding': virtual}}
    prompt = [5, 9, 3, 20]
    tokens, lengths = pad_prompts([prompt], 0, multiple=4)
    sampling = Sampling(max_new_tokens=16, temperature=0.0)
    run = jax.jit(lambda p: sample(model, sampling, p, tokens, lengths, jax.random.split(jax.random.key(0), 1)))
    whole = jax.jit(lambda p, b: model.logits(p, model.apply(p, b).hidden))
    ids = list(prompt)
    for _ in range(16):
        row = np.pad(ids, (0, 20 - len(ids))).astype(np.int32)
        batch = {'tokens': row[None], 'segment_ids': (np.arange(20) < len(ids)).astype(np.int32)[None]}
        ids.append(int(whole(params, batch)[0, len(ids) - 1].argmax()))
    assert np.asarray(run(params).tokens[0]).tolist() == ids[len(prompt) :]


def test_a_model_without_a_border_never_reads_again(both):
    model = models.build(models.read_config({'model_type': 'llama', **CASES[0].config}))
    assert model.border is None
    assert both[1].border == BORDER
