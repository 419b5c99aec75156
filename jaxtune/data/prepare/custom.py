"""A function of the user's own as a filter, by its name in `data.steps.filter.custom`."""

import functools
from collections.abc import Callable

from jaxtune.common import imports
from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Document, Dropped, Step
from jaxtune.errors import blamed_on


@functools.cache
def custom(name: str) -> Callable[..., object]:
    """The function that `module:function` or `file.py:function` names.

    Raises:
      UserError: there is none.
    """
    return imports.function('data.steps.filter.custom', name)


def by_function(document: Document, settings: Settings) -> str:
    """Calls it with the text and its metadata: a text replaces the document's, False or None drops it.

    Raises:
      UserError: there is no such function, or it fails.
    """
    name, text = settings.steps.filter.custom, document.text
    function = custom(name)
    file = getattr(getattr(function, '__code__', None), 'co_filename', '')
    with blamed_on(f'data.steps.filter.custom={name}', file):
        verdict = function(text, document.metadata)
    if isinstance(verdict, str):
        return verdict
    return Dropped(name) if verdict is False or verdict is None else text


STEP = Step('custom', 'a rule of your own', by_function, on=lambda settings: bool(settings.steps.filter.custom))
