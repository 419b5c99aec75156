"""The recipes that come with jaxtune: `configs/` of the checkout, or of the installed package."""

import ast
import difflib
import functools
import pathlib
import sysconfig

_PLACES = (
    pathlib.Path(__file__).resolve().parents[2] / 'configs',
    pathlib.Path(sysconfig.get_path('data')) / 'share' / 'jaxtune' / 'configs',
)


@functools.cache
def folder() -> pathlib.Path:
    """Where they lie."""
    return next((place for place in _PLACES if (place / 'quickstart.py').is_file()), _PLACES[0])


def names() -> list[str]:
    """Their names, in order."""
    return sorted(file.stem for file in folder().glob('*.py'))


def find(name: str) -> str:
    """The path of the recipe that a name such as `sft` means; '' if there is none."""
    return shown_path(folder() / f'{name}.py') if name in names() else ''


def nearest(name: str) -> str:
    """The name of a recipe that is close to a misspelt one, or ''."""
    return next(iter(difflib.get_close_matches(pathlib.Path(name).stem, names(), 1)), '')


def shown_path(path: pathlib.Path) -> str:
    """A path as short as it can be typed here."""
    here = pathlib.Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def about(name: str) -> str:
    """The first line of a recipe's docstring; the recipe is not run."""
    docstring = ast.get_docstring(ast.parse((folder() / f'{name}.py').read_text(encoding='utf-8'))) or ''
    return docstring.splitlines()[0] if docstring else ''
