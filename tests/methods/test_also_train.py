"""Modules of the model that train whole beside what a method adds: routers, heads, norms."""

import jax
import moe_folders
import numpy as np
import pytest
from test_methods import one_device, settings
from test_methods import tuned as begin
from test_peft import logits, torch_base, torch_logits

from jaxtune.errors import UserError
from jaxtune.methods import apply, full, peft, targets
from jaxtune.models import hf
from jaxtune.models.model import leaf_paths
from jaxtune.parallel import make_mesh
from jaxtune.tasks import specs
from jaxtune.weights import NF4, tree

LORA = {'method.name': 'lora', 'method.targets': 'q_proj', 'method.also_train': 'gate,norm,lm_head'}
METHODS = {
    'lora': LORA,
    'qlora': LORA | {'method.name': 'qlora', 'method.targets': 'all-linear', 'method.block_size': 16},
    'adapter': LORA | {'method.name': 'adapter', 'method.bottleneck': 4},
    'prompt': LORA | {'method.name': 'prompt', 'method.virtual_tokens': 4},
    'prefix': LORA | {'method.name': 'prompt', 'method.virtual_tokens': 4, 'method.prefix': True},
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp('qwen3_moe')
    moe_folders.save(place, 'qwen3_moe')
    return place


def moved(config, model, params):
    """The tree with all that trains moved away, and the paths of the model's own leaves among it."""
    method = specs.method(config)
    whole = apply.also_trained(method, model)
    trainable, frozen = apply.partition(method.method, params, whole)
    keys = iter(jax.random.split(jax.random.key(3), 200))
    step = lambda leaf: leaf + 0.05 * jax.random.normal(next(keys), leaf.shape)  # noqa: E731
    return tree.combine(jax.tree.map(step, trainable), frozen), apply.whole_paths(params, method.method, whole)


@pytest.mark.parametrize('name', METHODS)
def test_what_trains_whole_goes_out_and_comes_back(name, folder, tmp_path):
    """In a mixture of which one layer is dense, so that the layers lie in two stacks."""
    pytest.importorskip('torch')
    theirs = pytest.importorskip('peft')
    config, model = settings(**METHODS[name]), moe_folders.build('qwen3_moe')
    plain = hf.load(folder, model)[0]
    stored, params = begin(config, model, plain, one_device())
    router = leaf_paths(params)['layers/mlp/router/kernel']
    np.testing.assert_array_equal(router, leaf_paths(plain)['layers/mlp/router/kernel'])
    params, whole = moved(config, model, params)
    assert set(whole) == {'layers/mlp/router/kernel', 'norm/scale', 'lm_head/kernel'}
    method = specs.method(config).method
    assert method.save_adapter is not None
    method.save_adapter(tmp_path / 'ours', params, model, config.method, str(folder), whole)
    init, arrays = peft.reader(str(tmp_path / 'ours'), model)
    assert set(arrays.whole) == set(whole)
    mesh = make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1}, jax.devices()[:1])
    ours = logits(model, params)
    np.testing.assert_allclose(logits(model, apply.attach(init, stored, mesh, arrays)), ours, rtol=1e-5, atol=1e-5)
    if name == 'qlora':
        kinds = {path: isinstance(leaf, NF4) for path, leaf in leaf_paths(stored).items()}
        assert kinds['layers/mlp/experts/down_proj/kernel']
        assert not any(kinds[path] for path in whole)
    if name in ('lora', 'prompt', 'prefix'):
        made = theirs.PeftModel.from_pretrained(torch_base(folder), tmp_path / 'ours')
        found = torch_logits(made)[:, -ours.shape[1] :]
        np.testing.assert_allclose(found, ours, rtol=1e-4, atol=1e-4 * np.abs(ours).max())
        made.save_pretrained(tmp_path / 'theirs')
        init, arrays = peft.reader(str(tmp_path / 'theirs'), model)
        np.testing.assert_allclose(logits(model, apply.attach(init, plain, mesh, arrays)), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('family', 'name'), [('mixtral', 'gate'), ('granitemoe', 'router'), ('gpt_oss', 'router')])
def test_routers_of_other_names_load_in_peft(family, name, tmp_path):
    pytest.importorskip('torch')
    theirs = pytest.importorskip('peft')
    moe_folders.save(tmp_path / 'base', family)
    config, model = settings(**LORA | {'method.also_train': name}), moe_folders.build(family)
    params, whole = moved(config, model, begin(config, model, hf.load(tmp_path / 'base', model)[0], one_device())[1])
    method = specs.method(config).method
    assert whole
    assert all('/router/' in path for path in whole)
    assert method.save_adapter is not None
    method.save_adapter(tmp_path / 'ours', params, model, config.method, str(tmp_path / 'base'), whole)
    made = theirs.PeftModel.from_pretrained(torch_base(tmp_path / 'base'), tmp_path / 'ours')
    ours = logits(model, params)
    np.testing.assert_allclose(torch_logits(made), ours, rtol=1e-4, atol=1e-4 * np.abs(ours).max())


def test_all_linear_reaches_experts_and_no_router():
    model = moe_folders.build('qwen2_moe')
    chosen = set(targets.select(model, 'all-linear'))
    assert {f'layers/mlp/experts/{name}_proj/kernel' for name in ('gate', 'up', 'down')} <= chosen
    assert {'layers/mlp/shared_expert/up_proj/kernel', 'layers/self_attn/q_proj/kernel'} <= chosen
    assert not {path for path in chosen if path.endswith(('/router/kernel', '/shared_expert_gate/kernel'))}
    assert set(targets.select(model, 'experts.gate_proj')) == {'layers/mlp/experts/gate_proj/kernel'}


@pytest.mark.parametrize(
    ('given', 'words'),
    [
        ('gat', ("method.also_train: 'gat' matches no module", 'nearest: gate')),
        ('gate,down_proj', ("'down_proj' matches experts", 'method.name=full')),
    ],
)
def test_what_cannot_train_whole_is_one_line(given, words):
    with pytest.raises(UserError) as caught:
        targets.whole(moe_folders.build('mixtral' if given == 'gat' else 'qwen3_moe'), given)
    assert '\n' not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_all_that_trains_cannot_also_train():
    config = settings(**{'method.name': 'full', 'method.also_train': 'gate'})
    with pytest.raises(UserError, match=r'method\.also_train=gate: expected none with method\.name=full'):
        full.check(config.method)
