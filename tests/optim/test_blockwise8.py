"""Eight-bit codes: the formulas that run on a TPU against the table and the search that run elsewhere."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.weights.blockwise8 import dynamic_map, formula_code, formula_value, nearest_code

both = pytest.mark.parametrize('signed', [True, False], ids=['signed', 'unsigned'])


@both
def test_the_formula_gives_every_value_of_the_table(signed):
    values = formula_value(jnp.arange(256, dtype=jnp.uint8), signed)
    np.testing.assert_allclose(values, dynamic_map(signed), rtol=1e-6, atol=0)


@both
def test_values_of_the_table_have_their_own_codes(signed):
    codes = formula_code(jnp.asarray(dynamic_map(signed)), signed)
    np.testing.assert_array_equal(codes, np.arange(256))


@both
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), decades=st.integers(0, 9))
def test_the_formula_finds_the_code_that_the_search_finds(signed, seed, decades):
    rng = np.random.default_rng(seed)
    values = 10.0 ** rng.uniform(-decades, 0, 5000) * (rng.choice([-1, 1], 5000) if signed else 1)
    values = values.astype(np.float32)
    found = np.asarray(formula_code(jnp.asarray(values), signed)).astype(int)
    searched = np.asarray(nearest_code(jnp.asarray(values), signed)).astype(int)
    table = dynamic_map(signed)
    # Where they differ the two are equally near, but for rounding.
    excess = np.abs(table[found] - values) - np.abs(table[searched] - values)
    assert (excess <= 1e-6 * np.abs(values)).all()
    assert np.mean(found != searched) < 1e-3
