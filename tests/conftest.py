"""Eight virtual CPU devices for every test, set before JAX is imported."""

import os
import pathlib

import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared'


@pytest.fixture(scope='session')
def shared():
    """The folder of real data beside the checkout, where there is one."""
    if not SHARED.is_dir():
        pytest.skip('needs the folder of real data beside the checkout (../shared), which is not there')
    return SHARED
