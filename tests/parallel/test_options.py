"""Compiler options: given where they are known, left out where they would be an error."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from jaxtune.parallel import compiler_options

options = importlib.import_module('jaxtune.parallel.compiler_options')  # the package has a function of that name


@pytest.fixture
def asked_anew():
    options._known.cache_clear()
    yield
    options._known.cache_clear()


def test_products_of_a_program_for_the_cpu_go_to_eigen(asked_anew):
    product = jax.jit(lambda a: a @ a.T, compiler_options=compiler_options())
    text = product.lower(jnp.ones((64, 64))).compile().as_text()
    assert ' dot(' in text
    assert 'ynn' not in text


def test_options_that_this_xla_lacks_are_left_out(asked_anew, monkeypatch):
    monkeypatch.setattr(options, '_CPU', {'xla_cpu_no_such_option': 'true'})
    assert compiler_options() == {}
