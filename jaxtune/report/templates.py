"""The report's templates, filled in."""

import importlib.resources
from collections.abc import Mapping
from typing import Any


def fill_in(name: str, values: Mapping[str, Any]) -> str:
    """A self-contained page.

    Args:
      name: of the template.
      values: its variables, but the style and the script.
    """
    # Not needed by the first line of a run.
    import jinja2  # slow to import

    files = importlib.resources.files('jaxtune.report')

    def read(name: str) -> str:
        return files.joinpath(name).read_text(encoding='utf-8')

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies['json.dumps_kwargs'] = {}  # keys in their order
    return environment.get_template(name).render(values, style=read('style.css'), script=read('hover.js'))
