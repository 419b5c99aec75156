"""Fuzzing what a person hands in: recipes, data, model folders, adapters, workdirs, documents, templates, rewards.

    tests/fuzz/fuzz.py --seed S --count N [--kinds recipe,data,…] [--only NUMBER] [--keep FOLDER] [--log FILE]

Each case is one command, with `--check` or to its end, over something mutated; case N of a seed is always the same.
Exit status 0 if all ended as promised (see `case.py`), else 1. What the cases are made of is kept in $JAXTUNE_FUZZ.
"""

import argparse
import collections
import json
import pathlib
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence

import folders
import forked
import kinds
from case import Case, Verdict, judge
from made import Made, recipe_text

# Who makes the cases of a kind, and how many of them there are.
KINDS = {
    'recipe': (kinds.recipe, 14), 'data': (kinds.data, 10), 'model': (folders.model, 10),
    'adapter': (folders.adapter, 4), 'workdir': (kinds.workdir, 1), 'documents': (kinds.documents, 4),
    'xml': (kinds.xml, 3), 'template': (kinds.template, 5), 'reward': (kinds.reward, 1), 'source': (kinds.source, 1),
}  # fmt: skip
_LONG_SECONDS = 8.0  # for a case that may rightly take very long


def run_case(
    made: Made, seed: int, number: int, root: pathlib.Path, names: Sequence[str] = tuple(KINDS), timeout: float = 60.0
) -> tuple[Case, Verdict, pathlib.Path]:
    """Makes and runs case `number` of a seed in a folder of its own below `root`."""
    rng = random.Random(f'{seed}:{number}')
    (kind,) = rng.choices(names, [KINDS[name][1] for name in names])
    folder = root / f'{number:06d}'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    case = KINDS[kind][0](made, rng, folder)
    if case.keys:
        (folder / 'recipe.py').write_bytes(recipe_text(case.keys).encode('utf-8', 'surrogateescape'))
    words = ['--config', str(folder / 'recipe.py'), '--workdir', str(folder / 'run'), *case.flags]
    words += [] if case.full else ['--check']
    ended = forked.run(words, folder, timeout=min(timeout, _LONG_SECONDS) if case.long else timeout)
    return case, judge(case, folder, ended), folder


def run_all(made: Made, seed: int, numbers: Sequence[int], root: pathlib.Path, **how) -> Iterator[tuple]:
    """`(number, case, verdict)` of cases; the folders of good ones are removed."""
    for number in numbers:
        case, verdict, folder = run_case(made, seed, number, root, **how)
        if verdict.good:
            shutil.rmtree(folder, ignore_errors=True)
        yield number, case, verdict


def summary(found: list[tuple[int, Case, Verdict]]) -> str:
    """What ended otherwise than promised, most frequent first."""
    bad = collections.defaultdict(list)
    for number, case, verdict in found:
        if not verdict.good:
            bad[verdict.word, verdict.text].append((number, case))
    lines = []
    for (word, text), cases in sorted(bad.items(), key=lambda item: -len(item[1])):
        number, case = cases[0]
        lines += [f'{len(cases):4} {word}: {text}', f'       case {number} ({case.kind}): {case.what[:160]}']
    seconds = sum(verdict.ended.cpu for *_, verdict in found)
    total = sum(map(len, bad.values()))
    return '\n'.join([*lines, f'{len(found)} cases, {total} unexpected in {len(bad)} kinds, {seconds:.0f} s of CPU'])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--count', type=int, default=100)
    parser.add_argument('--start', type=int, default=0, help='number of the first case')
    parser.add_argument('--only', type=int, help='run this one case, print what it says and keep its folder')
    parser.add_argument('--kinds', default=','.join(KINDS))
    parser.add_argument('--timeout', type=float, default=60.0, help='seconds a case')
    parser.add_argument('--keep', default='', help='a folder for the cases that ended badly')
    parser.add_argument('--log', default='', help='a file for a line of JSON a case')
    arguments = parser.parse_args()
    names = tuple(name for name in arguments.kinds.split(',') if name)
    if unknown := set(names) - set(KINDS):
        parser.error(f'--kinds: {", ".join(unknown)}: expected some of {", ".join(KINDS)}')
    forked.preload()
    made = Made()
    root = pathlib.Path(arguments.keep or tempfile.mkdtemp(prefix='jaxtune-fuzz-'))
    how = {'names': names, 'timeout': arguments.timeout}
    if arguments.only is not None:
        case, verdict, folder = run_case(made, arguments.seed, arguments.only, root, **how)
        print(folder, case.what, f'{verdict.word}: {verdict.text}', verdict.ended.stderr, sep='\n')
        return 0 if verdict.good else 1
    found, counts = [], collections.Counter()
    numbers = range(arguments.start, arguments.start + arguments.count)
    for number, case, verdict in run_all(made, arguments.seed, numbers, root, **how):
        found.append((number, case, verdict))
        counts[case.kind, verdict.word] += 1
        if arguments.log:
            row = {'number': number, 'kind': case.kind, 'what': case.what, 'verdict': verdict.word}
            row |= {'text': verdict.text, 'seconds': verdict.ended.seconds, 'cpu': verdict.ended.cpu}
            with open(arguments.log, 'a', encoding='utf-8') as file:
                file.write(json.dumps(row) + '\n')
    for (kind, word), count in sorted(counts.items()):
        print(f'{kind:10} {word:10} {count}')
    print(summary(found))
    if not arguments.keep:
        shutil.rmtree(root, ignore_errors=True)
    return 0 if all(verdict.good for *_, verdict in found) else 1


if __name__ == '__main__':
    sys.exit(main())
