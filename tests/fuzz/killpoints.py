"""Kills at changes of the file system and at random moments; afterwards the same command must leave the same bytes.

    tests/fuzz/killpoints.py --kills 150 [--tasks train,lora,…] [--seed S] [--keep FOLDER]

Half of each task's kills are SIGKILL at the moment before it changes the file system, half at a random moment: there
one in three is SIGTERM, after which the program may save and leaves with 143. Exit status 0 if every task ended as
the uninterrupted run did, with its report.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence

import forked
from made import Made, recipe_text

TASKS = ('train', 'lora', 'ppo', 'grpo', 'generate', 'evaluate', 'export', 'prepare', 'phases', 'compile')
_CHANGES = ('os.rename', 'os.mkdir', 'os.remove', 'os.rmdir', 'os.truncate', 'os.link', 'os.symlink')
_TRIES = 8  # kills of one run before it is left to end
# What a run leaves that must be the same, beside its metrics; the rest says when it ran, and how long.
_KEPT = ('export/*', 'adapter/*', 'train/*', 'eval/*', 'tokenizer/*', '*.jsonl', 'manifest.json', 'stats.json')
_TIMES = ('second', 'bytes', 'mfu', 'time/')
# What of a report tells its time or place; all the rest of it must be the same.
_TIMELY = tuple(re.compile(pattern, re.DOTALL) for pattern in (
    r'<title>.*?</title>', r'<h1>.*?</h1>', r'<p class="eyebrow">.*?</p>',
    r'<div class="tile"><dt>(?:Time|Goodput|Tokens a second|An update)</dt>.*?</div>',
    r'<figure[^>]*><figcaption><b>[^<]*(?: second|utilisation|memory|Time|Goodput)[^<]*</b>.*?</figure>',
    r'<div class="stack".*?</ul>', r'<tr>(?:(?!</tr>).)*(?:second|bytes|mfu|time/)(?:(?!</tr>).)*</tr>',
    r'<dt>(?:Started|Ended)</dt><dd>.*?</dd>', r'<dd>[^<]*FLOPs a second[^<]*</dd>',
    r'of [\d.]+ .iB(?: a device)?(?=[:.])',  # of what this machine has free
))  # fmt: skip


def recipe(made: Made, task: str, updates: int) -> dict:
    """The keys of a run that saves often."""
    if task == 'compile':
        return made.base() | {'task': 'compile'}
    keys, few = made.task(task), max(4, updates // 8)
    if task in ('train', 'lora'):
        return keys | {'train.steps': updates, 'checkpoint.every': 3, 'eval.every': 5 if task == 'train' else 0}
    if task in ('ppo', 'grpo'):
        held = {'data.eval': str(made.data / 'prompt.eval.jsonl'), 'eval.every': 2}
        return keys | held | {'train.steps': few, 'checkpoint.every': 2}
    if task == 'generate':
        return keys | {'generate.prompts': 0, 'generate.batch_size': 2, 'data.eval': str(made.data / 'prompt.jsonl')}
    if task in ('prepare', 'phases'):
        del keys['tokenizer.path']
        steps = {'data.steps.dedup.substring': 10} if task == 'phases' else {}
        return keys | steps | {'data.vocab_size': 400, 'data.eval_fraction': 0.2}
    return keys


def left(run: pathlib.Path) -> dict[str, str]:
    """What a run left: file -> a hash of its bytes; of the metrics and the report what tells no time."""
    found = {}
    for file in sorted({file for pattern in _KEPT for file in run.glob(pattern)}):
        if file.is_file() and file.name != 'metrics.jsonl':
            found[str(file.relative_to(run))] = _hash(file.read_bytes().replace(str(run).encode(), b'RUN'))
    for name in ('metrics.jsonl', 'result.json'):
        if (run / name).is_file():
            rows = [json.loads(line) for line in (run / name).read_text().splitlines()] if 'jsonl' in name else []
            rows = rows or [json.loads((run / name).read_text()).get('metrics', {})]
            rows = [{key: row[key] for key in row if not any(part in key for part in _TIMES)} for row in rows]
            found[name] = _hash(json.dumps(rows, sort_keys=True).encode())
    report = run / 'report.html'
    found['report.html'] = _hash(_timeless(report, run).encode()) if report.is_file() else 'none'
    half = [file.name for file in run.glob('.*') if file.name != '.jaxtune']
    return found | ({'half-written': ', '.join(half)} if half else {})


def _timeless(report: pathlib.Path, run: pathlib.Path) -> str:
    text = re.sub(r'>\s+<', '><', report.read_text('utf-8')).replace(str(run), 'RUN')
    for pattern in _TIMELY:
        text = pattern.sub('', text)
    return text


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _arm(number: int, log: pathlib.Path | None = None) -> None:
    """Kills this process before its `number`th change of the file system; with `log`, only writes them down."""
    seen, me = 0, os.getpid()
    notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None

    def hook(event, args):
        nonlocal seen
        if os.getpid() != me or event not in (*_CHANGES, 'open'):
            return
        writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR) if event == 'open' else True
        if not writes or '/compiled' in str(args[0]) or str(args[0]).startswith('/dev/'):
            return
        seen += 1
        if notes is not None:
            os.write(notes, f'{event} {str(args[0])[-90:]}\n'.encode())
        elif seen == number:
            os.kill(me, signal.SIGKILL)

    sys.addaudithook(hook)


class Task:
    """One task's kills.

    Args:
      made: what its recipe is made of.
      name: of `TASKS`.
      root: a folder for its runs.
      updates: of a training.
    """

    def __init__(self, made: Made, name: str, root: pathlib.Path, updates: int):
        self.name, self.root, self.kills, self.bad = name, root, 0, []
        root.mkdir(parents=True)
        (root / 'recipe.py').write_text(recipe_text(recipe(made, name, updates)))
        log = root / 'changes'
        first = self._run('first')
        second = self._run('whole', first=lambda: _arm(0, log))
        if first.status or second.status:
            raise RuntimeError(
                f'{name}: exit {first.status}, {second.status}: {(first.stderr + second.stderr)[-2000:]}'
            )
        self.seconds, self.changes = second.seconds, log.read_text().splitlines()
        self.expected = left(root / 'whole')
        if (other := left(root / 'first')) != self.expected:
            self.bad.append(f'two uninterrupted runs differ in {self._differing(other)}')

    def _run(self, name: str, **how) -> forked.Ended:
        words = ['--config', self.root / 'recipe.py', '--workdir', self.root / name]
        return forked.run(words, self.root / f'{name}.log', timeout=300, memory=0, **how)

    def _differing(self, found: dict[str, str]) -> list[str]:
        return sorted(name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name))

    def _check(self, name: str, ended: forked.Ended, what: str) -> None:
        found = left(self.root / name)
        if ended.status or found != self.expected:
            said = f'{self.name}: {what}: then exit {ended.status}, differs in {self._differing(found)}'
            self.bad.append(f'{said}: {ended.stderr[-500:]}')
        else:
            shutil.rmtree(self.root / name)
            shutil.rmtree(self.root / f'{name}.log')

    def at_changes(self, numbers: Sequence[int]) -> None:
        """Kills once before each of these changes of the file system."""
        for number in numbers:
            name = f'change{number}'
            ended = self._run(name, first=lambda number=number: _arm(number))
            self.kills += ended.status == -signal.SIGKILL
            self._check(name, self._run(name), f'killed at {number} ({self.changes[number - 1]})')

    def at_moments(self, rng: random.Random, count: int) -> None:
        """Kills so many times at random moments, several times the same run."""
        number, waiting = 0, count
        while waiting > 0:
            number, tries, said = number + 1, 0, []
            name, ended = f'moment{number}', None
            while waiting > 0 and tries < _TRIES:
                after, term = rng.uniform(0.05, 1.0) * self.seconds, rng.random() < 1 / 3
                sent = signal.SIGTERM if term else signal.SIGKILL
                ended = self._run(name, kill_after=after, signal_to_send=sent)
                tries, waiting = tries + 1, waiting - 1
                self.kills += ended.status in (-signal.SIGKILL, 143)
                said.append(f'{sent.name} after {after:.2f} s: {ended.status}')
                if ended.status not in (0, -signal.SIGKILL, 143):
                    self.bad.append(f'{self.name}: {said[-1]}: {ended.stderr[-500:]}')
                if ended.status == 0:
                    break
            if ended.status:
                ended = self._run(name)
            self._check(name, ended, '; '.join(said))


def run_all(
    made: Made, tasks: Sequence[str], kills: int, seed: int, root: pathlib.Path, updates: int = 24
) -> list[str]:
    """Kills so many times over all the tasks; returns what went wrong."""
    bad = []
    for number, name in enumerate(tasks):
        rng, share = random.Random(f'{seed}:{name}'), kills // len(tasks) + (number < kills % len(tasks))
        task = Task(made, name, root / name, updates)
        changes = rng.sample(range(1, len(task.changes) + 1), min(-(-share // 2), len(task.changes)))
        task.at_changes(sorted(changes))
        task.at_moments(rng, share - len(changes))
        print(f'{name}: {len(task.changes)} changes, {task.kills} kills, {len(task.bad)} bad', flush=True)
        bad += task.bad
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=30)
    parser.add_argument('--tasks', default=','.join(TASKS))
    parser.add_argument('--updates', type=int, default=24, help='of a training')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--keep', default='', help='a folder for the runs that ended badly')
    arguments = parser.parse_args()
    tasks = [name for name in arguments.tasks.split(',') if name]
    if unknown := set(tasks) - set(TASKS):
        parser.error(f'--tasks: {", ".join(unknown)}: expected some of {", ".join(TASKS)}')
    forked.preload()
    root = pathlib.Path(arguments.keep or tempfile.mkdtemp(prefix='jaxtune-kill-'))
    bad = run_all(Made(), tasks, arguments.kills, arguments.seed, root, arguments.updates)
    print('\n'.join([*bad, f'{len(bad)} bad']))
    if not arguments.keep:
        shutil.rmtree(root, ignore_errors=True)
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
