"""Reinforcement learning as a whole: what it does to the reward, to frozen weights, on meshes, and when it goes on."""

import json

import jax
import numpy as np
import pytest
from runs import exported, full_config, metrics, recipe, train

from jaxtune import main
from jaxtune.errors import UserError
from jaxtune.generation.prompts import Prompt, read_prompts
from jaxtune.models import value_head
from jaxtune.models.model import leaf_paths
from jaxtune.parallel import AXES, make_mesh
from jaxtune.pretrained.load import load_model
from jaxtune.recipe.flags import Command
from jaxtune.rl.packing import RolloutPacker
from jaxtune.rl.policy import per_token_logps
from jaxtune.rl.reward_process import call
from jaxtune.rl.rollouts import Sampler
from jaxtune.tasks import rewarded, specs
from jaxtune.tasks.export import from_checkpoint
from jaxtune.training.trainer import Trainer
from jaxtune.weights.tree import combine

NEW = 12


def rl_recipe(corpus, task: str, **changes) -> dict:
    keys = recipe(corpus, 'causal_lm', train__steps=4, train__batch_size=8)
    keys |= {'task': task, 'data.format': 'prompt', 'data.seq_len': 48, 'optimizer.schedule': 'constant'}
    keys |= {'optimizer.lr': 1e-3, 'optimizer.warmup_steps': 0, 'generate.max_new_tokens': NEW}
    keys |= {'generate.batch_size': 8, 'rl.rollouts': 16, 'rl.group': 4, 'rl.epochs': 2, 'rl.reward': 'scores:letters'}
    return keys | {name.replace('__', '.'): x for name, x in changes.items()}


def mesh_of(sizes=(1, 1, 1, 1)):
    return make_mesh(dict(zip(AXES, sizes, strict=False)), jax.devices()[: int(np.prod(sizes))])


def go(keys: dict, workdir, sizes=(1, 1, 1, 1)) -> tuple[dict, Trainer]:
    """Trains; returns `result.json`'s content and the trainer."""
    config, mesh = full_config(keys), mesh_of(sizes)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / 'config.json').write_text(json.dumps(config.to_dict()))
    with jax.set_mesh(mesh):
        command = Command('recipe.py', workdir, False, {'': config}, ('jaxtune',))
        run, first_lines, last_lines = rewarded.open_trainer(config, workdir, mesh, command)
        return run.run(first_lines, last_lines), run


def samples(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'samples.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('task', ['grpo', 'ppo'])
def test_the_reward_rises(corpus, tmp_path, task):
    steps = 24
    changes = {'train.steps': steps, 'rl.rollouts': 64, 'rl.kl_coef': 0.0, 'optimizer.lr': 4e-3, 'eval.every': steps}
    result, _ = go(rl_recipe(corpus, task) | changes | {'train.batch_size': 32, 'generate.batch_size': 32}, tmp_path)
    # A policy that knows nothing writes an e in one of 259 places: 0.05 an answer.
    sampled = metrics(tmp_path, f'{task}/reward')
    assert sampled[0] < 0.2
    assert np.mean(sampled[-3:]) > sampled[0] + 0.5
    rewards = metrics(tmp_path, 'eval/reward')
    assert len(rewards) == 2
    assert rewards[1] > rewards[0]
    assert result['task'] == task
    assert result['metrics']['eval/reward'] == rewards[1]
    lines = samples(tmp_path)
    assert [line['step'] for line in lines] == sorted(line['step'] for line in lines)
    assert {line['step'] for line in lines} == {0, steps}
    assert [line['prompt'] for line in lines if line['step']] == [x['prompt'] for x in lines if not x['step']]
    assert all(line['score'] == line['completion'].count('e') for line in lines)
    at_end = [line['score'] for line in lines if line['step'] == steps]
    assert rewards[1] == pytest.approx(np.mean(at_end))
    assert 'reward' in (tmp_path / 'report.html').read_text()


@pytest.mark.parametrize('task', ['grpo', 'ppo'])
def test_the_policy_is_the_reference_at_first_and_one_run_is_like_another(corpus, tmp_path, task):
    keys = rl_recipe(corpus, task, eval__every=2, seed=1)
    go(keys, tmp_path / 'whole')
    away = metrics(tmp_path / 'whole', f'{task}/kl')
    assert away[0] == 0.0
    assert away[-1] != 0.0
    go(keys | {'train.steps': 2}, tmp_path / 'cut')
    go(keys, tmp_path / 'cut')
    assert exported(tmp_path / 'cut') == exported(tmp_path / 'whole')
    assert samples(tmp_path / 'cut') == samples(tmp_path / 'whole')
    names = ('train/loss', 'train/grad_norm', 'eval/reward', f'{task}/reward', f'{task}/kl')
    assert all(metrics(tmp_path / 'cut', name) == metrics(tmp_path / 'whole', name) for name in names)


@pytest.mark.parametrize('changes', [{}, {'rl.skip_equal': True}], ids=['', 'skip_equal'])
def test_steps_without_a_signal_move_nothing_and_say_so(corpus, tmp_path, capsys, changes):
    keys = rl_recipe(corpus, 'grpo', rl__reward='scores:alike', train__steps=5, data__eval='') | changes
    keys |= {'optimizer.lr': 0.1, 'rl.kl_coef': 0.05, 'optimizer.weight_decay': 0.1}
    _, run = go(keys, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, run.task.reference, run.state['trainable'])
    fresh = run.program.init_state(run.task.reference)  # the optimizer's state has not moved either
    jax.tree.map(np.testing.assert_array_equal, fresh, run.state)
    assert metrics(tmp_path, 'train/grad_norm') == metrics(tmp_path, 'grpo/kl') == [0.0] * 5
    assert metrics(tmp_path, 'grpo/frac_reward_zero_std') == [1.0] * 5
    assert metrics(tmp_path, 'grpo/learnt_share') == [0.0] * 5
    lines = [line for line in capsys.readouterr().out.splitlines() if 'no signal' in line]
    assert [line.count('are all worth the same, 0.7') for line in lines] == [1, 1, 1]
    assert ['3 steps in a row; expected a reward' in line for line in lines] == [False, False, True]


def test_equal_groups_are_left_out_of_the_updates(corpus, tmp_path):
    """What is learnt is what the other answers alone teach: their rows, their mean."""
    keys = rl_recipe(corpus, 'grpo', rl__reward='scores:common', train__steps=2, data__eval='', rl__kl_coef=0.0)
    keys |= {'train.batch_size': 16, 'rl.epochs': 1}
    for name, changes in (('all', {}), ('skip', {'rl.skip_equal': True})):
        go(keys | changes, tmp_path / name)
    shares = {name: metrics(tmp_path / name, 'grpo/learnt_share') for name in ('all', 'skip')}
    equal = metrics(tmp_path / 'skip', 'grpo/frac_reward_zero_std')
    assert 0 < equal[0] < 1
    assert shares['all'] == [1.0, 1.0]
    assert shares['skip'] == pytest.approx([1 - share for share in equal])
    norms = {name: metrics(tmp_path / name, 'train/grad_norm')[0] for name in ('all', 'skip')}
    # Equal groups add nothing to the sum; left out, they do not count in the mean either.
    assert norms['skip'] * shares['skip'][0] == pytest.approx(norms['all'], rel=1e-3)


@pytest.mark.parametrize('sizes', [(1, 1, 1, 1), pytest.param((2, 2, 1, 1), marks=pytest.mark.exhaustive)], ids=str)
def test_equal_groups_are_replaced_by_answers_to_other_prompts(corpus, tmp_path, sizes):
    """At most so many rounds, and as well when the run stops between steps."""
    keys = rl_recipe(corpus, 'grpo', rl__reward='scores:common', train__steps=2, data__eval='', rl__skip_equal=True)
    lacking, learnt = {}, {}
    for rounds in (0, 1, 8):
        go(keys | {'rl.resample': rounds}, tmp_path / str(rounds), sizes)
        lacking[rounds] = metrics(tmp_path / str(rounds), 'grpo/frac_reward_zero_std')
        learnt[rounds] = metrics(tmp_path / str(rounds), 'grpo/learnt_share')
    assert lacking[0][0] > 0
    assert lacking[8] == [0.0, 0.0]
    assert lacking[8][0] <= lacking[1][0] <= lacking[0][0]
    assert learnt[8] == [1.0, 1.0]
    asked = metrics(tmp_path / '8', 'grpo/resampled')
    assert asked[0] >= round(4 * lacking[0][0])
    assert metrics(tmp_path / '1', 'grpo/resampled')[0] == round(4 * lacking[0][0])
    # The reward is that of the prompts as they were drawn.
    assert metrics(tmp_path / '8', 'grpo/reward')[0] == metrics(tmp_path / '0', 'grpo/reward')[0]
    go(keys | {'rl.resample': 8, 'train.steps': 1}, tmp_path / 'cut', sizes)
    go(keys | {'rl.resample': 8}, tmp_path / 'cut', sizes)
    assert exported(tmp_path / 'cut') == exported(tmp_path / '8')


def test_without_a_penalty_there_is_no_reference_and_one_update_needs_no_scores(corpus, tmp_path):
    """A step of one update learns the same whether its answers are scored before or not."""
    keys = rl_recipe(corpus, 'grpo', train__steps=2, data__eval='', rl__kl_coef=0.0)
    keys |= {'rl.epochs': 1, 'train.batch_size': 16}
    _, run = go(keys, tmp_path / 'grpo')
    assert run.task.reference is None
    assert run.task.algorithm.one_update
    assert not metrics(tmp_path / 'grpo', 'grpo/kl')
    assert metrics(tmp_path / 'grpo', 'grpo/clip_fraction') == [0.0, 0.0]
    assert metrics(tmp_path / 'grpo', 'grpo/approx_kl') == [0.0, 0.0]
    occupancy = metrics(tmp_path / 'grpo', 'grpo/occupancy')
    assert all(0 < share <= 1 for share in occupancy)


@pytest.mark.parametrize('task', ['grpo', 'ppo'])
def test_the_samplers_log_probabilities_serve_as_well_as_scores(corpus, tmp_path, monkeypatch, task):
    """With a temperature; accelerators, which round factors, score the answers: the run is the same."""
    keys = rl_recipe(corpus, task, train__steps=2, data__eval='', generate__temperature=0.7)
    go(keys, tmp_path / 'sampled')
    monkeypatch.setattr('jaxtune.rl.scoring.samples_as_it_trains', lambda model: False)
    go(keys, tmp_path / 'scored')
    for name in ('train/loss', 'train/grad_norm', f'{task}/entropy', f'{task}/clip_fraction'):
        found = [metrics(tmp_path / which, name) for which in ('sampled', 'scored')]
        np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-5, err_msg=name)


def test_several_rewards_are_summed_and_logged_apart(corpus, tmp_path):
    keys = rl_recipe(corpus, 'grpo', train__steps=2, eval__every=2)
    keys['rl.reward'] = 'scores:letters:2.0,length:0.5,exact'
    keys |= {'rl.length_target': 8, 'rl.missing_eos_penalty': 0.25}
    result, _ = go(keys, tmp_path)
    parts = {name: metrics(tmp_path, f'grpo/reward/{name}') for name in ('letters', 'length', 'exact')}
    cut = [1 - share for share in metrics(tmp_path, 'grpo/eos_rate')]
    for step, reward in enumerate(metrics(tmp_path, 'grpo/reward')):
        letters, length, exact = (parts[name][step] for name in ('letters', 'length', 'exact'))
        assert reward == pytest.approx(2 * letters + 0.5 * length + exact - 0.25 * cut[step], rel=1e-5)
    assert 0 < parts['length'][0] < 1
    for line in samples(tmp_path):
        assert set(line['scores']) == {'letters', 'length', 'exact'}
        assert line['scores']['letters'] == line['completion'].count('e')
    assert result['metrics']['eval/reward/letters'] == pytest.approx(
        np.mean([line['scores']['letters'] for line in samples(tmp_path) if line['step'] == 2])
    )
    assert 'Reward: letters' in (tmp_path / 'report.html').read_text()


@pytest.mark.parametrize('evaluates', [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_a_reward_that_fails_loses_no_update(corpus, tmp_path, monkeypatch, evaluates):
    """The state before the step that failed is saved; mended, the run goes on and ends as if nothing had been."""
    keys = rl_recipe(corpus, 'grpo', train__steps=4, rl__reward='scores:fails_once')
    keys |= {'eval.every': 3, 'checkpoint.every': 4} if evaluates else {'data.eval': ''}
    go(keys, tmp_path / 'whole')
    # Calls before the one that fails: two steps; or an evaluation of two batches, three steps, a batch.
    monkeypatch.setenv('FAILS_AT_CALL', '6' if evaluates else '2')
    with pytest.raises(UserError, match=r'scores.py:\d+: ValueError: now; it fails on the answer'):
        go(keys, tmp_path / 'failed')
    saved = sorted(int(path.name) for path in (tmp_path / 'failed' / 'checkpoints').iterdir() if path.name.isdigit())
    assert saved == [3 if evaluates else 2]
    monkeypatch.delenv('FAILS_AT_CALL')
    go(keys, tmp_path / 'failed')
    assert exported(tmp_path / 'failed') == exported(tmp_path / 'whole')


FAMILY = {
    'dr_grpo': {'rl.advantage': 'group_mean', 'rl.normalise': 'constant', 'rl.kl_coef': 0.0},
    'dapo': {'rl.normalise': 'token', 'rl.clip_high': 0.28, 'rl.skip_equal': True, 'rl.overlong': 'soft'},
    'gspo': {'rl.ratio': 'sequence', 'rl.clip': 3e-4, 'rl.clip_high': 4e-4},
    'rloo': {'rl.advantage': 'leave_one_out', 'rl.kl_in': 'reward', 'rl.normalise': 'constant'},
    'entropy': {'rl.entropy_coef': 0.01, 'rl.dual_clip': 3.0, 'rl.kl': 'k2'},
    'values': {'rl.advantage': 'gae'},
}


@pytest.mark.parametrize('name', [n if n == 'gspo' else pytest.param(n, marks=pytest.mark.exhaustive) for n in FAMILY])
def test_each_of_the_family_learns_on_a_mesh_what_one_device_does(corpus, tmp_path, name):
    keys = rl_recipe(corpus, 'grpo', train__steps=2, data__eval='') | FAMILY[name]
    go(keys, tmp_path / 'one')
    go(keys, tmp_path / 'mesh', (1, 2, 2, 2))
    for metric in ('train/loss', 'train/grad_norm', 'grpo/entropy', 'grpo/reward'):
        one, mesh = metrics(tmp_path / 'one', metric), metrics(tmp_path / 'mesh', metric)
        np.testing.assert_allclose(one, mesh, rtol=2e-3, atol=1e-4, err_msg=metric)


@pytest.mark.parametrize('sizes', [(8, 1, 1, 1), (1, 2, 2, 2)])
@pytest.mark.parametrize('task', ['grpo', 'ppo'])
def test_a_mesh_learns_what_one_device_does(corpus, tmp_path, task, sizes):
    keys = rl_recipe(corpus, task, train__steps=2)
    go(keys, tmp_path / 'one')
    go(keys, tmp_path / 'mesh', sizes)
    at_start = [[line for line in samples(tmp_path / name) if not line['step']] for name in ('one', 'mesh')]
    assert at_start[0] == at_start[1]
    for name in ('train/loss', 'train/grad_norm', f'{task}/entropy', f'{task}/reward'):
        one, mesh = metrics(tmp_path / 'one', name), metrics(tmp_path / 'mesh', name)
        np.testing.assert_allclose(one, mesh, rtol=2e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    'changes',
    [
        {'train.accumulate': 2},
        pytest.param({'train.accumulate': 8}, marks=pytest.mark.exhaustive),
        {'data.packing': False},
    ],
    ids=str,
)
def test_micro_batches_and_packing_change_nothing(corpus, tmp_path, changes):
    keys = rl_recipe(corpus, 'ppo', train__steps=2)
    go(keys, tmp_path / 'one')
    go(keys | changes, tmp_path / 'cut')
    for name in ('train/loss', 'train/grad_norm'):
        np.testing.assert_allclose(metrics(tmp_path / 'one', name), metrics(tmp_path / 'cut', name), rtol=2e-3)


@pytest.fixture(scope='module')
def base(corpus, tmp_path_factory):
    """The workdir of a small pretrained policy."""
    workdir = tmp_path_factory.mktemp('policy') / 'base'
    train(recipe(corpus, 'causal_lm', train__steps=4), workdir)
    return workdir


@pytest.fixture(scope='module')
def judge(corpus, base, tmp_path_factory):
    """The workdir of a reward model."""
    workdir = tmp_path_factory.mktemp('judge') / 'reward'
    keys = recipe(corpus, 'reward', train__steps=4, data__template='plain')
    train({name: x for name, x in keys.items() if name != 'model.config'} | {'model.path': str(base)}, workdir)
    return workdir


def pretrained(corpus, base, task, **changes) -> dict:
    keys = rl_recipe(corpus, task, **changes)
    del keys['model.config'], keys['tokenizer.path']
    return keys | {'model.path': str(base)}


@pytest.mark.parametrize('method', ['lora', 'qlora', 'adapter', 'prompt'])
@pytest.mark.parametrize('task', ['grpo', 'ppo'])
def test_added_methods_leave_the_base_alone(corpus, base, tmp_path, task, method):
    keys = pretrained(corpus, base, task, method__name=method, method__rank=4, train__steps=2, data__eval='')
    keys |= {'method.virtual_tokens': 4, 'method.block_size': 16}
    config, mesh = full_config(keys | {'objective': 'causal_lm'}), mesh_of()
    with jax.set_mesh(mesh):
        before = leaf_paths(load_model(specs.model_spec(config), mesh).params)
    _, run = go(keys, tmp_path)
    after = leaf_paths(combine(run.state['trainable'], run.task.frozen))
    assert metrics(tmp_path, f'{task}/kl')[0] == 0.0
    assert (value_head.NAME in run.state['trainable']) == (task == 'ppo')
    assert after.keys() == before.keys()
    frozen = leaf_paths(run.task.frozen)
    kept = {path for path in frozen if jax.tree.leaves(frozen[path])}
    for path in kept:
        old = jax.tree.leaves(jax.tree.map(lambda a, b: None if b is None else a, before[path], frozen[path]))
        for ours, theirs in zip(jax.tree.leaves(frozen[path]), old, strict=False):
            assert ours.shape != theirs.shape or np.array_equal(ours, theirs), path
    assert (tmp_path / 'adapter').is_dir()
    assert (tmp_path / 'export').is_dir() == (method in ('lora', 'qlora'))


def test_the_exported_policy_loads_in_transformers_without_the_value_head(corpus, base, tmp_path):
    from transformers import AutoModelForCausalLM

    _, run = go(pretrained(corpus, base, 'ppo', train__steps=1), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'export')
    ours = leaf_paths(run.state['trainable'])
    assert {'value/kernel', 'value/bias'} < set(ours)
    embedding = theirs.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(embedding, ours['embed_tokens/embedding'])
    with jax.set_mesh(mesh_of()):
        parts, step = from_checkpoint(tmp_path, mesh_of())
    assert step == 1
    np.testing.assert_array_equal(parts.params['value']['kernel'], ours['value/kernel'])


def test_the_samplers_log_probabilities_are_the_training_ones(corpus, base):
    config, mesh = full_config(pretrained(corpus, base, 'grpo') | {'objective': 'causal_lm'}), mesh_of()
    with jax.set_mesh(mesh):
        parts = load_model(specs.model_spec(config), mesh)
        prompts = read_prompts(specs.prompt_spec(config, limit=48), parts, fitting=True, split='train')[:8]
        empty = jax.tree.map(lambda _: None, parts.params)
        made = Sampler(config.generate, mesh, parts, prompts, 48, config.seed)(parts.params, empty, prompts, 0)
        rows = RolloutPacker(made, np.arange(8), 48, True)
        found = rows.gather(np.asarray(per_token_logps(parts.model, parts.params, rows.fields(), 1.0)[0]))
    np.testing.assert_allclose(found, made.logprobs, rtol=1e-4, atol=1e-5)
    for row in range(8):
        assert found[row].astype(bool).sum() == made.end[row] - made.start[row]
        assert parts.tokenizer.decode(made.tokens[row, : made.start[row]]) == prompts[row].text


def test_a_reward_model_scores_as_it_does_in_transformers(corpus, base, judge):
    import torch
    from transformers import AutoModelForSequenceClassification

    config, mesh = full_config(pretrained(corpus, base, 'ppo', rl__reward=str(judge))), mesh_of((4, 1, 1, 1))
    prompts = [Prompt(text, []) for text in ('the quick? ', 'home to their? ', 'a lazy dog? ', 'seven? ', 'geese? ')]
    answers = ['brown fox home', '', 'nest', 'grey geese fly home to their warm nest and more', 'x']
    with jax.set_mesh(mesh):
        reward = rewarded.reward(config, mesh).score
        found = reward(prompts, answers)
    theirs = AutoModelForSequenceClassification.from_pretrained(judge / 'export')
    for prompt, answer, score in zip(prompts, answers, found, strict=True):
        text = prompt.text + answer + reward.tokenizer.eos_token
        ids = reward.tokenizer(text, add_special_tokens=False, return_tensors='pt').input_ids
        with torch.no_grad():
            np.testing.assert_allclose(score, theirs(ids).logits[0, 0].item(), rtol=1e-4, atol=1e-5)


def test_from_a_reward_model_to_a_policy(corpus, base, judge, tmp_path):
    keys = pretrained(corpus, base, 'ppo', rl__reward=str(judge), rl__missing_eos_penalty=1.5, eval__every=2)
    result, _ = go(keys, tmp_path)
    assert np.isfinite(list(result['metrics'].values())).all()
    config, mesh = full_config(keys), mesh_of()
    with jax.set_mesh(mesh):
        reward = rewarded.reward(config, mesh).score
        lines = samples(tmp_path)
        plain = reward([Prompt(line['prompt'], []) for line in lines], [line['completion'] for line in lines])
    taken = plain - np.asarray([line['score'] for line in lines])
    assert set(np.round(taken, 3)) <= {0.0, 1.5}
    assert (np.round(taken, 3) == 1.5).any()


@pytest.mark.parametrize(
    'function',
    [
        lambda prompts, completions, references: (prompts, completions, references),
        lambda completions, references, prompts: (prompts, completions, references),
        lambda p, c, r: (p, c, r),
        lambda *all_three: all_three,
        lambda p, c: (p, c, ['x']),
        lambda completions, **rest: (rest['prompts'], completions, rest['references']),
        lambda completions, prompts: (prompts, completions, ['x']),
    ],
)
def test_a_function_gets_what_it_asks_for(function):
    given = {'prompts': ['a'], 'completions': ['b'], 'references': ['x']}
    assert tuple(call(function, given)) == (['a'], ['b'], ['x'])


WRONG = [
    ({'rl.reward': ''}, ("rl.reward='': expected a reward model's workdir",)),
    ({'rl.reward': 'scores:gone'}, ('rl.reward=scores:gone', 'expected module:function')),
    ({'rl.reward': 'no_such_module:f'}, ('rl.reward=no_such_module:f', 'expected module:function')),
    ({'rl.reward': 'scores:number'}, ('rl.reward=scores:number', 'expected a function, found int')),
    ({'rl.reward': 'scores:one'}, ('rl.reward=scores:one', 'returned 1 numbers for 8', 'expected one each')),
    ({'rl.reward': 'scores:nothing'}, ('rl.reward=scores:nothing', 'returned nan', 'expected finite numbers')),
    ({'rl.reward': 'scores:fails'}, ('rl.reward=scores:fails', 'scores.py:', 'ZeroDivisionError')),
    (
        {'rl.advantage': 'gae', 'rl.ratio': 'sequence'},
        ('rl.ratio=sequence: expected token with rl.advantage=gae',),
    ),
    (
        {'rl.normalise': 'token', 'rl.ratio': 'sequence'},
        ('rl.normalise=token: expected answer with rl.ratio=sequence',),
    ),
    ({'rl.kl': 'k1'}, ('rl.kl=k1: expected k2 or k3 with rl.kl_in=loss',)),
    ({'rl.advantage': 'gae', 'rl.skip_equal': True}, ('rl.skip_equal=True: expected False',)),
    ({'rl.dual_clip': 1.1}, ('rl.dual_clip=1.1: expected 0 = off, or more than',)),
    ({'rl.overlong_buffer': 13}, ('rl.overlong_buffer=13: expected at most generate.max_new_tokens=12',)),
    ({'rl.rollouts': 12}, ('rl.rollouts=12: expected a multiple of train.batch_size=8',)),
    ({'rl.rollouts': 16, 'rl.group': 3}, ('rl.rollouts=16: expected a multiple of rl.group=3',)),
    (
        {'generate.batch_size': 6},
        ('generate.batch_size=6: expected a multiple of mesh.data x mesh.fsdp = 4',),
    ),
    ({'generate.temperature': 0.0}, ('generate.temperature=0: expected more',)),
    ({'generate.top_k': 5}, ('generate.top_k=5: expected 0',)),
    ({'generate.max_new_tokens': 48}, ('generate.max_new_tokens=48: expected less than data.seq_len=48',)),
    ({'data.train': ''}, ("data.train='': expected the prompts",)),
    ({'data.seq_len': 16}, ('data.train=', 'holds no prompt of at most 16 tokens with generate.max_new_tokens=12')),
    (
        {'eval.metric': 'eval/accuracy', 'eval.every': 1},
        ("eval.metric='eval/accuracy'", 'expected one of', 'eval/reward'),
    ),
]


@pytest.mark.parametrize(
    ('changes', 'expected'), WRONG, ids=lambda value: ' '.join(value) if type(value) is dict else ''
)
def test_what_is_wrong_is_said_in_a_line(corpus, tmp_path, capsys, changes, expected):
    from runs import write_recipe

    keys = rl_recipe(corpus, 'grpo', mesh__data=4, mesh__tensor=2) | changes
    path = write_recipe(tmp_path / 'recipe.py', keys)
    status = main.main(['jaxtune', '--config', str(path), '--workdir', str(tmp_path / 'run')])
    errors = capsys.readouterr().err.strip()
    assert status == 2, errors
    assert errors.startswith('jaxtune: ')
    assert '\n' not in errors
    assert all(part in errors for part in expected), errors


@pytest.mark.parametrize('wrong', ['model.path', 'rl.reward'])
def test_the_one_model_in_the_others_place(corpus, base, judge, tmp_path, capsys, wrong):
    from runs import write_recipe

    places = {'model.path': judge, 'rl.reward': judge} if wrong == 'model.path' else dict.fromkeys(('rl.reward',), base)
    keys = pretrained(corpus, base, 'ppo', mesh__data=8) | {name: str(path) for name, path in places.items()}
    path = write_recipe(tmp_path / 'recipe.py', keys)
    assert main.main(['jaxtune', '--config', str(path), '--workdir', str(tmp_path / 'run')]) == 2
    errors = capsys.readouterr().err
    assert f'{wrong}={places[wrong]}' in errors
    assert 'reward model' in errors
