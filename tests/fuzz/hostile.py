"""What somebody hostile, or a broken tool, hands in: chat templates, reward functions, raw documents, XML."""

import functools
import gzip
import io
import random
import zipfile

# Chat templates: without end, huge, reaching for Python's insides, wrong in the grammar, wrong in the types.
TEMPLATES = (
    '{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}',
    '{{ 9 ** 9 ** 9 }}', "{{ 'a' * 10 ** 11 }}", "{{ '%99999999999d' % 1 }}", '{{ range(10 ** 9) | list }}',
    "{{ 'x' | center(10 ** 11) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", '{{ messages.__class__ }}',
    '{{ cycler() }}', '{{ lipsum(n=100000) }}', "{{ lipsum.__globals__['os'].popen('touch RAN').read() }}",
    '{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}', "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
    "{% extends 'x' %}", '{{ (' * 200 + '1' + ')' * 200 + ' }}', '{% for a in [1] %}' * 30 + '{% endfor %}' * 30,
    '{{ undefined.x.y }}', '{{ messages[99].content }}', "{{ raise_exception('no') }}", '{{ strftime_now(5) }}',
    '{{ strftime_now("%Q" * 999) }}', '{% if true %}', '{{ 1 | nofilter }}', '{{', '{# x',
    '{% generation %}x{% endgeneration %}', '{% generation %}', '{{ 1 / 0 }}',
    "{{ messages | tojson(indent='x' * 10 ** 6) }}", "{{ 'a' | indent(10 ** 11) }}", '{{ namespace(x=1).__init__ }}',
    '{{ self.__init__ }}', "{{ 'x'.format_map }}", "{{ '{0.__class__}'.format(messages) }}",
    '{{ [1, 2, 3] | batch(0) | list }}', "{{ 'x' | attr('__class__') }}", '{{ messages.append(1) }}', '{{ 1 }}',
    '{{ messages | map(attribute="content") | join }}{{ messages | groupby("role") | list }}',
    "{{ '\\ud800' }}", '{{ messages }}', '{% for m in messages %}{{ m.content }}{% endfor %}',
    "{{ ''.join(['x' * 1000000] * 100000) }}", '{{ dict(a=1).update(b=2) }}', '{{ none.x }}', '{{ joiner()()() }}',
    '{% set x = namespace(a="x") %}{% for i in range(60) %}{% set x.a = x.a + x.a %}{% endfor %}{{ x.a }}',
    '{% set x = namespace(a=[1]) %}{% for i in range(60) %}{% set x.a = x.a + x.a %}{% endfor %}',
    '{{ messages | sort(attribute="content") | first | random }}', '{% break %}', '{% do 1 %}', '{{ super() }}',
    '{{ caller() }}', '{% call x() %}{% endcall %}', '{% block x %}{% block x %}{% endblock %}{% endblock %}',
    '{{ loop.index }}', '{{ ~ }}', '{{ messages | sum }}', '{{ "x" | round }}', '{{ messages | slice(0) | list }}',
    '{{ "x" | int(base=99) }}', '{{ "a" | wordwrap(0) }}', '{{ "x" | filesizeformat }}', "{{ ('x' * 60000) | urlize }}",
    '{{ messages | dictsort }}', '{{ messages | xmlattr }}', '{{ "x" | truncate(-1) }}', "{{ 'x' | encode }}",
    '{% for i in range(10 ** 8) %}{% endfor %}', '{{ "x" | replace("", "y" * 10 ** 9) }}',
    "{{ 'ab' | list * 10 ** 9 }}",
    '{% for i in range(10 ** 5) %}{{ "x" * 10 ** 5 }}{% endfor %}', "{{ '{:>99999999999}'.format('x') }}",
    '{{ messages | tojson | length // 0 }}', '{{ 10 ** 5000 }}', '{{ (10 ** 5000) | string }}', '{{ "\0" }}',
    '{% set x = cycler("a") %}{% for i in range(10 ** 7) %}{{ x.next() }}{% endfor %}',
    '{{ "é" | urlencode * 10 ** 8 }}',
    '{% macro a(x) %}{{ b(x) }}{% endmacro %}{% macro b(x) %}{{ a(x) }}{% endmacro %}{{ a(1) }}',
    "{{ messages.__getattribute__('x') }}", "{{ (messages | string)[::-1] * 99 }}",
    '{{ [].sort(key=1) }}', '{{ {}[[]] }}',
    '{{ "a".zfill(10 ** 11) }}', '{{ "\t".expandtabs(10 ** 11) }}', '{{ 1 << 10 ** 11 }}',
    '{{ 7 // 0.0 }}', '{{ not }}',
)  # fmt: skip

# Bodies of `def reward(prompts, completions, **rest):`, or whole modules where they begin at the margin.
REWARDS = (
    'return [0.5] * len(completions)', 'return [len(text) for text in completions]', 'return None', 'return 1.0',
    'return []', 'return [None] * len(completions)', "return ['x'] * len(completions)", "return 'x' * len(completions)",
    "return [float('nan')] * len(completions)", "return [float('inf')] * len(completions)",
    'return [10 ** 400] * len(completions)', 'return [1e300] * len(completions)', 'return [[1.0]] * len(completions)',
    'return iter([1.0] * len(completions))', 'return dict.fromkeys(completions, 1.0)', 'raise ValueError', '1 / 0',
    'raise SystemExit(0)', 'import sys; sys.exit(0)', "raise BaseException('x')", 'raise GeneratorExit',
    'raise MemoryError', 'return reward(prompts, completions)', 'return [True] * len(completions)',
    "import numpy; return numpy.ones(len(completions), 'float16')",
    'import jax; return jax.numpy.ones(len(completions))',
    "raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'y')", "raise KeyError('\\ud800')", 'yield 1.0',
    "class Bad(Exception):\n        def __str__(self): raise ValueError\n    raise Bad",
    'completions.clear(); return []', "open('/not/there')", 'raise StopIteration',
    '\ndef reward(:', '\nraise SystemExit(0)', '\nimport not_there', '\nreward = 5', '\nclass reward: pass', '\n1 / 0',
    '\nreward = lambda: 1', '\nasync def reward(prompts, completions): return []', '\n\x00', '\n\ufeff\ufeff x',
    '\nraise BaseException', "\ndef __getattr__(name): raise ValueError(name)", '\nreward = print',
)  # fmt: skip

_CONTAINER = b'<container><rootfiles><rootfile full-path="b.opf"/></rootfiles></container>'
_OPF = b'<package><manifest><item id="a" href="%s"/></manifest><spine><itemref idref="a"/></spine></package>'
_ENTITIES = (
    b'<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
    + b''.join(b'<!ENTITY %c "%s">' % (98 + i, b'&%c;' % (97 + i) * 10) for i in range(9))
    + b']><x>&j;</x>'
)
_PAGE = b'<page><title>T</title><ns>0</ns><revision><text>%s</text></revision></page>'


def _zip(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, 'w', zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return sink.getvalue()


def _epub(page: bytes, container: bytes = _CONTAINER, href: bytes = b'a.xhtml') -> bytes:
    return _zip({'META-INF/container.xml': container, 'b.opf': _OPF % href, 'a.xhtml': page})


def _warc(length: bytes, kind: bytes = b'text/html', body: bytes = b'<html><p>some text here, ok</p></html>') -> bytes:
    inner = b'HTTP/1.1 200 OK\r\nContent-Type: %s\r\n\r\n%s' % (kind, body)
    head = b'WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://x/ y\r\n'
    head += b'Content-Type: application/http; msgtype=response\r\n'
    return head + b'Content-Length: %s\r\n\r\n%s\r\n\r\n' % (length or b'%d' % len(inner), inner)


@functools.cache
def _large(kind: str, head: bytes, size: int) -> bytes:
    """A small file that unpacks to a text of `size` bytes."""
    text = head + b'x' * size
    return _epub(text) if kind == 'epub' else gzip.compress(text)


def xml(rng: random.Random) -> tuple[str, bytes]:
    """A file of XML or HTML, by its name and content."""
    return rng.choice(
        (
            ('a.xml', b'<mediawiki>' + _PAGE % b'Some [[link]] text.' * 3 + b'</mediawiki>'),
            ('entities.xml', _ENTITIES),
            ('outside.xml', b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + _PAGE % b'&a;'),
            ('parameter.xml', b'<!DOCTYPE x [<!ENTITY % a SYSTEM "http://127.0.0.1:9/x"> %a;]>' + _PAGE % b'x'),
            ('open.xml', _PAGE % (rng.choice((b'&lt;ref ', b'[[File:', b'{{', b'{|', b'[//', b'= ', b'__A')) * 9000)),
            ('deep.xml', b'<page>' * 20_000),
            ('attributes.xml', b'<page ' + b''.join(b'a%d="x" ' % i for i in range(20_000)) + b'/>'),
            ('no-root.xml', _PAGE % b'x' * 2),
            ('namespace.xml', b'<a:page xmlns:a="x"><a:title/><a:text>t</a:text></a:page>'),
            ('instructions.xml', b'<?xml version="1.1" encoding="utf-7"?><?x y?>' + _PAGE % b'+ADw-'),
            ('comments.xml', b'<!--' * 9000 + _PAGE % b'x'),
            ('data.xml', _PAGE % (b'<![CDATA[' + b'x' * 5000 + b']]>')),
            ('a.epub', _epub(b'<html><p>A book of text.</p></html>')),
            ('entities.epub', _epub(b'<p>x</p>', _ENTITIES)),
            ('large.epub', _large('epub', b'<p>', 80_000_000)),
            ('outside.epub', _epub(b'<p>x</p>', href=b'../../etc/passwd')),
            ('open.epub', _epub(b'<p>' + b'<b> </b>' * 20_000)),
            ('empty.epub', _zip({})),
            ('none.epub', b'PK\x03\x04'),
            ('a.html', b'<html><body><article><p>A page of text that is long enough.</p></article></body></html>'),
            ('deep.html', b'<div>' * 30_000),
            ('tags.html', b'<' * 200_000),
            ('attributes.html', b'<a ' + b'x="y" ' * 50_000 + b'>'),
            ('nul.html', b'<p>\0\0</p>'),
            ('table.html', b'<table><tr><td>' * 3000),
            *(
                (f'{name}.html', b'<meta charset="%s"><p>\xe9+ADw-</p>' % name.encode())
                for name in ('zlib_codec', 'utf-7', 'idna', 'punycode', 'undefined', 'unicode_escape', 'x' * 99)
            ),
        )
    )


def document(rng: random.Random) -> tuple[str, bytes]:
    """A raw document of any kind."""
    if rng.random() < 0.3:
        return xml(rng)
    return rng.choice(
        (
            ('a.warc', _warc(b'')),
            ('a.warc.gz', gzip.compress(_warc(b'')) * 2),
            ('long.warc', _warc(b'99999999')),
            ('short.warc', _warc(b'40') * 2),
            ('negative.warc', _warc(b'-5')),
            ('letters.warc', _warc(b'x')),
            ('chunks.warc', _warc(b'', b'text/html\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip')),
            ('heads.warc', b'WARC/1.0\r\n' * 50),
            ('a.csv', b'text,b\nhello world,1\n'),
            ('quote.csv', b'text\n"' + b'x\n' * 5000),
            ('nul.csv', b'text\n\0\n'),
            ('wide.csv', b'text\na,b,c,d\n'),
            ('empty.csv', b'\n\n'),
            ('twice.csv', b'text,text\na,b\n'),
            ('a.tsv', b'text\tb\nhello world\t1\n'),
            ('a.json', b'[{"text": "one"}, {"text": 2}, null]'),
            ('surrogate.json', b'{"text": "\\ud800"}'),
            ('deep.json', b'[' * 50_000),
            ('digits.json', b'9' * 5000),
            ('nan.json', b'{"text": NaN}'),
            (
                'a.jsonl',
                b'{"text": "line"}\n{"text": null}\n{"no": 1}\n[]\n{"text": "\\ud83d"}\n{"text": ' + b'9' * 5000,
            ),
            ('deep.jsonl', b'[' * 100_000 + b'\n'),
            ('a.txt', 'a text of words é'.encode()),
            ('marks.txt', b'\xff\xfe\x00'),
            ('bom.txt', b'\xef\xbb\xbfx'),
            ('line.txt', b'x' * 500_000),
            ('spaces.txt', b' ' * 300_000 + b'x'),
            ('open.txt', rng.choice((b'<!--', b'<a ', b'&amp', b'a.', b'www.', b'* ', b'@a')) * 50_000),
            ('last.txt', ('\U0010ffff' * 99).encode()),
            ('latin.txt', b'caf\xe9 au lait, tr\xe8s bon'),
            ('a.py', b'def f():\n    return 1\n'),
            ('nul.py', b'\0'),
            ('open.md', b'# T\n' + b'[' * 20_000),
            ('a.js', b'x' * 200_000),
            ('a.parquet', b'PAR1'),
            ('zeros.parquet', b'PAR1' + b'\0' * 64 + b'PAR1'),
            ('a.jsonl.gz', b'\x1f\x8b\x08'),
            ('a.jsonl.bz2', b'BZh9'),
            ('a.jsonl.xz', b'\xfd7zXZ'),
            ('a.jsonl.zst', b'\x28\xb5\x2f\xfd'),
            ('large.txt.gz', _large('gz', b'', 50_000_000)),
            ('large.jsonl.gz', _large('gz', b'{"text": "', 50_000_000)),
            ('large.xml.gz', _large('gz', b'<page><title>T</title><text>', 50_000_000)),
        )
    )
