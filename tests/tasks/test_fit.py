"""The table of what fits where: cells, advice that compiles, a stop in between, and the best of the meshes."""

import json
import types

import jax
import pytest

from jaxtune.errors import UserError
from jaxtune.parallel.mesh import AXES
from jaxtune.recipe import recipes
from jaxtune.tasks import advice, ahead, fit, mesh_choice
from jaxtune.tasks import compile as compile_task

FIELDS = {
    'model_type': 'llama', 'vocab_size': 256, 'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2,
    'num_attention_heads': 4, 'num_key_value_heads': 4, 'max_position_embeddings': 128,
}  # fmt: skip


def recipe(**changes):
    config = recipes.defaults()
    settings = {'task': 'compile', 'model.config': FIELDS, 'data.seq_len': 128, 'train.batch_size': 8}
    recipes.apply_overrides(config, settings | {name.replace('__', '.'): value for name, value in changes.items()})
    return config


def run(config, workdir):
    workdir.mkdir(exist_ok=True)
    command = types.SimpleNamespace(argv=('jaxtune',), recipe='recipe.py', workdir=workdir, overwrite=False)
    result = compile_task.run(config, workdir, command)
    return result, json.loads((workdir / 'compile.json').read_text())['cells']


def test_a_table_has_a_cell_for_each_method_and_length(tmp_path, capsys):
    config = recipe(compile__methods='full,lora', compile__seq_lens='64,128', compile__rows_per_device=1)
    result, cells = run(config, tmp_path)
    assert [(cell['method'], cell['seq_len']) for cell in cells] == [
        ('full', 64), ('full', 128), ('lora', 64), ('lora', 128)
    ]  # fmt: skip
    assert result['metrics'] == {'cells': 4, 'fitting': 4, 'with_advice': 0}
    assert all(cell['fits'] and cell['tokens_per_second'] > 0 and cell['devices'] == 8 for cell in cells)
    full, lora = cells[1], cells[3]
    assert lora['peak_bytes'] < full['peak_bytes']
    printed = capsys.readouterr().out
    assert 'tokens/s' in printed
    assert max(map(len, printed.splitlines())) <= 80
    # Each cell is what compiling it alone says.
    alone = recipe(method__name='lora')
    single = run_alone(alone, tmp_path / 'alone')
    assert single['peak_bytes_per_device'] == lora['peak_bytes']
    assert 'What fits where' in (tmp_path / 'report.html').read_text()


def run_alone(config, workdir):
    workdir.mkdir()
    command = types.SimpleNamespace(argv=('jaxtune',), recipe='recipe.py', workdir=workdir, overwrite=False)
    compile_task.run(config, workdir, command)
    return json.loads((workdir / 'compile.json').read_text())


def test_what_is_done_is_not_compiled_again(tmp_path, monkeypatch):
    config = recipe(compile__methods='lora', compile__seq_lens='64,128')
    _, first = run(config, tmp_path)
    monkeypatch.setattr(fit, '_compiled', lambda config: pytest.fail('compiled again'))
    _, second = run(config, tmp_path)
    assert first == second


def test_advice_is_the_nearest_that_fits_and_compiles(tmp_path, monkeypatch):
    """A device that holds a little less than full tuning in float32 takes."""
    step = ahead.open_step(recipe(), mesh_choice.any_mesh(recipe()), 2**40)
    (attempt,) = step.attempts()
    limit = attempt.peak_bytes - 1
    monkeypatch.setattr(ahead, 'target', lambda config: (None, limit))
    _, (cell,) = run(recipe(compile__methods='full'), tmp_path)
    assert not cell['fits']
    assert cell['peak_bytes'] == attempt.peak_bytes
    changes, found = cell['advice'].pop('changes'), cell['advice']
    assert found['fits']
    assert found['compiled']
    assert found['peak_bytes'] <= limit
    assert len(changes) == 1
    again = ahead.open_step(recipe(**{k.replace('.', '__'): v for k, v in changes.items()}), step.mesh, limit)
    *_, last = again.attempts()
    assert last.peak_bytes == found['peak_bytes']


def test_changes_together_where_none_alone_is_enough():
    outcome = advice.Outcome(False, 80, 50, 1, True, 40)
    asked = []

    def compile(changes):
        asked.append(dict(changes))
        return advice.Outcome(True, 50, 50, 1, True, 16)

    trial = advice.Trial(lambda changes: (55 - 8 * len(changes), 50), compile, outcome)
    changes, found = advice.nearest(recipe(compile__topology='h100x1'), outcome, trial)
    assert found.fits
    assert list(changes) == ['model.compute_dtype', 'model.param_dtype', 'model.remat']
    assert asked == [changes]  # with fewer it could not fit, by what it needed beside its state


def test_nothing_fits_nowhere():
    outcome = advice.Outcome(False, 51, 50, 1, True, 50)
    asked = []
    trial = advice.Trial(lambda changes: (30, 50), lambda changes: asked.append(changes) or outcome, outcome)
    assert advice.nearest(recipe(compile__topology='rtx4090'), outcome, trial) is None
    assert {'compile.topology': 'rtx4090x2'} in asked


def test_a_fault_of_the_compiler_is_a_line_of_the_table(tmp_path, monkeypatch, capsys):
    def fails(lowered, limit):
        raise jax.errors.JaxRuntimeError('INTERNAL: shapes differ\nmore')

    monkeypatch.setattr(ahead, 'try_compile', fails)
    _, (cell,) = run(recipe(compile__methods='lora'), tmp_path)
    assert not cell['fits']
    assert cell['problem'] == 'the compiler for cpu fails over this step: INTERNAL: shapes differ'
    assert 'fails over this step' in capsys.readouterr().out
    with pytest.raises(UserError, match='the compiler for cpu fails over this step: INTERNAL'):
        run(recipe(), tmp_path / 'alone')


def test_a_state_that_is_too_large_is_not_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, 'target', lambda config: (None, 1000))
    monkeypatch.setattr(ahead.Step, 'attempts', lambda self: pytest.fail('compiled'))
    _, (cell,) = run(recipe(compile__methods='full'), tmp_path)
    assert not cell['compiled']
    assert cell['advice'] is None
    assert cell['peak_bytes'] > 1000


@pytest.mark.parametrize('changes', [{}, {'optimizer__name': 'adamw8bit'}, {'method__name': 'qlora'}])
def test_the_least_is_never_more_than_what_the_compiler_says(changes):
    step = ahead.open_step(recipe(**changes), mesh_choice.any_mesh(recipe()), 2**40)
    (attempt,) = step.attempts()
    assert attempt.argument_bytes <= step.least_bytes() <= attempt.peak_bytes


def test_unknown_methods_are_refused():
    with pytest.raises(UserError, match=r"compile\.methods='lra': expected some of full, lora"):
        fit.cells(recipe(compile__methods='full,lra'))


@pytest.mark.parametrize('value', ['0', 'a', '64,,x', (1.5,)])
def test_lengths_are_positive_integers(value):
    with pytest.raises(UserError, match=r'compile\.seq_lens=.*expected positive integers'):
        recipe(compile__seq_lens=value)


def test_candidates_are_all_meshes_once():
    found = [tuple(sizes[axis] for axis in AXES) for sizes in mesh_choice.candidates(8, {})]
    assert len(found) == len(set(found)) == 35  # three twos over five axes
    assert all(a * b * c * d * e == 8 for a, b, c, d, e in found)
    assert all(sizes['tensor'] == 2 for sizes in mesh_choice.candidates(8, {'tensor': 2}))


def test_the_chosen_mesh_is_within_5_percent_of_the_best():
    config, devices = recipe(mesh__auto=True, train__accumulate=1), jax.devices()[:4]
    seconds = {}
    for sizes in mesh_choice._dividing(config, devices):
        try:
            step = ahead.open_step(config, mesh_choice.make_mesh(sizes, devices), 2**40)
        except UserError:
            continue
        (attempt,) = step.attempts()
        seconds[tuple(sizes.items())] = step.speed(attempt).estimate.seconds
    mesh = mesh_choice.mesh_of(config, devices, 2**40)
    assert len(seconds) == 10
    assert seconds[tuple((axis, mesh.shape[axis]) for axis in AXES)] <= 1.05 * min(seconds.values())


def test_a_choice_is_kept_for_when_the_run_goes_on(tmp_path, monkeypatch):
    config = recipe(mesh__auto=True, train__accumulate=1, mesh__tensor=2)
    mesh = mesh_choice.stored_mesh(config, tmp_path)
    assert mesh.shape['tensor'] == 2
    monkeypatch.setattr(mesh_choice, '_choose', lambda *args: pytest.fail('chosen again'))
    assert mesh_choice.stored_mesh(config, tmp_path).shape == mesh.shape


def test_no_mesh_divides_the_batch():
    config = recipe(mesh__auto=True, train__batch_size=1, mesh__data=2)
    with pytest.raises(UserError, match=r'mesh\.auto=True: no mesh of 8 devices divides train\.batch_size=1'):
        mesh_choice.any_mesh(config)
