"""Counting: after each step, how many documents and bytes came in and stayed, why the rest went, and examples of it."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

_EXAMPLES, _EXCERPT = 3, 320
_LENGTHS = ('lengths_in', 'lengths_out')


class Stats:
    """Counts of one task; those of all tasks are added up in the tasks' order, so that the sum is always the same."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, Any]] = {}
        self.sources: dict[str, dict[str, Any]] = {}
        self.languages: dict[str, int] = {}
        self.broken: list[dict[str, str]] = []
        self.seconds: dict[str, float] = {}

    def step(self, name: str) -> dict[str, Any]:
        """The counts of a step, made where there are none yet."""
        if name not in self.steps:
            self.steps[name] = {
                'documents_in': 0, 'documents_out': 0, 'bytes_in': 0, 'bytes_out': 0, 'changed': 0,
                'dropped': {}, 'lengths_in': {}, 'lengths_out': {},
            }  # fmt: skip
        return self.steps[name]

    def passed(self, name: str, before: int, after: int, changed: bool = False) -> None:
        """A document went through a step: its bytes before and after."""
        step = self.step(name)
        step['documents_in'] += 1
        step['documents_out'] += 1
        step['bytes_in'] += before
        step['bytes_out'] += after
        step['changed'] += changed
        _count(step['lengths_in'], before)
        _count(step['lengths_out'], after)

    def dropped(self, name: str, size: int, reason: str, identity: str, text: str) -> None:
        """A document ended at a step."""
        step = self.step(name)
        step['documents_in'] += 1
        step['bytes_in'] += size
        _count(step['lengths_in'], size)
        entry = step['dropped'].setdefault(reason, {'documents': 0, 'bytes': 0, 'examples': []})
        entry['documents'] += 1
        entry['bytes'] += size
        if len(entry['examples']) < _EXAMPLES:
            entry['examples'].append({'id': identity, 'text': excerpt(text)})

    def source(self, label: str, name: str, size: int) -> None:
        """Counts a document of a source under `name` (`collected`, `kept`)."""
        entry = self.sources.setdefault(label, {})
        entry[name] = entry.get(name, 0) + 1
        entry[f'{name}_bytes'] = entry.get(f'{name}_bytes', 0) + size

    def set_aside(self, place: str, reason: str) -> None:
        """A file or record that could not be read."""
        self.broken.append({'place': place, 'reason': ' '.join(reason.split())[:300]})

    def state(self) -> dict[str, Any]:
        """All counts as JSON values, without the seconds: what is the same in every run."""
        return {name: value for name, value in vars(self).items() if name != 'seconds'}


def total(states: Iterable[dict[str, Any]], order: Sequence[str]) -> dict[str, Any]:
    """The sum of `Stats.state`s in their order.

    Args:
      states: of the tasks.
      order: names of all steps, as a document meets them.
    """
    whole = Stats()
    for state in states:
        for name, step in state['steps'].items():
            _add_step(whole.step(name), step)
        for label, counts in state['sources'].items():
            _add(whole.sources.setdefault(label, {}), counts)
        _add(whole.languages, state['languages'])
        whole.broken += state['broken']
    whole.steps = {name: _ordered(whole.steps[name]) for name in sorted(whole.steps, key=order.index)}
    return {**whole.state(), 'languages': dict(sorted(whole.languages.items(), key=lambda item: (-item[1], item[0])))}


def _ordered(step: dict[str, Any]) -> dict[str, Any]:
    """The same whatever the order of its making: the commonest reasons and the shortest lengths first."""
    dropped = sorted(step['dropped'].items(), key=lambda item: (-item[1]['documents'], item[0]))
    lengths = {name: dict(sorted(step[name].items(), key=lambda item: int(item[0]))) for name in _LENGTHS}
    return {**step, 'dropped': dict(dropped), **lengths}


def _add_step(into: dict[str, Any], step: dict[str, Any]) -> None:
    for name, value in step.items():
        if isinstance(value, int):
            into[name] += value
        elif name != 'dropped':
            _add(into[name], value)
    for reason, entry in step['dropped'].items():
        known = into['dropped'].setdefault(reason, {'documents': 0, 'bytes': 0, 'examples': []})
        known['documents'] += entry['documents']
        known['bytes'] += entry['bytes']
        known['examples'] += entry['examples'][: _EXAMPLES - len(known['examples'])]


def _add(into: dict[str, int], counts: dict[str, int]) -> None:
    for name, value in counts.items():
        into[name] = into.get(name, 0) + value


def _count(histogram: dict[str, int], size: int) -> None:
    """Bins are powers of two: bin `n` holds documents of `2**n` bytes up to the next."""
    name = str(int(math.log2(size)) if size else 0)
    histogram[name] = histogram.get(name, 0) + 1


def excerpt(text: str) -> str:
    """The beginning of a text."""
    return text if len(text) <= _EXCERPT else text[:_EXCERPT].rstrip() + ' …'
