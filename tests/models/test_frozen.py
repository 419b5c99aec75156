"""A model and its parameters as one argument of a jitted function."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import models
from jaxtune.models.frozen import FrozenModel


def test_it_reads_as_its_model_does_is_traced_once_and_gets_no_gradient():
    fields = {'model_type': 'llama', 'vocab_size': 32, 'hidden_size': 16, 'intermediate_size': 32}
    fields |= {'num_hidden_layers': 1, 'num_attention_heads': 2, 'max_position_embeddings': 16}
    model = models.build(models.read_config(fields))
    params, batch, traces = model.init(jax.random.key(0)), {'tokens': jnp.arange(12).reshape(2, 6)}, []

    @jax.jit
    def logits(frozen, batch):
        traces.append(1)
        hidden, head = frozen.read(batch)
        return head.logits(hidden)

    frozen = FrozenModel(model, params)
    found = logits(frozen, batch)
    np.testing.assert_allclose(found, model.logits(params, model.apply(params, batch).hidden), rtol=1e-5, atol=1e-6)
    logits(FrozenModel(model, jax.tree.map(jnp.zeros_like, params)), batch)
    assert len(traces) == 1
    grads = jax.grad(lambda params: logits(FrozenModel(model, params), batch).sum())(params)
    assert not any(np.asarray(grad).any() for grad in jax.tree.leaves(grads))
