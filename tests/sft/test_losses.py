"""Losses as their papers and TRL have them, and packed batches as unpacked ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import models
from jaxtune.data.chat_encoder import Encoded
from jaxtune.data.examples import ExampleRows, Examples
from jaxtune.data.loader import Loader
from jaxtune.errors import UserError
from jaxtune.models import flash, flash_triton
from jaxtune.models.blockwise import Pattern, Places
from jaxtune.models.rope import rotate
from jaxtune.objectives import dpo, reward, sft
from jaxtune.parallel import AXES, make_mesh
from jaxtune.recipe import recipes
from jaxtune.tasks import specs
from jaxtune.training.evaluator import make_evaluator
from jaxtune.training.step import gradients, make_eval_step, mean

torch = pytest.importorskip('torch')
F = torch.nn.functional

LLAMA = {
    'model_type': 'llama',
    'vocab_size': 64,
    'hidden_size': 32,
    'intermediate_size': 64,
    'num_hidden_layers': 1,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 128,
}


def _settings(**changes) -> ConfigDict:
    config = recipes.defaults()
    recipes.apply_overrides(config, {name.replace('__', '.'): value for name, value in changes.items()})
    return config


@pytest.fixture(scope='module')
def numbers():
    """Log-probabilities, the reference's, lengths and weights of 6 rows; the last is padding."""
    rng = np.random.default_rng(0)
    sums, reference = -rng.uniform(3, 30, (2, 6, 3)).astype(np.float32)
    lengths = rng.integers(2, 12, (6, 3)).astype(np.float32)
    weights = np.ones((6, 2), np.float32)
    weights[5] = 0
    return sums, reference, lengths, weights


def _theirs(kind, sums, reference, lengths, beta, smooth, gamma):
    """The losses as TRL computes them, `[pairs]`."""
    c, r = (sums - reference)[:, 0], (sums - reference)[:, 1]
    if kind == 'sigmoid':
        return -F.logsigmoid(beta * (c - r)) * (1 - smooth) - F.logsigmoid(-beta * (c - r)) * smooth
    if kind == 'hinge':
        return torch.relu(1 - beta * (c - r))
    if kind == 'ipo':
        return (c / lengths[:, 0] - r / lengths[:, 1] - 1 / (2 * beta)) ** 2
    means = sums / lengths
    if kind == 'simpo':
        logits = means[:, 0] - means[:, 1] - gamma / beta
        return -F.logsigmoid(beta * logits) * (1 - smooth) - F.logsigmoid(-beta * logits) * smooth
    log_odds = means[:, 0] - means[:, 1]
    log_odds = log_odds - (torch.log1p(-torch.exp(means[:, 0])) - torch.log1p(-torch.exp(means[:, 1])))
    return -means[:, 0] - beta * F.logsigmoid(log_odds)


@pytest.mark.parametrize('smooth', [0.0, 0.2])
@pytest.mark.parametrize('kind', ['sigmoid', 'hinge', 'ipo', 'simpo', 'orpo'])
def test_losses_of_pairs_and_their_gradients(numbers, kind, smooth):
    sums, reference, lengths, weights = numbers
    settings = _settings(dpo__loss=kind, dpo__beta=0.3, dpo__label_smoothing=smooth, dpo__gamma=0.7).dpo

    def total(sums):
        return dpo.losses_of(settings, sums[:, :2], reference[:, :2], lengths[:, :2], weights)[0].sum()

    found, gradient = jax.value_and_grad(total)(jnp.asarray(sums))
    theirs = torch.tensor(sums, requires_grad=True)
    expected = _theirs(kind, theirs, torch.tensor(reference), torch.tensor(lengths), 0.3, smooth, 0.7)[:5].sum()
    expected.backward()
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_kto_measures_answers_against_mismatched_ones(numbers):
    sums, reference, lengths, weights = numbers
    sums[:, 2] = reference[:, 2] + 1.5  # a divergence above 0
    weights = weights.copy()
    weights[1, 0] = weights[3, 1] = 0  # unpaired answers
    settings = _settings(dpo__loss='kto', dpo__beta=0.3, dpo__rejected_weight=1.33).dpo

    def total(sums):
        kl = jax.lax.stop_gradient((sums - reference)[:5, 2].mean())
        return dpo.losses_of(settings, sums[:, :2], reference[:, :2], lengths[:, :2], weights, kl)[0].sum()

    found, gradient = jax.value_and_grad(total)(jnp.asarray(sums))
    theirs = torch.tensor(sums, requires_grad=True)
    ratios = theirs - torch.tensor(reference)
    kl = ratios[:5, 2].mean().detach().clamp(min=0)
    good = 1 - torch.sigmoid(0.3 * (ratios[:, 0] - kl))
    bad = 1.33 * (1 - torch.sigmoid(0.3 * (kl - ratios[:, 1])))
    expected = (good * torch.tensor(weights[:, 0]) + bad * torch.tensor(weights[:, 1])).sum()
    expected.backward()
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-5, atol=1e-6)
    assert float(kl) > 1


@pytest.fixture(scope='module')
def preferences():
    """A model, KTO's recipe, and eight rows of answers, some of them unpaired."""
    config = _settings(objective='dpo', dpo__loss='kto', dpo__beta=0.3, data__seq_len=16)
    rng = np.random.default_rng(3)
    batch = {
        name: np.zeros((8, *spec.shape), spec.dtype) for name, spec in specs.objective(config).batch_spec().items()
    }
    for side in ('chosen', 'rejected', 'mismatched'):
        batch[side][:] = rng.integers(0, 64, (8, 16))
        batch[f'{side}_start'][:], batch[f'{side}_end'][:] = 3, rng.integers(5, 16, 8)
        batch[f'{side}_weight'][:] = 1
    batch['chosen_weight'][1] = batch['rejected_weight'][[2, 5]] = 0
    model = models.build(models.read_config(LLAMA | {'initializer_range': 0.2}))
    params = jax.jit(model.init)(jax.random.key(0))
    sides = ('chosen', 'rejected', 'mismatched')
    sums = np.asarray(dpo.logprobs(model, params, batch, sides)[0])
    for number, side in enumerate(sides):
        batch[f'reference_{side}'][:] = sums[:, number] + rng.normal(-2, 4, 8)
    return config, model, params, batch, sums


def test_kto_measures_by_the_whole_batch_however_it_is_cut(preferences):
    config, model, params, batch, sums = preferences
    statistics, frozen = specs.objective(config).statistics(model), jax.tree.map(lambda _: None, preferences[2])
    loss = functools.partial(specs.objective(config).loss, model)
    kl = max(0.0, (sums[:, 2] - batch['reference_mismatched']).mean())
    assert kl > 0.5
    reference = np.stack([batch['reference_chosen'], batch['reference_rejected']], 1)
    weights = np.stack([batch['chosen_weight'], batch['rejected_weight']], 1)
    ratios = torch.tensor(sums[:, :2] - reference)
    wanted = torch.stack([torch.sigmoid(0.3 * (kl - ratios[:, 0])), torch.sigmoid(0.3 * (ratios[:, 1] - kl))], 1)
    rewards = {name: 0.3 * ratios[weights[:, i] > 0, i].mean() for i, name in enumerate(dpo.SIDES)}
    found = {}
    for accumulate in (1, 2, 4):
        grads, (total, count, metrics) = jax.jit(gradients, static_argnums=(0, 5, 6))(
            loss, params, frozen, batch, jax.random.key(0), accumulate, statistics
        )
        assert count == weights.sum() == 13
        np.testing.assert_allclose(total, (wanted * torch.tensor(weights)).sum(), rtol=1e-5)
        for name, reward_ in rewards.items():
            np.testing.assert_allclose(mean(metrics[f'reward_{name}'], count), reward_, rtol=1e-5)
        found[accumulate] = grads
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), found[1], found[2])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), found[1], found[4])

    rows = [{name: array[i] for name, array in batch.items()} for i in range(8)]
    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    for size in (8, 3):
        with jax.set_mesh(mesh):
            evaluator = make_evaluator(dpo.OBJECTIVE, mesh, rows, jax.jit(make_eval_step(loss)), size, statistics)
            scores = evaluator.run(params, frozen)
        assert scores['eval/loss'] == pytest.approx(float(total) / 13, rel=1e-5)
        assert scores['eval/reward_chosen'] == pytest.approx(float(rewards['chosen']), rel=1e-5)

    # A loss over nothing is no number, and neither is a mean of rejected answers where there are none.
    alone = [row | {'rejected_weight': np.float32(0)} for row in rows]
    loaders = {'': Loader(alone, 8, shuffle=False)}
    assert 'eval/reward_rejected' not in dataclasses.replace(evaluator, loaders=loaders).run(params, frozen)
    nothing = [row | {'chosen_weight': np.float32(0)} for row in alone]
    with pytest.raises(UserError, match=r'data.eval: none of its pairs is scored.*expected'):
        dataclasses.replace(evaluator, loaders={'': Loader(nothing, 8, shuffle=False)}).run(params, frozen)


@pytest.mark.parametrize(('center', 'smooth'), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.2)])
def test_bradley_terry_with_margins_and_centering(center, smooth):
    rng = np.random.default_rng(1)
    chosen, rejected, margin = rng.normal(size=(3, 7)).astype(np.float32)
    settings = _settings(reward__center=center, reward__label_smoothing=smooth).reward
    losses, _ = reward.pair_losses(settings, jnp.asarray(chosen), jnp.asarray(rejected), jnp.asarray(margin))
    c, r, m = map(torch.tensor, (chosen, rejected, margin))
    expected = -(1 - smooth) * F.logsigmoid(c - r - m) - smooth * F.logsigmoid(-(c - r - m)) + center * (c + r) ** 2
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-5)


def test_calibration_error_of_known_confidences():
    # Two pairs at 0.73 of which one is right, two at 0.95 of which both are: (|2 * 0.73 - 1| + |2 * 0.95 - 2|) / 4.
    difference = np.log(np.asarray([0.73 / 0.27, 0.27 / 0.73, 0.95 / 0.05, 0.95 / 0.05], np.float32))
    sums = {name: float(value.sum()) for name, value in reward.calibration(jnp.asarray(difference)).items()}
    found = reward.summarise(sums | {'accuracy': 3.0}, 4)
    assert found['accuracy'] == 0.75
    assert found['calibration_error'] == pytest.approx((0.46 + 0.1) / 4, abs=1e-5)


@pytest.fixture(scope='module')
def examples():
    """Prompts and answers of many lengths."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(12):
        size = int(rng.integers(4, 30))
        trained = np.arange(size) >= rng.integers(1, size - 1)
        if size > 20:
            trained[5:9] = True  # several turns
        made.append(Encoded(rng.integers(0, 64, size).astype(np.int32), trained))
    return Examples.of(made)


def _batch(rows):
    return {name: np.stack([rows[i][name] for i in range(len(rows))]) for name in rows[0]}


def test_packing_keeps_every_trained_token(examples):
    packed, single = (_batch(ExampleRows(examples, 32, packing)) for packing in (True, False))
    assert len(packed['tokens']) < len(single['tokens'])
    for batch in (packed, single):
        assert batch['loss_mask'].sum() == sum(one.assistant_mask[1:].sum() for one in (examples[i] for i in range(12)))
        # The token that a scored position predicts is the next one of the same example.
        row, at = np.nonzero(batch['loss_mask'])
        np.testing.assert_array_equal(batch['targets'][row, at], batch['tokens'][row, at + 1])
        np.testing.assert_array_equal(batch['segment_ids'][row, at], batch['segment_ids'][row, at + 1])


@pytest.mark.parametrize('implementation', ['xla', 'reference', 'splash', 'triton'])
def test_packed_and_unpacked_give_the_same_loss_and_gradients(examples, implementation, monkeypatch):
    """cuDNN's kernel alone is not among them: it needs a GPU, and takes no packed rows."""
    fields = models.read_config(LLAMA)
    model = models.build(fields, remat='full' if implementation == 'xla' else 'none', attention='xla')
    if implementation != 'xla':
        import jaxtune.models.decoder as decoder

        kernels = {'reference': _plain_attention, 'splash': _splash, 'triton': _triton}
        monkeypatch.setattr(decoder, 'attention', kernels[implementation])
    length = 128 if implementation == 'splash' else 32  # the kernel's smallest block
    params = jax.jit(model.init)(jax.random.key(0))
    config = _settings()
    key = jax.random.key(0)  # None would be evaluation
    step = jax.value_and_grad(lambda params, batch: sft.loss(config.sft, model, params, batch, key)[0])
    packed, single = (_batch(ExampleRows(examples, length, packing)) for packing in (True, False))
    # Rows of padding keep the shape, and so the program, the same.
    rows = len(single['tokens']) - len(packed['tokens'])
    packed = {name: np.pad(value, ((0, rows), (0, 0))) for name, value in packed.items()}
    step = jax.jit(step)
    (one, one_gradient), (other, other_gradient) = step(params, packed), step(params, single)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one_gradient), jax.tree.leaves(other_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def _splash(q, k, v, *, q_positions, k_positions, q_segment_ids, k_segment_ids, scale, **_):
    places = Places(q_positions, k_positions, q_segment_ids, k_segment_ids)
    pattern = Pattern(scale=scale, budget=2**21)
    kernel = flash.splash_kernel(q.shape[2], q.shape[1], 1, pattern, interpret=True)
    return flash.splash(q, k, v, places, pattern, None, kernel)


def _triton(q, k, v, *, q_positions, k_positions, q_segment_ids, k_segment_ids, scale, angles, **_):
    places = Places(q_positions, k_positions, q_segment_ids, k_segment_ids)
    pattern = Pattern(scale=scale, budget=2**21)
    return flash_triton.triton(rotate(q, angles), rotate(k, angles), v, places, pattern, interpret=True)


def _plain_attention(q, k, v, *, q_positions, k_positions, q_segment_ids, k_segment_ids, scale, **_):
    """Attention as its formula has it: all scores at once."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum('bqhd,bkhd->bhqk', q, k) * scale
    seen = (q_segment_ids[:, :, None] == k_segment_ids[:, None]) & (q_positions[:, :, None] >= k_positions[:, None])
    scores = jnp.where(seen[:, None], scores, -1e30)
    return jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(scores), v)


@pytest.mark.parametrize('key', [None, jax.random.key(0)], ids=['evaluation', 'training'])
def test_only_answers_are_scored(examples, key):
    model = models.build(models.read_config(LLAMA))
    params = jax.jit(model.init)(jax.random.key(0))
    batch = _batch(ExampleRows(examples, 32, False))
    total, count, metrics = sft.loss(_settings().sft, model, params, batch, key)
    logits = model.logits(params, model.apply(params, batch).hidden)
    labels = torch.tensor(np.where(batch['loss_mask'] > 0, batch['targets'], -100)).long()
    expected = F.cross_entropy(torch.tensor(np.asarray(logits)).flatten(0, 1), labels.flatten(), reduction='sum')
    np.testing.assert_allclose(total, expected.numpy(), rtol=1e-5)
    assert count == batch['loss_mask'].sum()
    right = (np.asarray(logits).argmax(-1) == batch['targets']) * batch['loss_mask']
    assert metrics['accuracy'] == right.sum()


def test_exact_answers_are_those_that_greedy_decoding_repeats(examples):
    model = models.build(models.read_config(LLAMA))
    params = jax.tree.map(lambda leaf: 8 * leaf, jax.jit(model.init)(jax.random.key(0)))
    single = _batch(ExampleRows(examples, 32, False))
    logits = jax.jit(lambda batch: model.logits(params, model.apply(params, batch).hidden))
    # Some examples are made what the model itself goes on with, so that it repeats them.
    for row in range(0, len(single['tokens']), 2):
        for at in np.flatnonzero(single['loss_mask'][row]):
            batch = {name: value[row : row + 1] for name, value in single.items()}
            chosen = int(logits(batch)[0, at].argmax())
            single['targets'][row, at] = single['tokens'][row, at + 1] = chosen
    _, count, sums = sft.loss(_settings().sft, model, params, single, None)
    found = sft.summarise({name: float(value) for name, value in sums.items()}, float(count))
    right = np.asarray(logits(single)).argmax(-1) == single['targets']
    exact = [row[scored > 0].all() for row, scored in zip(right, single['loss_mask'], strict=True) if scored.any()]
    assert found['exact_match'] == pytest.approx(np.mean(exact))
    assert 0.5 <= found['exact_match'] < 1
    # Several answers in a row are counted one by one.
    rows = [
        jax.tree.map(lambda *parts: np.concatenate(parts)[None], *({k: v[i] for k, v in single.items()} for i in pair))
        for pair in ((0, 1), (2, 3))
    ]
    paired = {name: np.concatenate([row[name] for row in rows]) for name in single}
    paired['segment_ids'][:, 32:] *= 2 * (paired['segment_ids'][:, 32:] > 0)
    sums = sft.loss(_settings().sft, model, params, paired, None)[2]
    assert (float(sums['answers']), float(sums['exact_match'])) == (4.0, float(sum(exact[:4])))


def test_neftune_is_uniform_within_its_bound_and_off_in_evaluation(examples):
    batch = _batch(ExampleRows(examples, 32, True))
    noise = np.asarray(sft.neftune(jax.random.key(0), jnp.asarray(batch['segment_ids']), 32, 5.0))
    for row, segment_ids in enumerate(batch['segment_ids']):
        for segment in set(segment_ids.tolist()):
            found = noise[row, segment_ids == segment]
            bound = 5.0 / np.sqrt(len(found) * 32) if segment else 0.0
            assert np.abs(found).max() <= bound
            if segment and found.size > 200:
                assert found.std() == pytest.approx(bound / np.sqrt(3), rel=0.15)
    model = models.build(models.read_config(LLAMA))
    params = jax.jit(model.init)(jax.random.key(0))
    losses = [
        float(sft.loss(_settings(sft__neftune_alpha=alpha).sft, model, params, batch, rng)[0])
        for alpha, rng in ((0.0, None), (5.0, None), (5.0, jax.random.key(1)))
    ]
    assert losses[0] == losses[1] != losses[2]
