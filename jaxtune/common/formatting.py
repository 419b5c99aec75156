"""Human-readable quantities."""


def amount(value: float) -> str:
    """`987`, `12.3K`, `5.25M`, `1.1B`, `2.4T`: three digits."""
    for limit, suffix in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'K')):
        if abs(value) >= 0.9995 * limit:
            return f'{value / limit:.3g}{suffix}' if abs(value) < 999.5 * limit else f'{value / limit:,.0f}{suffix}'
    return f'{value:.3g}' if value != int(value) else f'{int(value)}'


def size(count: float) -> str:
    """Bytes: `12 B`, `3.4 KiB`, `51.2 MiB`, `16 GiB`."""
    for power, unit in ((4, 'TiB'), (3, 'GiB'), (2, 'MiB'), (1, 'KiB')):
        scaled = count / 1024**power
        if scaled >= 0.9995:
            return f'{scaled:.0f} {unit}' if scaled >= 100 else f'{scaled:.3g} {unit}'
    return f'{count:.0f} B'


def short_time(seconds: float) -> str:
    """`1.65 s`, `23.4 ms`, `0.12 ms`: three digits."""
    return f'{seconds:.3g} s' if seconds >= 0.9995 else f'{1000 * seconds:.3g} ms'


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `5 min 12 s`, `3 h 07 min`, `2 d 4 h`."""
    if seconds < 9.95:
        return f'{seconds:.1f} s'
    whole = round(seconds)
    if whole < 60:
        return f'{whole} s'
    if whole < 3600:
        return f'{whole // 60} min {whole % 60:02} s'
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f'{minutes // 60} h {minutes % 60:02} min'
    hours = round(seconds / 3600)
    return f'{hours // 24} d {hours % 24} h'
