"""Mutations of JSON values, of bytes and of a recipe's values: each says what it did."""

import copy
import gzip
import json
import random
from typing import Any

from made import Source

# Values of a recipe's key, as Python source: what a hurried or hostile person may write there.
VALUES = tuple(
    Source(text)
    for text in (
        'None', 'True', 'False', '0', '-1', '1', '2', '3', '7', '1.5', '-0.0', '1e-300', '1e300', "float('nan')",
        "float('inf')", "-float('inf')", '2**31', '2**32', '2**63', '2**64', '10**30', '-10**30', '9**9999', "''",
        "'x'", "'0'", "'-1'", "'nan'", "'1.5'", "'\\0'", "'a\\0b'", "'\\ud800'", "'é 日本'", "'~nobody_here/x'", "'/'",
        "'.'", "'..'", "'/dev/null'", "'/dev/zero'", "'/proc/self/environ'", "'x' * 5000", "'9' * 5000", "'@x'",
        "'@../../x'", "'bytes'", "'python-stdlib'", "'org/name'", "'a:b'", "'os:getcwd'", "'os:_exit'",
        "'sys:exit'", "'[' * 3000", "'(' * 90 + '1'", "'{{ 1 }}'", "'{% for'", "'**/*'", "'a,b'", "','", "'q_proj=1'",
        "'0:1'", "'9:1'", "' '", "'\\n'", "'<b>'", '()', '(1,)', "('x',)", "('',)", '(None,)',
        '[]', "['x', 1]", '[[[]]]',
        '{}', "{'x': 1}", '{1: 2}', "b'x'", 'set()', 'object()', 'lambda: 1', 'ConfigDict()', "ConfigDict({'x': 1})",
        "__import__('numpy').int64(3)", "__import__('numpy').float32(0.5)", "__import__('numpy').zeros(3)",
        "__import__('pathlib').Path('/x')", '3+4j', 'range(3)', 'int', '...',
    )
)  # fmt: skip
# Values of a key on the command line.
WORDS = (
    '', 'None', 'True', 'x', '0', '-1', '1', '3', '1.5', 'nan', 'inf', '-inf', '1e300', str(2**31), str(2**63),
    str(2**64), '9' * 5000, "'", '"', '(', '()', '(1,)', "('x',)", '[', '[]', '{}', "{'x':1}", '\\', 'a=b', '--x',
    '@x', '@../../x', '~nobody_here/x', '/', '.', 'é', '\udcff', 'x' * 5000, '\n', ' ', ',', ':', 'os:getcwd', 'a:b',
    '/dev/zero', '/dev/null', '/proc/self/environ', '0x10', '1_000', '(' * 300, '-' * 3000 + '1', '${HOME}', '$(id)',
    '%s', '**/*', '<b>', '[' * 100_000,
)  # fmt: skip
_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**25, 1.5, -0.5, 1e308, float('nan'), float('inf'),
    -float('inf'), '', ' ', 'x', '\0', 'a\0b', '\ud800', '\udfff x', '\u2028', '\ufeff', '<b>', '../../../etc/passwd',
    '/etc/passwd', 'x' * 3000, '{{ 1 }}', '%n%s', [], {}, [None], [[]], [{}], {'': ''}, {'x': None}, [1, 'x'], ['x'],
    {'role': 'user'}, [[['x']]], '<|im_end|>', '<eos>', '<pad>',
)  # fmt: skip
_SCALARS = (b'1', b'"x"', b'null', b'true', b'[]', b'{}', b'[[]]', b'[1,2]', b'-', b'1e999')
_DEEP = '\x01deep\x01'  # stands for a list in a list in a list …, which `dumps` writes
_DEPTH = 20_000


def paths(value: Any, here: tuple = ()) -> list[tuple]:
    """The places inside a JSON value."""
    found = [here] if here else []
    inner = list(value.items())[:200] if isinstance(value, dict) else []
    inner = list(enumerate(value[:40])) if isinstance(value, list) else inner
    for name, part in inner:
        found += paths(part, (*here, name))
    return found


def at(value: Any, place: tuple) -> Any:
    """What stands at a place."""
    for name in place:
        value = value[name]
    return value


def json_value(rng: random.Random, value: Any, times: int = 1) -> tuple[Any, str]:
    """A JSON value with something in it replaced, removed, doubled, wrapped or nested."""
    value, said = copy.deepcopy(value), []
    for _ in range(times):
        places = paths(value)
        if not places:
            return rng.choice(_ODD), 'replaced whole'
        place = rng.choices(places, [1.0 / (1 + len(place)) for place in places])[0]
        node, last = at(value, place[:-1]), place[-1]
        old = node[last]
        how = rng.choice(('odd', 'odd', 'odd', 'delete', 'wrap', 'text', 'number', 'swap', 'grow', 'nest'))
        if how == 'delete':
            del node[last]
        elif how == 'wrap':
            node[last] = rng.choice(([old], {'x': old}, [old, old], [[old]]))
        elif how == 'text':
            node[last] = str(old)
        elif how == 'number' and isinstance(old, int | float) and not isinstance(old, bool):
            node[last] = rng.choice((-old, old + 1, old * 2, old + 0.5, old // 2 if isinstance(old, int) else old))
        elif how == 'swap':
            node[last] = copy.deepcopy(at(value, rng.choice(places)))
        elif how == 'grow' and isinstance(node, dict):
            node[rng.choice(('x', '', 'text', 'role', '\ud800', 'auto_map', 'a' * 300))] = rng.choice(_ODD)
        elif how == 'nest':
            node[last] = _DEEP
        else:
            node[last] = copy.deepcopy(rng.choice(_ODD))
        said.append(f'{how} {"/".join(map(str, place))[:60]}')
    return value, '; '.join(said)


def dumps(value: Any) -> str:
    """JSON text; NaN and infinities as Python writes them, surrogates as escapes."""
    return json.dumps(value).replace(json.dumps(_DEEP), '[' * _DEPTH + ']' * _DEPTH)


def raw(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Bytes with damage."""
    place = rng.randrange(len(data) + 1)
    kinds = {
        'truncated': lambda: data[:place],
        'empty': lambda: b'',
        'one byte': lambda: data[:1],
        'flipped': lambda: data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :],
        'flipped often': lambda: bytes(b if rng.random() > 0.02 else rng.randrange(256) for b in data),
        'NUL': lambda: data[:place] + b'\0' + data[place:],
        'all NUL': lambda: b'\0' * max(1, len(data)),
        'BOM': lambda: b'\xef\xbb\xbf' + data,
        'UTF-16': lambda: data.decode('utf-8', 'replace').encode('utf-16'),
        'CRLF': lambda: data.replace(b'\n', b'\r\n'),
        'CR': lambda: data.replace(b'\n', b'\r'),
        'latin1': lambda: data[:place] + b'\xe9\xff' + data[place:],
        'doubled': lambda: data + data,
        'reversed': lambda: data[::-1],
        'a surrogate': lambda: data[:place] + b'\\ud800' + data[place:],
        'raw surrogate': lambda: data[:place] + b'\xed\xa0\x80' + data[place:],
        'deep lists': lambda: b'[' * 100_000,
        'deep objects': lambda: b'{"text":' * 100_000,
        'closed deep lists': lambda: b'[' * _DEPTH + b']' * _DEPTH,
        'a huge number': lambda: b'{"text": ' + b'9' * 5000 + b'}\n' + data,
        'NaN': lambda: b'{"text": NaN}\n' + data,
        'Infinity': lambda: data.replace(b'"', b'Infinity', 1),
        'a scalar': lambda: rng.choice(_SCALARS),
        'a long line': lambda: b'{"text": "' + b'x' * 300_000 + b'"}\n' + data,
        'one key twice': lambda: data.replace(b'{', b'{"text": 1, ', 1),
        'only spaces': lambda: b' \n\t\n \n',
        'line separators': lambda: data.replace(b' ', '\u2028'.encode(), 3),
        'gzip': lambda: gzip.compress(data),
        'HTML': lambda: b'<!doctype html><html><body>404</body></html>',
        'git lfs': lambda: b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n',
    }
    name = rng.choice(list(kinds))
    return kinds[name](), name
