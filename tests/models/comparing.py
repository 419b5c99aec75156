"""What the tests of all model kinds do: open a folder, compute logits here and in PyTorch, compare."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import models
from jaxtune.models import hf
from jaxtune.models.model import leaf_paths
from jaxtune.parallel import make_mesh, match_rules, shardings

TOLERANCE = 1e-4


def open_model(folder, **settings):
    """The model of a folder and its parameters, none of them missing there."""
    model = models.build(models.read_config(folder), **settings)
    params, fresh = hf.load(folder, model)
    assert not fresh
    return model, params


def compute_logits(model, params, batch):
    return np.asarray(jax.jit(lambda p, b: model.logits(p, model.apply(p, b).hidden))(params, batch))


def torch_logits(model, **inputs):
    """PyTorch's logits; inputs that are None are left out."""
    import torch

    with torch.no_grad():
        inputs = {name: torch.tensor(value) for name, value in inputs.items() if value is not None}
        return model(**inputs).logits.float().numpy()


def assert_close(ours, theirs):
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


def assert_gradients_equal(model, params, torch_model, tokens):
    """The gradients of the mean cross-entropy of the next token, by every parameter, against PyTorch's."""
    import torch

    def loss(params):
        logits = model.logits(params, model.apply(params, {'tokens': tokens}).hidden)[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()

    torch_model.zero_grad()
    logits = torch_model(input_ids=torch.tensor(tokens)).logits[:, :-1]
    targets = torch.tensor(tokens[:, 1:], dtype=torch.long)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert_same_gradients(model, jax.jit(jax.grad(loss))(params), torch_model)


def assert_same_gradients(model, gradients, torch_model):
    """Gradients by our parameters against those that PyTorch's hold, by the names that a folder has for them."""
    import safetensors.numpy
    import torch

    parameters = [parameter for parameter in torch_model.parameters() if parameter.grad is not None]
    values = [parameter.data for parameter in parameters]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for parameter in parameters:
            parameter.data = parameter.grad
        torch_model.save_pretrained(folder)
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        theirs = safetensors.numpy.load_file(f'{folder}/model.safetensors')
    torch_model.zero_grad()
    for path, gradient in leaf_paths(gradients).items():
        tensor, ours = model.tensors[path], np.asarray(gradient)
        found = np.stack([theirs.pop(name) for name in tensor.names(ours.shape)])
        found = found.swapaxes(-1, -2) if tensor.transposed else found
        if path.endswith('/correction'):  # a buffer, by which experts are chosen alone
            assert not ours.any()
        else:
            assert_close(ours, found.reshape(ours.shape))
    assert not theirs


def assert_a_mesh_computes_the_same(model, folder, params, batch):
    """Logits on one device against those on a mesh of 2 x 2 x 2 [fsdp, tensor, sequence]."""
    one = compute_logits(model, params, batch)
    mesh = make_mesh({'data': 1, 'fsdp': 2, 'tensor': 2, 'sequence': 2})
    placed = shardings(match_rules(model.shapes, mesh), mesh)
    params, _ = hf.load(folder, model, placed)
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True):
        assert leaf.sharding == sharding
    with jax.set_mesh(mesh):
        many = compute_logits(model, params, batch)
    np.testing.assert_allclose(many, one, atol=1e-5 * np.abs(one).max())


def assert_bfloat16_is_near(folder, batch, **settings):
    """Logits in bfloat16 within a tenth of those in float32, by their root mean squares."""
    exact = compute_logits(*open_model(folder, **settings), batch)
    model, params = open_model(folder, param_dtype='bfloat16', compute_dtype='bfloat16', **settings)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('bfloat16'), jnp.dtype('float32')}
    assert jax.eval_shape(model.apply, params, batch).hidden.dtype == jnp.bfloat16
    rough = compute_logits(model, params, batch)
    kept = batch['segment_ids'] > 0
    assert np.sqrt(np.mean((rough - exact)[kept] ** 2) / np.mean(exact[kept] ** 2)) < 0.1


def assert_remat_changes_no_gradient(config, batch):
    """Gradients of a model from scratch, whatever its backward pass computes again."""

    def gradients(remat):
        model = models.build(models.read_config(config), remat=remat)
        params = jax.jit(model.init)(jax.random.key(0))
        loss = lambda p: jnp.square(model.logits(p, model.apply(p, batch).hidden)).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    expected = gradients('none')
    for remat in ('full', 'dots'):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(a).max()) + 1e-9),
            expected,
            gradients(remat),
        )
