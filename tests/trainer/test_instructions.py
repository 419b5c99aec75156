"""Instruction tuning and preferences through the trainer: 30 updates as TRL has them, and what runs leave."""

import json
import math

import jax
import numpy as np
import pytest
from runs import full_config, metrics, recipe, train

from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.loader import Loader
from jaxtune.models import hf
from jaxtune.pretrained.load import open_model
from jaxtune.tasks import specs

BYTES = tokenizers.load('bytes')
STEPS = 30
EPS = 1e-5  # what both answers share has gradients of rounding errors alone, which Adam must not scale up

LR = {'reward': 5e-4}

CASES = {
    'sft': {'objective': 'sft', 'data.packing': False},
    'reward': {'objective': 'reward', 'reward.center': 0.1},
    'sigmoid': {'objective': 'dpo'},
    'hinge': {'objective': 'dpo', 'dpo.loss': 'hinge'},
    'ipo': {'objective': 'dpo', 'dpo.loss': 'ipo'},
}


@pytest.fixture(scope='module')
def pairs(corpus, tmp_path_factory):
    """The corpus' pairs, each with a margin."""
    folder = tmp_path_factory.mktemp('pairs')
    for name in ('train', 'eval'):
        records = [json.loads(line) for line in (corpus / f'{name}.jsonl').read_text().splitlines()]
        names = ('prompt', 'completion', 'chosen', 'rejected')
        lines = [json.dumps({key: r[key] for key in names} | {'margin': i % 3 / 4}) for i, r in enumerate(records)]
        (folder / f'{name}.jsonl').write_text('\n'.join(lines) + '\n')
    return folder


def _keys(pairs, case, **changes):
    objective = CASES[case]['objective']
    keys = recipe(pairs, objective, train__steps=STEPS, train__batch_size=8, optimizer__schedule='constant', **changes)
    rate = LR.get(case, 2e-3)
    keys |= {'optimizer.lr': rate, 'optimizer.new_lr': rate, 'optimizer.weight_decay': 0.0, 'optimizer.warmup_steps': 0}
    keys['optimizer.eps'] = EPS
    return keys | {'data.eval': ''} | CASES[case]


@pytest.mark.parametrize('case', CASES)
def test_30_updates_follow_trl(pairs, tmp_path, case):
    torch, trl = pytest.importorskip('torch'), pytest.importorskip('trl')
    import transformers

    keys = _keys(pairs, case)
    config = full_config(keys)
    model, _ = open_model(specs.model_spec(config), BYTES)
    hf.save(tmp_path / 'start', model, jax.jit(model.init)(jax.random.key(1)), add_files=BYTES.save_pretrained)
    del keys['model.config'], keys['tokenizer.path']
    train(keys | {'model.path': str(tmp_path / 'start')}, tmp_path / 'run')
    ours = metrics(tmp_path / 'run', 'train/loss')

    kind = 'SequenceClassification' if case == 'reward' else 'CausalLM'
    theirs = getattr(transformers, f'AutoModelFor{kind}').from_pretrained(tmp_path / 'start', dtype=torch.float32)
    trainer = _trl_trainer(trl, case, theirs, tmp_path)
    optimizer = torch.optim.AdamW(
        theirs.parameters(), lr=LR.get(case, 2e-3), betas=(0.9, 0.999), eps=EPS, weight_decay=0.0
    )
    rows = specs.objective(config).dataset('train', BYTES, tmp_path / 'cache')
    loader = Loader(rows, 8, config.seed)
    losses = []
    for t in range(STEPS):
        loss = trainer.compute_loss(theirs, _trl_inputs(torch, case, loader.rows(t, 0, 8)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(ours[0], losses[0], rtol=1e-5)
    np.testing.assert_allclose(ours, losses, rtol=1e-3)


def _trl_trainer(trl, case, model, folder):
    import datasets

    common = {'output_dir': str(folder / 'trl'), 'report_to': [], 'use_cpu': True, 'bf16': False}
    common |= {'gradient_checkpointing': False, 'per_device_train_batch_size': 8}
    if case == 'sft':
        kind, settings = trl.SFTTrainer, trl.SFTConfig(**common)
        rows = [{'prompt': 'a', 'completion': 'b'}]
    elif case == 'reward':
        kind, settings = trl.RewardTrainer, trl.RewardConfig(center_rewards_coefficient=0.1, **common)
        rows = [{'chosen': 'a', 'rejected': 'b'}]
    else:
        kind, settings = trl.DPOTrainer, trl.DPOConfig(loss_type=[case], beta=0.1, **common)
        rows = [{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}]
    trainer = kind(
        model=model, args=settings, train_dataset=datasets.Dataset.from_list(rows * 8), processing_class=BYTES
    )
    model.train()
    return trainer


def _trl_inputs(torch, case, batch):
    """Our rows under TRL's names."""
    if case == 'sft':
        ids, weights = torch.tensor(batch['tokens']).long(), torch.tensor(batch['loss_mask'])
        labels = torch.full_like(ids, -100)
        labels[:, 1:] = torch.where(weights[:, :-1] > 0, torch.tensor(batch['targets'][:, :-1]).long(), -100)
        return {'input_ids': ids, 'attention_mask': torch.tensor(batch['segment_ids']), 'labels': labels}
    ids, masks, answers = [], [], []
    for side in ('chosen', 'rejected'):
        places = np.arange(batch[side].shape[1])[None]
        real = places < batch[f'{side}_end'][:, None]
        ids.append(np.where(real, batch[side], BYTES.pad_token_id))
        masks.append(real)
        answers.append(real & (places >= batch[f'{side}_start'][:, None]))
    inputs = {'input_ids': torch.tensor(np.concatenate(ids)).long()}
    inputs['attention_mask'] = torch.tensor(np.concatenate(masks)).long()
    if case == 'reward':
        return inputs | {'margin': torch.tensor(batch['margin'])}
    return inputs | {'completion_mask': torch.tensor(np.concatenate(answers)).long()}


@pytest.mark.parametrize('method', ['full', 'lora'])
def test_dpo_begins_at_ln_2_and_its_reference_stays(pairs, tmp_path, method):
    keys = recipe(pairs, 'dpo', train__steps=12, eval__every=4, method__name=method)
    train(keys, tmp_path)
    first = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[0])
    assert first['train/loss'] == pytest.approx(math.log(2), abs=1e-6)
    assert first['train/margin'] == pytest.approx(0.0, abs=1e-5)
    margins = metrics(tmp_path, 'eval/margin')
    assert margins[-1] > margins[0] > 0
    cached = {path.name: path.read_bytes() for path in (tmp_path / 'cache').glob('reference-*.npy')}
    assert len(cached) == 2
    # A run resumed for longer reads the same reference, though its own weights have moved.
    train(keys | {'train.steps': 14}, tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / 'cache').glob('reference-*.npy')} == cached


def test_a_reward_model_scores_the_same_in_transformers(pairs, tmp_path):
    torch = pytest.importorskip('torch')
    import transformers

    from jaxtune.objectives import reward
    from jaxtune.objectives.preferences import SIDES, stacked

    train(recipe(pairs, 'reward', train__steps=5), tmp_path)
    result = json.loads((tmp_path / 'result.json').read_text())['metrics']
    for name in ('eval/accuracy', 'eval/calibration_error', 'eval/pairs', 'eval/longer_is_better', 'eval/margin'):
        assert name in result
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'export')
    assert theirs.config.num_labels == 1
    keys = {'task': 'evaluate', 'objective': 'reward', 'model.path': str(tmp_path), 'data.seq_len': 64}
    config = full_config(keys | {'data.eval': str(pairs / 'eval.jsonl')})
    from jaxtune.parallel import make_mesh
    from jaxtune.pretrained.load import load_model

    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        parts = load_model(specs.model_spec(config), mesh)
        rows = specs.objective(config).dataset('eval', parts.tokenizer, tmp_path / 'again')
        batch = Loader(rows, len(rows), shuffle=False).rows(0, 0, len(rows))
        inputs = stacked({name: jax.numpy.asarray(value) for name, value in batch.items()}, SIDES)
        ours = np.asarray(reward.rewards(parts.model, parts.params, inputs))
    ids = np.where(np.asarray(inputs['segment_ids']) > 0, np.asarray(inputs['tokens']), theirs.config.pad_token_id)
    with torch.no_grad():
        logits = theirs(torch.tensor(ids).long(), torch.tensor(np.asarray(inputs['segment_ids'])).long()).logits[:, 0]
    np.testing.assert_allclose(ours, logits.numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ('objective', 'changes'),
    [('sft', {'model.config.max_position_embeddings': 256}), ('seq2seq', {}), ('causal_lm', {})],
)
def test_answers_before_training_and_after_are_kept(corpus, tmp_path, objective, changes):
    keys = recipe(corpus, objective, train__steps=4, eval__samples=3, generate__max_new_tokens=4) | changes
    train(keys, tmp_path / 'run')
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'samples.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [0] * 3 + [4] * 3
    assert [line['prompt'] for line in lines[:3]] == [line['prompt'] for line in lines[3:]]
    assert ('reference' in lines[0]) == (objective != 'causal_lm')
    # What is written last is what the exported model writes.
    config = full_config({'task': 'generate', 'generate.temperature': 0.0, 'generate.max_new_tokens': 4})
    from jaxtune.generation.generator import Generator
    from jaxtune.generation.prompts import Prompt
    from jaxtune.parallel import AXES, make_mesh
    from jaxtune.pretrained.load import load_model

    config.model.path = str(tmp_path / 'run')
    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        parts = load_model(specs.model_spec(config), mesh)
        if objective == 'causal_lm':
            prompts = [Prompt(line['prompt'], parts.tokenizer(line['prompt']).input_ids) for line in lines[3:]]
            made = Generator(config.generate, mesh, parts, 3)(parts.params, prompts)
            assert [text for text, _ in made] == [line['completion'] for line in lines[3:]]


def test_samples_are_for_models_that_write(corpus, tmp_path):
    from jaxtune.errors import UserError

    with pytest.raises(UserError, match=r'eval\.samples=2: expected an objective of causal_lm'):
        train(recipe(corpus, 'masked_lm', eval__samples=2), tmp_path)


@pytest.mark.parametrize('objective', ['sft', 'dpo'])
def test_a_mesh_that_cannot_divide_an_evaluated_batch(corpus, tmp_path, objective):
    from jaxtune.errors import UserError

    with pytest.raises(UserError, match=r'eval\.batch_size=3: expected a multiple of mesh\.data x mesh\.fsdp = 2'):
        train(recipe(corpus, objective, eval__batch_size=3), tmp_path, (2, 1, 1, 1))
