"""Eight virtual CPU devices for every test, set before JAX is imported."""

import atexit
import collections
import os
import pathlib
import shutil
import tempfile

import pytest
import rarely

os.environ['JAX_PLATFORMS'] = 'cpu'
# Tests compile a lot and compute little: XLA's own passes all run, but machine code is made the quick way and in one
# piece, and what was compiled once is read back where another test, of any worker, builds the same program.
os.environ.setdefault(
    'XLA_FLAGS',
    '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false '
    '--xla_cpu_parallel_codegen_split_count=1',
)
if 'PYTEST_XDIST_WORKER' not in os.environ:  # a worker has the folder of the process that started it
    _compiled = tempfile.mkdtemp(prefix='jaxtune-tests-')
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = _compiled
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TORCHDYNAMO_DISABLE', '1')  # a reference that compiles itself, in C++, computes the same

SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared'


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what `-m` does not ask for
def pytest_collection_modifyitems(items):
    """Marks as `exhaustive` what `rarely` names."""
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker('exhaustive') is None:
            path = pathlib.Path(item.path).relative_to(pathlib.Path(__file__).parent).as_posix()
            cases[f'{path}::{item.originalname}'].append(item)
    for name, found in cases.items():
        for number, item in enumerate(found):
            if name in rarely.NEVER or number % rarely.EVERY.get(name, 1):
                item.add_marker('exhaustive')


@pytest.fixture(scope='session')
def shared():
    """The folder of real data beside the checkout, where there is one."""
    if not SHARED.is_dir():
        pytest.skip('needs the folder of real data beside the checkout (../shared), which is not there')
    return SHARED


@pytest.fixture(scope='module', autouse=True)
def _forget_programs():
    """Keeps a worker's memory, and with it each collection of garbage, small."""
    yield
    import gc

    import jax

    jax.clear_caches()
    gc.collect()
    gc.freeze()  # what is left is modules, and looked at no more
