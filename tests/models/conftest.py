"""A folder of every family's random model, made once."""

import pathlib

import pytest
from model_cases import CASES, Case, reference


@pytest.fixture(params=CASES, ids=lambda case: case.name)
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
