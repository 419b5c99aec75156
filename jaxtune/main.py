"""The door: `python -m jaxtune.main --config configs/RECIPE.py [--workdir DIR] [--check] [--config.KEY=VALUE ...]`.

Exit status: 0 done · 2 the recipe, the data or the model handed in is wrong · 143 stopped by SIGTERM after saving a
checkpoint, the same command continues.
"""

import os
import sys
from collections.abc import Sequence

from jaxtune import huge_pages
from jaxtune.errors import UserError, out_of_memory

# Threads of the tokenizers library are started before data threads fork nothing; without this it warns on every run.
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'true')


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns its exit status."""
    from jaxtune import flags

    try:
        command = flags.parse(argv)
        from jaxtune import console, interrupt
        from jaxtune.parallel import hosts

        console.quiet_logs()
        interrupt.install()
        with hosts.pod():
            console.set_primary(hosts.is_primary())
            from jaxtune import stages

            stages.run(command)
    except UserError as error:
        print(f'jaxtune: {" ".join(str(error).split())}', file=sys.stderr)
        return 2
    except Exception as error:
        if not (said := out_of_memory(error)):
            raise
        print(f'jaxtune: {said}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('jaxtune: interrupted; the same command continues', file=sys.stderr)
        return 130
    return 0


def cli() -> None:
    """Entry point of the `jaxtune` command."""
    huge_pages.begin()
    sys.exit(main(sys.argv))


if __name__ == '__main__':
    cli()
