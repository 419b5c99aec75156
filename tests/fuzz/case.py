"""A case: one command over what was handed in, and how its end is judged.

The promise that is judged: exit status 0 with what was asked for; or 2 with one line on stderr that begins with
`jaxtune: ` and names the culprit. Never a traceback, a second line, a hang or somebody's code that is run.
"""

import dataclasses
import pathlib
import re

import forked


@dataclasses.dataclass
class Case:
    """One command.

    Attributes:
      kind: of what was mutated.
      what: how, in words.
      keys: the recipe, flat; empty where the maker wrote the recipe itself.
      flags: of the command line, beside the recipe.
      culprits: one of these must stand in the message if it is refused; () = not checked.
      must_fail: why it may not be accepted; '' = it may.
      long: it may rightly take very long.
      full: it is run to its end, not only checked.
    """

    kind: str
    what: str
    keys: dict = dataclasses.field(default_factory=dict)
    flags: list[str] = dataclasses.field(default_factory=list)
    culprits: tuple[str, ...] = ()
    must_fail: str = ''
    long: bool = False
    full: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is thought of an end.

    Attributes:
      word: `done`, `refused` or `long` (it may take so long) if it is as promised; `traceback`, `hang`, `killed`,
        `status`, `noisy`, `unnamed`, `accepted` or `executed` if not.
      text: what tells one bad end from another; of a refusal, its line.
      ended: how it ended.
    """

    word: str
    text: str
    ended: forked.Ended

    @property
    def good(self) -> bool:
        return self.word in ('done', 'refused', 'long')


def judge(case: Case, folder: pathlib.Path, ended: forked.Ended) -> Verdict:
    """Judges an end; `folder` is the case's, with the workdir `run/` in it."""
    word, text = _judged(case, folder, ended)
    if any(folder.rglob('RAN')):
        word, text = 'executed', f'code in a folder was run: {case.what[:80]}'
    return Verdict(word, text, ended)


def _judged(case: Case, folder: pathlib.Path, ended: forked.Ended) -> tuple[str, str]:
    if ended.late:
        return ('long' if case.long else 'hang'), f'no end: {case.what[:100]}'
    if ended.status < 0:
        return 'killed', f'signal {-ended.status}: {ended.stderr.strip()[-160:]}'
    if 'Traceback (most recent call last)' in ended.stderr:
        return 'traceback', _signature(ended.stderr)
    lines = ended.stderr.splitlines()
    if ended.status == 0:
        if case.must_fail:
            return 'accepted', case.must_fail
        if case.full and not any((folder / 'run').rglob('result.json')):
            return 'status', 'exit 0 without result.json'
        if not case.full and not (ended.stdout.splitlines() or [''])[-1].startswith('checked'):
            return 'status', 'exit 0 without saying what was checked'
        return ('noisy', _blurred(f'exit 0 and on stderr: {lines[0]}')) if lines else ('done', '')
    if ended.status != 2:
        return 'status', _blurred(f'exit {ended.status}: {ended.stderr.strip()[-160:]}')
    told = [line for line in lines if line.startswith('jaxtune: ')]
    if len(told) != 1 or ended.stderr.count('\n') != 1:
        other = next((line for line in lines if not line.startswith('jaxtune: ')), '')
        return 'noisy', _blurred(f'{len(lines)} lines on stderr: {other}')
    if case.culprits and not any(word in told[0] for word in case.culprits):
        return 'unnamed', f'names none of {", ".join(case.culprits)}: {told[0][:200]}'
    return 'refused', told[0]


_FRAME = re.compile(r'File "[^"]*?/(jaxtune/[^"]+)", line (\d+), in (\S+)')


def _signature(stderr: str) -> str:
    """What tells one traceback from another: its last exception, and the innermost frame inside jaxtune."""
    raised = [line for line in stderr.splitlines() if re.match(r'[\w.]+(Error|Exception|Interrupt|Exit)\b', line)]
    last = raised[-1] if raised else (stderr.strip().splitlines() or [''])[-1]
    frames = _FRAME.findall(stderr)
    where = f'{frames[-1][0]}:{frames[-1][1]} {frames[-1][2]}' if frames else '?'
    name, _, said = last.partition(':')
    return f'{name[:60]} at {where}: {_blurred(said)}'


def _blurred(text: str) -> str:
    return re.sub(r"'?/[^\s']*'?|\d+", '…', text.strip())[:140]
