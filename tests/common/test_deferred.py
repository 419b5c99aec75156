"""A module of which nothing is used is not executed, and one that is used is as if it had been imported."""

import subprocess
import sys
import textwrap

import pytest

PACKAGE = {
    'slow/__init__.py': "print('executed')\nfrom slow.part import NUMBER\ndef double():\n    return 2 * NUMBER\n",
    'slow/part.py': 'NUMBER = 21\n',
}


@pytest.fixture
def run(tmp_path):
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def run(code):
        start = 'from jaxtune.common.deferred import defer\ndefer("slow")\n'
        made = subprocess.run(
            [sys.executable, '-c', start + textwrap.dedent(code)],
            capture_output=True,
            text=True,
            env={'PYTHONPATH': f'{tmp_path}:{":".join(sys.path)}'},
        )
        assert not made.stderr, made.stderr
        return made.stdout.split()

    return run


def test_an_import_alone_executes_nothing(run):
    assert run('import slow, inspect; inspect.stack(); print(slow.__name__, slow.__spec__.name)') == ['slow', 'slow']


@pytest.mark.parametrize(
    'use',
    ['import slow; print(slow.double())', 'from slow import double; print(double())', 'import slow.part; print(42)'],
)
def test_its_first_use_executes_it_once(run, use):
    assert run(use + '\nimport slow; slow.double(); print(type(slow).__name__)') == ['executed', '42', 'module']


def test_threads_that_ask_at_once_get_the_whole_module(run):
    code = """
        import concurrent.futures, slow
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            print(*pool.map(lambda _: slow.double(), range(8)))
    """
    assert run(code) == ['executed', *['42'] * 8]


def test_what_fails_to_load_fails_as_an_import_does(tmp_path, run):
    (tmp_path / 'slow/part.py').write_text('raise ImportError("broken")\n')
    code = """
        import slow
        for _ in range(2):
            try:
                slow.double
            except ImportError as error:
                print(error)
    """
    assert run(code) == ['executed', 'broken', 'executed', 'broken']


def test_one_that_is_not_installed_stays_missing():
    code = (
        'from jaxtune.common.deferred import defer\ndefer("no_such_module")\n'
        'try:\n    import no_such_module\nexcept ModuleNotFoundError:\n    print("missing")'
    )
    made = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert made.stdout == 'missing\n'


def test_the_command_does_not_import_pytorch(tmp_path):
    pytest.importorskip('torch')
    code = (
        'import sys, jaxtune.tasks.preflight, jaxtune.data.tokenizer as t; '
        'print(len(t.load("bytes")("abc")["input_ids"]), "torch.nn" in sys.modules)'
    )
    made = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert made.stdout.split() == ['3', 'False']
