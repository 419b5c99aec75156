"""Optimizers and schedules against PyTorch's and against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import recipes
from jaxtune.optim import clip, make_optimizer, schedule


def settings(**changes):
    config = recipes.defaults()
    recipes.lay_over(config, {f'optimizer.{name}': value for name, value in changes.items()})
    return config.optimizer


def tree(rng):
    """Parameters of the shapes that matter: stacked kernels, an embedding, a norm's scale."""
    shapes = {'layers': {'q_proj': {'kernel': (3, 8, 6)}, 'norm': {'scale': (3, 8)}}, 'lm_head': {'kernel': (8, 11)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def follow(optimizer, params, gradients):
    state = optimizer.init(params)
    for grads in gradients:
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(('name', 'torch_name'), [('adamw', 'AdamW'), ('sgd', 'SGD')])
def test_equals_pytorch_with_decay_on_kernels_only(name, torch_name):
    torch = pytest.importorskip('torch')
    rng = np.random.default_rng(0)
    params, gradients = tree(rng), [tree(rng) for _ in range(30)]
    steps = len(gradients)
    config = settings(name=name, lr=0.01, weight_decay=0.1, warmup_steps=5, schedule='cosine', b1=0.9, b2=0.95)
    ours = follow(make_optimizer(config, steps), params, gradients)

    rate = schedule(config, steps)
    leaves, structure = jax.tree.flatten(params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for leaf in leaves]
    groups = [
        {'params': [t for t, p in zip(tensors, paths, strict=True) if p.endswith(ending)], 'weight_decay': decay}
        for ending, decay in (("['kernel']", 0.1), ("['scale']", 0.0))
    ]
    if name == 'adamw':
        other = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    else:
        # PyTorch adds decay to the gradient; ours is decoupled, so it is taken from the weights by hand.
        other = torch.optim.SGD(tensors, lr=0.01, momentum=0.9)
    for t, grads in enumerate(gradients):
        now = float(rate(t))
        for group in other.param_groups:
            group['lr'] = now
        for tensor, grad in zip(tensors, jax.tree.leaves(grads), strict=True):
            tensor.grad = torch.tensor(np.asarray(grad))
        if name == 'sgd':
            with torch.no_grad():
                for group in groups:
                    for tensor in group['params']:
                        tensor.mul_(1 - now * group['weight_decay'])
        other.step()
    expected = jax.tree.unflatten(structure, [t.detach().numpy() for t in tensors])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, expected)


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'lion', 'muon', 'sgd'])
def test_every_optimizer_minimises_a_quadratic(name):
    rng = np.random.default_rng(1)
    params, goal = tree(rng), tree(rng)
    # Muon moves every direction of a kernel by one rate, so its way must be as long as the largest singular value.
    rate = 0.1 if name == 'muon' else 0.03
    optimizer = make_optimizer(settings(name=name, lr=rate, weight_decay=0.0, schedule='linear'), 400)

    def loss(params):
        return sum(jnp.sum(jnp.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (params, goal)), strict=True))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, before = optimizer.init(params), float(loss(params))
    for _ in range(400):
        params, state = step(params, state)
    assert float(loss(params)) < 0.01 * before


def test_lion_moves_by_the_sign():
    rng = np.random.default_rng(2)
    params, grads = tree(rng), tree(rng)
    config = settings(name='lion', lr=0.01, weight_decay=0.0, schedule='constant')
    moved = follow(make_optimizer(config, 1), params, [grads])
    jax.tree.map(lambda a, b, g: np.testing.assert_allclose(a - b, -0.01 * np.sign(g), atol=1e-6), moved, params, grads)


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(3)
    params, grads = tree(rng), tree(rng)
    config = settings(name='muon', lr=1.0, weight_decay=0.0, schedule='constant')
    moved = follow(make_optimizer(config, 1), params, [grads])
    update = np.asarray(params['layers']['q_proj']['kernel'] - moved['layers']['q_proj']['kernel'])
    values = np.linalg.svd(update, compute_uv=False)
    scale = 0.2 * np.sqrt(8)
    # Muon's five Newton-Schulz iterations bring singular values near 1, not to it (Jordan 2024: 0.7 to 1.2).
    assert (values > 0.6 * scale).all()
    assert (values < 1.3 * scale).all()
    for name in (('layers', 'norm', 'scale'), ('lm_head', 'kernel')):
        a, b, g = params, moved, grads
        for key in name:
            a, b, g = a[key], b[key], g[key]
        np.testing.assert_allclose(a - b, np.sign(g), atol=1e-3)


def test_new_weights_have_their_own_rate():
    rng = np.random.default_rng(4)
    params, grads = tree(rng), tree(rng)
    config = settings(lr=1e-4, new_lr=1e-2, weight_decay=0.0, schedule='constant')
    moved = follow(make_optimizer(config, 1, frozenset({'lm_head/kernel'})), params, [grads])
    old = np.abs(moved['layers']['q_proj']['kernel'] - params['layers']['q_proj']['kernel'])
    new = np.abs(moved['lm_head']['kernel'] - params['lm_head']['kernel'])
    np.testing.assert_allclose(old, 1e-4, rtol=1e-2)
    np.testing.assert_allclose(new, 1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ('name', 'points'),
    [
        ('constant', {0: 0.1, 9: 1.0, 10: 1.0, 99: 1.0}),
        ('linear', {0: 0.1, 10: 1.0, 55: 0.5, 100: 0.0}),
        ('cosine', {0: 0.1, 10: 1.0, 55: 0.55, 100: 0.1}),
        ('wsd', {0: 0.1, 10: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
    ],
)
def test_schedules(name, points):
    rate = schedule(settings(schedule=name, lr=1.0, warmup_steps=10), 100)
    for step, expected in points.items():
        assert float(rate(step)) == pytest.approx(expected, abs=1e-6), step


def test_clip_scales_to_the_norm_and_no_further():
    grads = {'a': jnp.asarray([3.0, 0.0]), 'b': jnp.asarray([4.0])}
    np.testing.assert_allclose(optax.global_norm(clip(grads, jnp.asarray(5.0), 1.0)), 1.0, rtol=1e-6)
    for limit in (0.0, 6.0):
        jax.tree.map(np.testing.assert_array_equal, clip(grads, jnp.asarray(5.0), limit), grads)
