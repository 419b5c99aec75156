"""A folder of every family's random model, made once."""

import pathlib

import pytest
from model_cases import CASES, Case, reference

# Of these, what another family or another variant covers too is in the exhaustive run.
_MORE = ('exaone4-', 'starcoder2-', 'cohere2-', 'glm4-', 'granite-', 'smollm3-', 'ministral-', 'ministral3-', 'olmo3-')


@pytest.fixture(
    params=[pytest.param(case, marks=pytest.mark.exhaustive if case.name.startswith(_MORE) else ()) for case in CASES],
    ids=lambda case: case.name,
)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope='session')
def folders(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp('models')


@pytest.fixture
def torch_model(case, folders):
    """`transformers`' model of the case; also saved to `folder`."""
    pytest.importorskip('torch')
    return reference(case, folders / case.name)


@pytest.fixture
def folder(case, folders, torch_model) -> pathlib.Path:
    return folders / case.name
