"""Beam search and greedy decoding against `transformers`' `generate`, and sampling of encoder-decoders."""

import os

os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import models
from jaxtune.generation.beam import beam_search
from jaxtune.generation.sampling import Sampling, pad_prompts, sample
from jaxtune.models import hf
from jaxtune.objectives.cross_entropy import token_logprobs

EOS, PAD, LIMIT = 1, 0, 14
FIELDS = {
    't5': {
        'vocab_size': 31,
        'd_model': 32,
        'd_kv': 8,
        'd_ff': 48,
        'num_layers': 2,
        'num_heads': 4,
        'decoder_start_token_id': PAD,
        'tie_word_embeddings': False,
    },
    'llama': {
        'vocab_size': 31,
        'hidden_size': 32,
        'intermediate_size': 48,
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'bos_token_id': None,
    },
}
PROMPTS = [[5, 9, 3, 1], [7, 1], [11, 12, 13, 14, 15, 16, 17, 1], [4, 4, 1], [8, 20, 1], [30, 2, 1]]


@pytest.fixture(scope='module', params=FIELDS)
def both(request, tmp_path_factory):
    """`transformers`' random model, ours, and its parameters."""
    torch = pytest.importorskip('torch')
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[request.param](**FIELDS[request.param], eos_token_id=EOS, pad_token_id=PAD)
    kind = transformers.AutoModelForSeq2SeqLM if request.param == 't5' else transformers.AutoModelForCausalLM
    torch.manual_seed(1)
    theirs = kind.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + ('norm' in name) * parameter)
    folder = tmp_path_factory.mktemp('model')
    theirs.save_pretrained(folder)
    model = models.build(models.read_config(folder))
    # What a random model ends with is left to chance; a token that it does come to, but late, ends rows in the middle.
    written = their_completion(theirs, PROMPTS[0], None, num_beams=1)
    stop = max(set(written), key=written.index)
    return theirs, model, hf.load(folder, model)[0], stop


def their_completion(theirs, prompt, stop, **how):
    import torch

    with torch.no_grad():
        ids = torch.tensor([prompt])
        start = 1 if theirs.config.is_encoder_decoder else len(prompt)
        mask = torch.ones_like(ids)
        out = theirs.generate(ids, attention_mask=mask, max_new_tokens=LIMIT, do_sample=False, eos_token_id=stop, **how)
    return out[0, start:].tolist()


def sampling(stop, **how):
    return Sampling(**{'max_new_tokens': LIMIT, 'temperature': 0.0, 'stop_ids': (stop,), 'pad_id': PAD, **how})


def completions(found):
    found = jax.tree.map(np.asarray, found)
    return [row[:length].tolist() for row, length in zip(found.tokens, found.lengths, strict=True)]


def test_greedy_equals_transformers(both):
    theirs, model, params, stop = both
    tokens, lengths = pad_prompts(PROMPTS, PAD, multiple=8)
    keys = jax.random.split(jax.random.key(0), len(PROMPTS))
    ours = completions(jax.jit(lambda p: sample(model, sampling(stop), p, tokens, lengths, keys))(params))
    assert ours == [their_completion(theirs, prompt, stop, num_beams=1) for prompt in PROMPTS]


@pytest.mark.parametrize(('beams', 'penalty'), [(4, 1.0), (4, 0.0), (3, 2.0), (1, 1.0)])
def test_beams_equal_transformers(both, beams, penalty):
    theirs, model, params, stop = both
    tokens, lengths = pad_prompts(PROMPTS, PAD, multiple=8)
    found = jax.jit(lambda p: beam_search(model, sampling(stop), p, tokens, lengths, beams, penalty))(params)
    ours = completions(found)
    if beams > 1:
        expected = [
            their_completion(theirs, prompt, stop, num_beams=beams, length_penalty=penalty, early_stopping=False)
            for prompt in PROMPTS
        ]
        assert ours == expected
        if (beams, penalty) == (4, 0.0):
            assert len({len(completion) for completion in ours}) > 1
    for row, length in enumerate(np.asarray(found.lengths)):
        assert (np.asarray(found.tokens)[row, length:] == PAD).all()
        assert (np.asarray(found.logprobs)[row, length:] == 0).all()


def test_log_probabilities_are_the_models(both):
    _, model, params, stop = both
    if model.kind != 'encdec':
        pytest.skip('tests/generation/test_sampling.py has decoders')
    tokens, lengths = pad_prompts(PROMPTS, PAD, multiple=8)
    keys = jax.random.split(jax.random.key(0), len(PROMPTS))
    drawn = jax.jit(lambda p: sample(model, sampling(stop, temperature=1.3), p, tokens, lengths, keys))(params)
    best = jax.jit(lambda p: beam_search(model, sampling(stop), p, tokens, lengths, 4))(params)
    segment_ids = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
    for found in (drawn, best):
        start = jnp.full_like(found.tokens[:, :1], model.config.start_id)
        batch = {
            'tokens': tokens,
            'segment_ids': segment_ids,
            'decoder_tokens': jnp.concatenate([start, found.tokens[:, :-1]], axis=1),
        }
        expected = token_logprobs(model.apply(params, batch).hidden, model.head(params), found.tokens)
        written = np.arange(LIMIT) < np.asarray(found.lengths)[:, None]
        np.testing.assert_allclose(np.asarray(found.logprobs)[written], np.asarray(expected)[written], atol=1e-4)
