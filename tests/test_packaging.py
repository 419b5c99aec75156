"""What is imported is declared in pyproject.toml, in the right extra, and what is declared is used."""

import ast
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']

# Modules that are not called as their distributions are.
MODULES = {'absl-py': 'absl', 'fasttext-numpy2': 'fasttext', 'orbax-checkpoint': 'orbax'}
# Where the package may import what an extra brings: nobody else needs the extra.
EXTRAS = {
    'data': ('data/prepare/',),
    'eval': ('lm_eval.py', 'generation/text_metrics.py'),
    'fasttext': ('data/prepare/language.py',),
    'gguf': ('pretrained/gguf_', 'pretrained/q4_k.py'),
    'serve': ('serving/',),
    'ray': ('data/prepare/engines.py',),
    'wandb': ('metrics/writer.py',),
}
# Declared, and not imported: tools, plug-ins, and what others need without saying so.
NOT_IMPORTED = {'import_linter', 'lxml_html_clean', 'pre_commit', 'pyright', 'pytest_xdist', 'ruff'}
# Imported where it is there, to compare with.
OPTIONAL = {'spacy'}


def declared(requirements: list[str]) -> set[str]:
    names = {re.match(r'[\w.-]+', requirement)[0] for requirement in requirements}
    return {MODULES.get(name, name.replace('-', '_')) for name in names} - {'jaxtune'}


def imported(path: pathlib.Path) -> Iterator[str]:
    """Top-level modules that a file imports, `pytest.importorskip('name')` among them."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == 'pytest.importorskip':
            names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        else:
            continue
        yield from (top for name in names if (top := name.split('.')[0]) not in sys.stdlib_module_names)


def of_others(*folders: str) -> dict[str, set[pathlib.Path]]:
    """Modules from outside this repository that the Python files of folders import -> those files."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob('*.py'))]
    # The package is imported by its own name alone; tests import each other as top-level modules.
    own = {'jaxtune'} if folders == ('jaxtune',) else {'jaxtune', *(path.stem for path in files)}
    found: dict[str, set[pathlib.Path]] = {}
    for path in files:
        for name in imported(path):
            if name not in own:
                found.setdefault(name, set()).add(path)
    return found


BASE = declared(PROJECT['dependencies'])
EXTRA = {name: declared(requirements) for name, requirements in PROJECT['optional-dependencies'].items()}


def test_what_the_package_imports_is_declared():
    package = of_others('jaxtune')
    for name, files in package.items():
        if name in BASE:
            continue
        for path in files:
            place = path.relative_to(ROOT / 'jaxtune').as_posix()
            allowed = {extra for extra, places in EXTRAS.items() if place.startswith(places)}
            assert any(name in EXTRA[extra] for extra in allowed), f'{place} imports {name}'
    for extra in EXTRAS:
        assert EXTRA[extra] - NOT_IMPORTED <= package.keys(), extra
    assert package.keys() >= BASE


def test_what_the_tests_import_is_declared():
    used = of_others('tests', 'benchmarks', 'configs')
    known = BASE | OPTIONAL | EXTRA['test'] | set().union(*(EXTRA[name] for name in EXTRAS))
    assert used.keys() <= known
    assert EXTRA['test'] - NOT_IMPORTED <= used.keys()


def test_files_of_the_package_are_declared():
    """What lies beside the modules is installed with them."""
    data = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['tool']['setuptools']['package-data']
    there = {
        path
        for path in (ROOT / 'jaxtune').rglob('*')
        if path.is_file() and path.suffix not in ('.py', '.pyc') and not path.name.startswith('.')
    }
    installed = {
        path
        for package, patterns in data.items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split('.')).glob(pattern)
    }
    assert installed == there


def test_the_lock_has_what_is_needed():
    lines = (ROOT / 'requirements.lock').read_text(encoding='utf-8').splitlines()[1:]
    assert all(re.fullmatch(r'[\w.-]+==[\w.!]+', line) for line in lines)
    locked = {name.lower() for name in declared(lines)}
    assert locked >= {name.lower() for name in BASE | EXTRA['data'] | EXTRA['eval']}
