"""The steps one by one, against truth that is planted or computed the slow way."""

import random
import time

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline import filters
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.data.prepare import Document as Collected
from jaxtune.data.prepare import (
    Dropped,
    assign_splits,
    blocklist,
    chinese,
    clean,
    code_quality,
    custom,
    decontaminate,
    gopher_quality,
    gopher_repetition,
    language,
    minhash,
    sourcecode,
    steps,
    web,
    words,
)
from jaxtune.data.prepare import plan as plans
from jaxtune.errors import UserError

from .corpus import altered, jaccard, prose


def judged(module, text, metadata=None, language='', **asked):
    """What the step of a module makes of a text, with a few values of `data.steps`."""
    settings = plans.Plan((), {'filter.preset': 'none', **asked}, 'text', '', {}).settings
    return module.STEP.process(Collected('a', text, 'text', metadata=metadata or {'language': language}), settings)


def rules(preset, language):
    """The quality rules that a text of a language goes through under a preset."""
    names = ('gopher repetition', 'gopher quality', 'c4', 'fineweb', 'code', 'zh')
    settings = plans.Plan((), {'filter.preset': preset}, 'text', '', {}).settings
    for step in map(steps.STEPS.get, names):
        if step.applies(Collected('a', '', 'text', metadata={'language': language}), settings):
            yield lambda text, step=step: step.process(
                Collected('a', text, 'text', metadata={'language': language}), settings
            )


def test_near_duplicates_by_similarity():
    texts, truth = [], []
    for i in range(150):
        text = prose(220, i).replace('\n\n', ' ')
        copy = altered(text, 0.4 + 0.55 * i / 150, i)
        texts += [text, copy]
        truth.append(jaccard(text, copy))
    signatures = np.stack([minhash.signature(words.word_hashes(text), 5, 256) for text in texts])
    values = minhash.band_hashes(signatures, *minhash.bands(0.8, 256))
    pairs = np.unique(np.concatenate([minhash.candidates(values[:, i]) for i in range(values.shape[1])]), axis=0)
    short = minhash.short(signatures)
    estimates = minhash.agreement(short[pairs[:, 0]], short[pairs[:, 1]])
    found = {(int(a), int(b)) for a, b in pairs[estimates >= minhash.threshold(0.8, 256)]}
    alike = [i for i, value in enumerate(truth) if value >= 0.85]
    apart = [i for i, value in enumerate(truth) if value <= 0.5]
    assert len(alike) > 15
    assert len(apart) > 15
    assert np.mean([(2 * i, 2 * i + 1) in found for i in alike]) >= 0.95
    assert np.mean([(2 * i, 2 * i + 1) in found for i in apart]) <= 0.05
    assert all(b == a + 1 for a, b in found)
    exact = np.array([truth[a // 2] for a, b in pairs if b == a + 1 and a % 2 == 0])
    near = np.array([value for value, (a, b) in zip(estimates, pairs, strict=True) if b == a + 1 and a % 2 == 0])
    assert np.abs(near - exact).max() < 4 * (0.25 / 256) ** 0.5


def test_real_editions(shared):
    import pathlib
    import sys

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / 'benchmarks'))
    from data_quality import dedup

    folder = shared / 'data' / 'dedup'
    if not folder.is_dir():
        pytest.skip(f'needs {folder}, which is not there')
    found = dedup(folder, every_pair=False)
    assert found['recall_of_labelled_copies'] >= 0.99
    assert found['precision_same_chapter'] >= 0.99


def test_bands_find_what_they_promise():
    for similarity in (0.5, 0.7, 0.8, 0.9):
        count, rows = minhash.bands(similarity, 256)
        assert count * rows <= 256
        assert 1 - (1 - similarity**rows) ** count >= 0.99


@given(st.lists(st.integers(0, 6), max_size=60))
def test_candidates_are_the_pairs_of_a_band(values):
    values = np.array(values, np.uint64)
    found = {tuple(pair) for pair in minhash.candidates(values).tolist()}
    wanted = {(i, j) for j in range(len(values)) for i in range(j) if values[i] == values[j]}
    assert found <= wanted
    joined = minhash.clusters(len(values), np.array(sorted(found), np.int64).reshape(-1, 2))
    assert joined.tolist() == [values.tolist().index(value) for value in values.tolist()]


def test_gopher_rules_are_those_of_datatrove():
    repetition = filters.GopherRepetitionFilter(language=words.splitter())
    quality = filters.GopherQualityFilter(language=words.splitter())
    source, verdicts = random.Random(0), []
    texts = [prose(source.randint(20, 400), i) for i in range(120)]
    for text in texts[:80]:
        found = text.split(' ')
        start, length = source.randrange(len(found)), source.randint(1, 30)
        texts.append(
            ' '.join(found[:start] + found[start : start + length] * source.randint(2, 8) + found[start + length :])
        )
        texts.append(text.replace('.', source.choice(['...', ' # .', '\n- ', ' 7 8 9 ; ', ''])))
    for text in texts:
        for theirs, ours in ((repetition, gopher_repetition.Repetition()), (quality, gopher_quality.Quality())):
            verdict = theirs.filter(Document(text, ''))
            assert (verdict is True) == (ours(text) == ''), (verdict, ours(text))
            verdicts.append(verdict is True)
    assert 50 < len(verdicts) - sum(verdicts) < 300


def test_prose_rules_run_on_neither_code_nor_chinese():
    code = 'import os\n\n\ndef f(x):\n    return {x: 1}\n' * 3
    verse = '床前明月光，疑是地上霜。\n举头望明月，低头思故乡。\n' * 2
    for preset, tongue, text in (
        ('code', 'python', code),
        ('zh', 'zh', verse),
        ('web', 'zh', verse),
        ('books', 'zh', verse),
    ):
        for rule in rules(preset, tongue):
            assert rule(text) == text
            assert not isinstance(rule(text), Dropped)
    assert isinstance(judged(gopher_quality, code, language='en', **{'filter.preset': 'web'}), Dropped)
    for text, why in (('x' * 2000, 'minified'), ('# Generated by a tool. DO NOT EDIT\nx = 1\n', 'generated')):
        dropped = judged(code_quality, text)
        assert isinstance(dropped, Dropped)
        assert why in dropped
    assert isinstance(judged(chinese, '只有几个字'), Dropped)
    assert isinstance(judged(chinese, '点击这里查看更多内容。' * 50), Dropped)


def test_blocklist_and_own_rules(tmp_path):
    (tmp_path / 'list.txt').write_text('# comment\nbad word\nspam.example\n坏话\n')
    lists = {'filter.blocklist': str(tmp_path / 'list.txt')}
    assert judged(blocklist, 'a Bad Word here', {}, **lists) == 'blocked word'
    assert judged(blocklist, '他说坏话了', {}, **lists) == 'blocked word'
    assert judged(blocklist, 'bad words', {}, **lists) == 'bad words'
    assert judged(blocklist, 'fine', {'url': 'https://a.spam.example/x'}, **lists) == 'blocked domain'
    assert judged(blocklist, 'fine', {'url': 'https://notspam.example.org/x'}, **lists) == 'fine'
    with pytest.raises(UserError, match=r'data\.steps\.filter\.custom=os:nothing: expected module:function'):
        judged(custom, 'x', **{'filter.custom': 'os:nothing'})


@pytest.mark.parametrize('what', ["raise KeyError('gone')", 'raise SystemExit(0)'])
def test_a_persons_rule_that_fails(tmp_path, what):
    (tmp_path / 'mine.py').write_text(f'def rule(text, metadata):\n    {what}\n')
    with pytest.raises(UserError, match=r'mine\.py:2: data\.steps\.filter\.custom=.*(KeyError|SystemExit)'):
        judged(custom, 'x', **{'filter.custom': f'{tmp_path}/mine.py:rule'})


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        ('She said â€œnoâ€\x9d to the cafÃ©', 'She said “no” to the café'),
        ('Ceci est déjà bon — “oui”', 'Ceci est déjà bon — “oui”'),
        ('他说：“好。”', '他说：“好。”'),
    ],
)
def test_encoding(before, after):
    assert clean.mend_encoding(before) == after


def test_cleaning():
    assert clean.plain_unicode('e\u0301\r\na\u200bb\x07\ufeff') == 'é\nab'
    text = 'One &amp; two<br/>three\nhttps://example.org/a?b=c\nsee https://example.org for a < b\n'
    assert clean.without_markup(text) == 'One & two three\nsee https://example.org for a < b\n'
    mark = 'OF THIS PROJECT GUTENBERG EBOOK X ***\n'
    book = f'By\n*** START {mark}The book.\n*** END {mark}Licence'
    assert clean.without_licence(book).strip() == 'The book.'


def test_pii():
    text = 'a.b@c-d.org, 8.8.4.4 and +49 (30) 123-4567, (555) 123-4567, 13912345678'
    masked = clean.mask_pii(text)
    assert masked == f'{clean.EMAIL}, {clean.ADDRESS} and {clean.TELEPHONE}, {clean.TELEPHONE}, {clean.TELEPHONE}'
    for kept in ('192.168.1.1', 'version 1.2.3', '2024-05-06', '1,234,567', '0123456789abcdef', '10.1.2.3'):
        assert clean.mask_pii(kept) == kept


@pytest.mark.parametrize(
    ('code', 'text'),
    [
        ('en', 'It was the best of times, and it was the worst of times, as he had said to them before.'),
        ('de', 'Der Mann ging mit dem Hund in den Wald, und es war nicht mehr hell, als er wieder nach Hause kam.'),
        ('fr', 'Il est venu dans la ville avec les enfants, et ils ne sont pas restés plus longtemps que nous.'),
        ('es', 'El hombre que vino a la casa no era el mismo que se fue con los otros por la calle.'),
        ('zh', '此开卷第一回也。作者自云：因曾历过一番梦幻之后，故将真事隐去。'),
        ('ja', 'これは日本語の文章です。ひらがなとカタカナと漢字が混ざっています。'),
        ('ko', '이것은 한국어 문장입니다.'),
        ('ru', 'Это был лучший из дней, и мы не знали, что будет дальше.'),
        ('', '12345 67890 !!!'),
    ],
)
def test_language(code, text):
    assert language.identify(text * 3)[0] == code


def test_decontamination(tmp_path):
    question = ' '.join(prose(40, 'question').split())
    (tmp_path / 'eval.jsonl').write_text(f'{{"question": "{question}", "answer": "42"}}\n')
    index = decontaminate.index([str(tmp_path / 'eval.jsonl')], 13)
    dirty = prose(100, 1) + ' ' + ' '.join(question.split()[10:25]) + ' ' + prose(100, 2)
    assert index.finds(words.word_hashes(dirty))
    assert index.finds(words.word_hashes(dirty.upper()))
    assert not index.finds(words.word_hashes(prose(100, 1) + ' '.join(question.split()[10:20]) + prose(100, 2)))
    assert not index.finds(words.word_hashes('42'))


def test_pages():
    nav = '<nav>' + ''.join(f'<a href="/{i}">Section {i}</a>' for i in range(9)) + '</nav>'
    parts = [prose(60, i).replace('\n\n', ' ') for i in range(4)]
    page = f'<html><body>{nav}<article>{"".join(f"<p>{part}</p>" for part in parts)}</article></body></html>'
    text = web.extract(page)
    assert all(part in text for part in parts)
    assert 'Section 3' not in text
    # A table that only places text is no table.
    text = web.extract(
        f'<html><body><table><tr><td>{"".join(f"<p>{part}</p>" for part in parts)}</td></tr></table></body></html>'
    )
    assert text.splitlines() == parts
    # A part of a page is one too, and what is no page has no text.
    assert web.extract(f'<div class="page">{"".join(f"<p>{part}</p>" for part in parts)}</div>').splitlines() == parts
    assert web.extract('') == web.extract('no page') == ''


def test_encodings_of_files():
    text = 'Ä Möbel, größer — “schön”'
    assert web.decode(text.encode()) == text
    assert web.decode(text.encode('utf-16')) == text
    assert web.decode(text.encode('cp1252'), 'iso-8859-1') == text
    page = f'<html><head><meta charset="gb2312"></head>{"汉字" * 9}</html>'
    assert web.decode(page.encode('gb18030'), html=True) == page
    with pytest.raises(web.UndecodableError, match='byte 0xff in line 2'):
        web.decode(b'words\n\xff\xfe\x00\x01 words')


def test_a_page_that_takes_too_long():
    with pytest.raises(web.TooSlowError), web.limited(0.05):
        time.sleep(5)


def test_source_trees():
    kept = [
        path
        for path in ('a.py', 'src/b.rs', 'a.min.js', '.git/x.py', 'node_modules/a.js', 'x_pb2.py', 'a.png')
        if sourcecode.wanted(path)
    ]
    assert kept == ['a.py', 'src/b.rs']
    assert sourcecode.licence('Permission is hereby granted, free of charge, to any') == 'MIT'
    assert sourcecode.licence('Apache License\nVersion 2.0') == 'Apache-2.0'


def test_both_sides_get_a_document():
    class Corpus:
        def __init__(self, digests):
            self.digests = np.array(digests, np.uint64)
            self.groups, self.sources = self.digests[:, 0], np.zeros(len(digests), np.int32)

        def __len__(self):
            return len(self.digests)

        originals = assign_splits.Corpus.originals

    plan = plans.Plan((plans.Source('a', 'x', weight=2.5),), {}, 'text', '', {'eval_fraction': 1e-9})
    digests = [[i << 60, i << 59] for i in range(1, 9)]
    fates = assign_splits.assign_splits(Corpus(digests), plan, np.zeros((0, 2), np.int64))
    assert fates['side'].tolist() == [assign_splits.EVAL] + [assign_splits.TRAIN] * 7
    assert fates['copies'].tolist() == [1] + [3 if i << 59 < 1 << 63 else 2 for i in range(2, 9)]
    with pytest.raises(UserError, match='1 documents are left of 1'):
        assign_splits.assign_splits(Corpus(digests[:1]), plan, np.zeros((0, 2), np.int64))
