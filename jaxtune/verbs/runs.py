"""`jaxtune runs [FOLDER]` and `jaxtune compare WORKDIR WORKDIR …`: what has been run, and which run is better."""

import pathlib
import textwrap
from collections.abc import Sequence

from jaxtune.common.io import write_text
from jaxtune.errors import UserError

_WIDTH = 80


def runs(words: Sequence[str]) -> None:
    """Prints the runs below a folder, `runs` by default, and writes its `index.html`.

    Raises:
      UserError: there is no such folder, or no run below it.
    """
    from jaxtune.report import listing  # slow to import

    folder = pathlib.Path(words[0] if words else 'runs').expanduser()
    if not folder.is_dir():
        raise UserError(f'jaxtune runs {folder}: no such folder; expected the one that your workdirs are in')
    found = listing.entries(folder)
    if not found:
        raise UserError(f'jaxtune runs {folder}: no run below it; expected the folder that your workdirs are in')
    for run in found:
        print(f'{run.path}: {run.state}')
        facts = ' · '.join(fact for fact in (run.what, run.best, run.time, run.day) if fact)
        print(textwrap.fill(facts, _WIDTH, initial_indent='    ', subsequent_indent='    '))
        if run.command:
            lines = textwrap.wrap(run.command, _WIDTH - 6, break_long_words=False, break_on_hyphens=False)
            print('    ' + ' \\\n      '.join(lines))
    write_text(folder / 'index.html', listing.page(folder, found))
    print(f'page: {(folder / "index.html").absolute().as_uri()}')


def compare(words: Sequence[str]) -> None:
    """Prints a table of runs, and writes a page of them to the current folder.

    Raises:
      UserError: fewer than two or more than eight workdirs, or one without a run.
    """
    from jaxtune.report import compare  # slow to import

    found = compare.open_runs([pathlib.Path(word).expanduser() for word in words])
    names = [run.name for run in found]
    indent = max(16, *(len(title) + 2 for title, _ in compare.table(found)))
    for number, name in enumerate(names, 1):
        print(f'{number}  {name}: {found[number - 1].state}')
    print(' ' * indent + ''.join(f'{number:>12}' for number in range(1, len(names) + 1)))
    for title, values in compare.table(found):
        print(f'{title:<{indent}}' + ''.join(f'{value + ("*" if best else ""):>12}' for value, best in values))
    print('* the best of them')
    if differences := compare.differing_keys(found):
        print('what differs:')
        for key, values in differences:
            print(
                textwrap.fill(f'{key}: {" | ".join(values)}', _WIDTH, initial_indent='    ', subsequent_indent=' ' * 8)
            )
    else:
        print('their recipes are the same')
    target = pathlib.Path('compare.html')
    write_text(target, compare.page(found))
    print(f'page: {target.absolute().as_uri()}')
