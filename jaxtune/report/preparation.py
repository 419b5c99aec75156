"""What a preparation did: where documents came from, what each step left of them, what went and why."""

import html
from collections.abc import Mapping
from typing import Any

from jaxtune.common.formatting import amount, size
from jaxtune.report.source import Source

_MOST_BROKEN, _MOST_LANGUAGES = 20, 12


def preparation(source: Source) -> str:
    """The whole part; '' for a run without statistics."""
    stats = source.stats
    if not stats:
        return ''
    parts = (_sources(stats, source), _steps(stats, source), _dropped(stats), _figures(stats), _broken(stats))
    return ''.join(parts)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _sources(stats: Mapping, source: Source) -> str:
    rows = stats['sources']
    unit = 'tokens' if any('tokens' in counts for counts in rows.values()) else 'copies'
    total = sum(counts.get(unit, 0) for counts in rows.values()) or 1
    hues = ('step', 'eval-phase', 'data', 'compile', 'checkpoint', 'load', 'export', 'other')
    bar = ''.join(
        f'<i style="flex:{counts.get(unit, 0) / total:.5f};background:var(--{hues[i % len(hues)]})" '
        f'title="{_text(label)}"></i>'
        for i, (label, counts) in enumerate(rows.items())
        if counts.get(unit)
    )
    cells = ''.join(
        f'<tr><td><i class="dot" style="background:var(--{hues[i % len(hues)]})"></i><b>{_text(label)}</b></td>'
        f'<td class="mute">{_text(_path(source, label))}</td>'
        f'<td class="number">{counts.get("collected", 0):,}</td>'
        f'<td class="number">{size(counts.get("collected_bytes", 0))}</td>'
        f'<td class="number">{counts.get("kept", 0):,}</td><td class="number">{size(counts.get("kept_bytes", 0))}</td>'
        f'<td class="number">{amount(counts.get(unit, 0))}</td>'
        f'<td class="number">{100 * counts.get(unit, 0) / total:.1f} %</td></tr>'
        for i, (label, counts) in enumerate(rows.items())
    )
    unit_name = 'tokens' if unit == 'tokens' else 'records'
    return (
        f'<h3>The mixture, by {unit_name}</h3><div class="card"><div class="stack" aria-hidden="true">{bar}</div>'
        '<table class="counts"><tr><th>source</th><th></th><th class="number">collected</th><th></th>'
        f'<th class="number">kept</th><th></th><th class="number">{unit_name}</th><th></th></tr>{cells}</table></div>'
    )


def _path(source: Source, label: str) -> str:
    entry = source.key(f'data.sources.{label}')
    if isinstance(entry, Mapping):
        weight = entry.get('weight', 1)
        return f'{entry.get("path", "")}{f" × {weight:g}" if weight != 1 else ""}'
    return str(entry or source.key('data.train') or '')


def _steps(stats: Mapping, source: Source) -> str:
    widest = max((step['bytes_in'] for step in stats['steps'].values()), default=1) or 1
    seconds, about = source.run.get('step_seconds') or {}, source.run.get('step_about') or {}
    rows = []
    for name, step in stats['steps'].items():
        came, stayed = step['documents_in'], step['documents_out']
        share = 100 * stayed / came if came else 100.0
        gone = 100 * (step['bytes_in'] - step['bytes_out']) / widest
        left = 100 * step['bytes_out'] / widest
        notes = []
        if step['changed']:
            notes.append(f'{step["changed"]:,} changed')
        if spent := seconds.get(name):
            rate = step['bytes_in'] / 1e6 / spent
            notes.append((f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}') + ' MB/s a core')
        rows.append(
            f'<div class="step"><div><b>{_text(name)}</b><small>{_text(about.get(name, ""))}</small></div>'
            f'<div><div class="flow" title="{size(step["bytes_in"])} in, {size(step["bytes_out"])} stayed">'
            f'<i style="width:{left:.2f}%"></i><i class="gone" style="width:{max(gone, 0):.2f}%"></i></div>'
            f'<small>{size(step["bytes_in"])} → {size(step["bytes_out"])}'
            f'{" · " + " · ".join(notes) if notes else ""}</small></div>'
            f'<div class="number"><b>{stayed:,}</b> of {came:,}<small>{share:.4g} % stayed</small></div></div>'
        )
    return f'<h3>What each step left, by bytes</h3><div class="card steps">{"".join(rows)}</div>'


def _dropped(stats: Mapping) -> str:
    rows = [
        (step, reason, entry) for step, counts in stats['steps'].items() for reason, entry in counts['dropped'].items()
    ]
    if not rows:
        return ''
    most = max(entry['documents'] for _, _, entry in rows)
    details = []
    for step, reason, entry in sorted(rows, key=lambda row: -row[2]['documents']):
        examples = ''.join(
            f'<article class="sample"><p>{_text(example["id"])}</p><pre>{_text(example["text"])}</pre></article>'
            for example in entry['examples']
        )
        details.append(
            f'<details class="reason"><summary><span>{_text(reason)} <small>{_text(step)}</small></span>'
            f'<span class="flow"><i class="gone" style="width:{100 * entry["documents"] / most:.2f}%"></i></span>'
            f'<span class="number"><b>{entry["documents"]:,}</b> <small>{size(entry["bytes"])}</small></span></summary>'
            f'<div class="samples">{examples}</div></details>'
        )
    return f'<h3>Why documents went; each opens to examples</h3><div class="card">{"".join(details)}</div>'


def _figures(stats: Mapping) -> str:
    return f'<div class="pair">{_lengths(stats)}{_languages(stats)}</div>'


def _lengths(stats: Mapping) -> str:
    steps = stats['steps']
    first = steps.get('length') or {}
    last = steps.get('near-duplicates') or steps.get('exact duplicates') or {}
    came = {int(name): count for name, count in first.get('lengths_in', {}).items()}
    stayed = {int(name): count for name, count in last.get('lengths_out', {}).items()}
    if not came:
        return ''
    low, high = min(came), max(came)
    most = max(*came.values(), *stayed.values(), 1)
    bars = ''.join(
        f'<div title="{size(2**n)} to {size(2 ** (n + 1))}: {came.get(n, 0):,} came, {stayed.get(n, 0):,} stayed">'
        f'<i class="gone" style="height:{100 * came.get(n, 0) / most:.2f}%"></i>'
        f'<i style="height:{100 * stayed.get(n, 0) / most:.2f}%"></i>'
        f'<span>{size(2**n) if n % 2 == 0 else ""}</span></div>'
        for n in range(low, high + 1)
    )
    return (
        '<div><h3>Lengths of documents, <span class="swatch gone"></span>collected and '
        f'<span class="swatch"></span>kept</h3><div class="card"><div class="histogram">{bars}</div></div></div>'
    )


def _languages(stats: Mapping) -> str:
    rows = sorted(stats['languages'].items(), key=lambda item: -item[1])[:_MOST_LANGUAGES]
    if not rows:
        return ''
    most = rows[0][1]
    bars = ''.join(
        f'<div class="row"><span>{_text(name or "not told")}</span><span class="flow"><i style="width:'
        f'{100 * count / most:.2f}%"></i></span><span class="number">{count:,}</span></div>'
        for name, count in rows
    )
    return f'<div><h3>Languages of the documents that passed</h3><div class="card">{bars}</div></div>'


def _broken(stats: Mapping) -> str:
    broken = stats['broken']
    if not broken:
        return ''
    rows = ''.join(
        f'<tr><td><code>{_text(row["place"])}</code></td><td>{_text(row["reason"])}</td></tr>'
        for row in broken[:_MOST_BROKEN]
    )
    more = len(broken) - _MOST_BROKEN
    note = f'<p class="hint">{more:,} more are in set_aside.jsonl.</p>' if more > 0 else ''
    return (
        f'<h3>Set aside: {len(broken):,} that could not be read</h3><div class="card"><table>{rows}</table>{note}</div>'
    )
