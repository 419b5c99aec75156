"""The command: `python -m jaxtune.main --config configs/RECIPE.py [--workdir DIR] [--check] [--config.KEY=VALUE ...]`.

`jaxtune VERB …` is short for it.

Exit status: 0 done · 2 the recipe, the data or the model is wrong · 130 stopped by Ctrl-C and 143 by SIGTERM,
training after saving a checkpoint; the same command continues.
"""

import os
import sys
from collections.abc import Sequence

from jaxtune.common import huge_pages, preemption, streams
from jaxtune.errors import line_of

# Threads of the tokenizers library are started before data threads fork nothing; without this it warns on every run.
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'true')


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns its exit status."""
    with preemption.handled():
        from jaxtune.common import console  # slow to import

        console.quiet_logs()  # read by libraries when they are imported, which the check of a plug-in's name does
        from jaxtune.recipe import flags  # slow to import
        from jaxtune.verbs.expand import expand  # slow to import

        try:
            if (words := expand(argv)) is None:
                return 0
            command = flags.parse(words)
            from jaxtune.parallel import hosts  # slow to import

            with hosts.pod():
                console.set_primary(hosts.is_primary())
                from jaxtune.tasks import pipeline  # slow to import

                pipeline.run(command)
        except Exception as error:
            if not (said := line_of(error)):
                raise
            streams.tell(f'jaxtune: {said}')
            return 2
    return 0


def cli() -> None:
    """Entry point of the `jaxtune` command."""
    preemption.hold()
    huge_pages.begin()
    preemption.install()
    streams.open_all()
    status = main(sys.argv)
    preemption.finish()
    sys.exit(status)


if __name__ == '__main__':
    cli()
