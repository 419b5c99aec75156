"""Adapters of mixtures of experts go to Hugging Face's `peft` and come back, in both forms that it has had for them."""

import dataclasses
import json

import jax
import moe_folders
import numpy as np
import pytest
import safetensors.numpy
from test_peft import base, logits, mesh, read, torch_base, torch_logits

from jaxtune.errors import UserError
from jaxtune.methods import apply, lora_peft, peft, targets
from jaxtune.models.model import leaf_paths
from jaxtune.pretrained.save import merged
from jaxtune.recipe import recipes
from jaxtune.tasks import specs
from jaxtune.weights import LoRA, Weight, tree

torch = pytest.importorskip('torch')
theirs = pytest.importorskip('peft')
torch.set_num_threads(1)

ALL = 'all-linear'


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            moe_folders.save(made[family], family)
        return made[family]

    return make


def moved(folder, **changes):
    """`(config, model, params)`, the method's leaves moved away from where they begin."""
    config, model, params = base(folder, changes.get('method.name', 'lora'))
    recipes.apply_overrides(config, {'method.rank': 3, 'method.alpha': 5.0, **changes})
    method = specs.method(config)
    begun = params = apply.attach(lambda params: apply.begin(method, model, params, frozenset()), params, mesh())
    trainable, frozen = apply.partition(method.method, params, frozenset())
    keys = iter(jax.random.split(jax.random.key(0), 200))
    step = lambda leaf: leaf + 0.05 * jax.random.normal(next(keys), leaf.shape)  # noqa: E731
    params = leaf_paths(tree.combine(jax.tree.map(step, trainable), frozen))
    for path, leaf in params.items():
        if isinstance(leaf, LoRA):  # what fills a rank up stays zero
            used = (leaf_paths(begun)[path].a != 0).any(-2)
            params[path] = dataclasses.replace(leaf, a=leaf.a * used[..., None, :], b=leaf.b * used[..., None])
    return config, model, tree.nested(params)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


VARIANTS = {
    'all-linear': {},
    'experts alone': {'method.targets': 'experts.down_proj,experts.w2,output_linear'},
    'some layers, rslora': {'method.layers': '1:3', 'method.rslora': True},
    'ranks': {
        'method.ranks': 'gate_proj=2,w3=4,down_proj=1,input_linear=2,experts.gate_up_proj=2',
        'method.alpha': 3.0,
    },
    'pissa': {'method.init': 'pissa'},
    'shared': {'method.share_experts': True},
    'router': {'method.targets': 'gate,router,layer,q_proj', 'method.rank': 2},
}
# Every variant of one family, one variant of every family; the others in the exhaustive run.
EVERY = [
    pytest.param(family, variant, marks=() if usual else pytest.mark.exhaustive)
    for family in moe_folders.FAMILIES
    for variant in VARIANTS
    for usual in [family == 'qwen3_moe' or variant == next(iter(VARIANTS))]
]
"""Not every family has every module: those that it lacks are left out."""


def of_family(changes, model):
    lasts = [name for stack in targets.modules(model).values() for name in stack]
    given = changes.get('method.targets', ALL).split(',')
    kept = [name for name in given if name == ALL or any(targets.matches(module, (name,)) for module in lasts)]
    return changes | {'method.targets': ','.join(kept)}


@pytest.mark.parametrize(('family', 'variant'), EVERY)
def test_lora_made_here_loads_there_and_comes_back(family, variant, folders, tmp_path):
    folder = folders(family)
    changes = of_family(VARIANTS[variant], moe_folders.build(family))
    if not changes['method.targets']:
        pytest.skip('one tensor of gates and the rest')
    config, model, params = moved(folder, **changes)
    ours = logits(model, params)
    assert np.abs(ours - logits(model, base(folder)[2])).max() > 1e-2
    assert_close(logits(model, merged(params, '')), ours)
    lora_peft.save(tmp_path / 'ours', params, model, config.method, str(folder))
    again = theirs.PeftModel.from_pretrained(torch_base(folder), tmp_path / 'ours')
    assert_close(torch_logits(again), ours)
    back = read(tmp_path / 'ours', model, base(folder)[2])
    assert_close(logits(model, back), ours)
    # What PEFT writes of it is read too.
    again.save_pretrained(tmp_path / 'theirs')
    assert_close(logits(model, read(tmp_path / 'theirs', model, base(folder)[2])), ours)


@pytest.mark.parametrize('family', ['qwen3_moe', 'mixtral', 'gpt_oss', 'granitemoe'])
def test_what_peft_makes_of_parameters_is_read(family, folders, tmp_path):
    """Gates and the rest share one first factor there."""
    folder, settings = folders(family), {'r': 3, 'lora_alpha': 7, 'init_lora_weights': False}
    attention = {'target_modules': ['q_proj'], 'target_parameters': ['experts.gate_up_proj', 'experts.down_proj']}
    inner = {'target_modules': [], 'target_parameters': ['experts.gate_up_proj']}
    block = 'block_sparse_moe' if family == 'granitemoe' else 'mlp'
    outer = {'target_modules': [], 'target_parameters': [f'layers.2.{block}.experts.down_proj']}
    _, model, plain = base(folder)
    for i, given in enumerate((attention, inner, outer | {'use_rslora': True})):
        torch.manual_seed(1)
        made = theirs.get_peft_model(torch_base(folder), theirs.LoraConfig(task_type='CAUSAL_LM', **settings, **given))
        made.save_pretrained(tmp_path / str(i))
        ours = logits(model, read(tmp_path / str(i), model, plain))
        assert np.abs(ours - logits(model, plain)).max() > 1e-2
        assert_close(ours, torch_logits(made))


@pytest.mark.parametrize('family', ['qwen3_moe', 'mixtral', 'deepseek_v3'])
def test_a_module_of_each_expert_is_read_as_peft_reads_it(family, folders, tmp_path):
    """The form of before `transformers` 5, which PEFT converts when it loads a folder."""
    folder, rng, tensors = folders(family), np.random.default_rng(0), {}
    _, model, plain = base(folder)
    shapes = leaf_paths(model.shapes)
    for path, tensor in model.tensors.items():
        if '/experts/' in path:
            inputs, outputs = shapes[path].shape[-2:]
            for name in tensor.names(shapes[path].shape):
                module = f'base_model.model.{name.removesuffix(".weight")}'
                tensors[f'{module}.lora_A.weight'] = rng.normal(0, 0.2, (3, inputs)).astype(np.float32)
                tensors[f'{module}.lora_B.weight'] = rng.normal(0, 0.2, (outputs, 3)).astype(np.float32)
    names = ['w1', 'w2', 'w3'] if family == 'mixtral' else ['gate_proj', 'up_proj', 'down_proj']
    fields = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': 3, 'lora_alpha': 6, 'target_modules': names}
    (tmp_path / 'old').mkdir()
    (tmp_path / 'old' / 'adapter_config.json').write_text(json.dumps(fields | {'base_model_name_or_path': str(folder)}))
    safetensors.numpy.save_file(tensors, tmp_path / 'old' / 'adapter_model.safetensors')
    made = theirs.PeftModel.from_pretrained(torch_base(folder), tmp_path / 'old')
    ours = logits(model, read(tmp_path / 'old', model, plain))
    assert np.abs(ours - logits(model, plain)).max() > 1e-2
    assert_close(ours, torch_logits(made))

    # Experts that have no factors are as they were.
    some = {name: value for name, value in tensors.items() if '.experts.1.' not in name}
    safetensors.numpy.save_file(some, tmp_path / 'old' / 'adapter_model.safetensors')
    without = read(tmp_path / 'old', model, plain)
    for path, leaf in leaf_paths(merged(without, '')).items():
        if '/experts/' in path:
            np.testing.assert_array_equal(leaf[:, 1], leaf_paths(plain)[path][:, 1])


@pytest.mark.parametrize('family', ['qwen3_moe', 'mixtral'])
def test_dora_of_experts_comes_back_as_a_module_of_each(family, folders, tmp_path):
    folder = folders(family)
    config, model, params = moved(folder, **{'method.dora': True})
    lora_peft.save(tmp_path / 'ours', params, model, config.method, str(folder))
    assert_close(logits(model, read(tmp_path / 'ours', model, base(folder)[2])), logits(model, params))


def test_qlora_of_experts_comes_back(folders, tmp_path):
    folder = folders('qwen3_moe')
    config, model, params = moved(folder, **{'method.name': 'qlora', 'method.block_size': 16})
    assert not isinstance(leaf_paths(params)['layers/mlp/router/kernel'], Weight)
    lora_peft.save(tmp_path / 'ours', params, model, config.method, str(folder))
    assert_close(logits(model, read(tmp_path / 'ours', model, base(folder, 'qlora')[2])), logits(model, params))


def test_factors_of_experts_that_do_not_fit_are_one_line(folders, tmp_path):
    folder = folders('mixtral')
    config, model, params = moved(folder)
    lora_peft.save(tmp_path / 'ours', params, model, config.method, str(folder))
    given = json.loads((tmp_path / 'ours' / 'adapter_config.json').read_text())
    words = {3: r'model\.layers\.0\.mlp\.experts\.\w+ has factors of rank 4 here', 5: r'experts\.\w+ is 5 times'}
    for experts, word in words.items():
        with pytest.raises(UserError, match=f'another base: .*{word}'):
            peft.reader(str(tmp_path / 'ours'), moe_folders.build('mixtral', num_local_experts=experts))
    changed = given | {'target_parameters': ['experts.gate_up_proj']}
    (tmp_path / 'ours' / 'adapter_config.json').write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r'has 2 pairs of factors; .* here gate_up_proj'):
        read(tmp_path / 'ours', model, params)
    with pytest.raises(UserError, match=r'method\.dora=True: .*_proj holds all experts'):
        moved(folders('gpt_oss'), **{'method.dora': True})
