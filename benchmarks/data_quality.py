"""How good preparation is, against truth: near-duplicates, extraction, planted flaws, survival of Chinese and of code.

    python benchmarks/data_quality.py --data FOLDER

`FOLDER` may hold `dedup/{docs,labels}.jsonl` (`id`, `cluster`, `jaccard5_to_first`), `pretrain/*_zh.*`,
`pretrain/code_python.jsonl`, `web/readability/PAGE/{source,expected}.html`, and `web/gutenberg_html/N.htm` with
`N.expected.txt`; what is not there is passed over. The planted truth is generated. One line of JSON a measurement.
"""

import argparse
import collections
import itertools
import json
import pathlib
import random
import re
import tempfile

import numpy as np

from jaxtune.data.prepare import (
    Document,
    Dropped,
    assign_splits,
    clean,
    decontaminate,
    minhash,
    shards,
    steps,
    substring_dedup,
    web,
    words,
)
from jaxtune.data.prepare import plan as plans


def near_duplicates(texts: list[str], similarity: float = 0.8, hashes: int = 256) -> set[tuple[int, int]]:
    """Pairs that preparation takes for near-duplicates, and those that follow from them."""
    signatures = np.stack([minhash.signature(words.word_hashes(text), 5, hashes) for text in texts])
    values = minhash.band_hashes(signatures, *minhash.bands(similarity, hashes))
    found = np.unique(np.concatenate([minhash.candidates(values[:, i]) for i in range(values.shape[1])]), axis=0)
    short = minhash.short(signatures)
    alike = minhash.agreement(short[found[:, 0]], short[found[:, 1]]) >= minhash.threshold(similarity, hashes)
    return {(int(a), int(b)) for a, b in found[alike]}


def jaccards(texts: list[str]) -> dict[tuple[int, int], float]:
    """The exact similarity of every pair that shares a shingle."""
    sets = [set(words.shingles(words.word_hashes(text), 5).tolist()) for text in texts]
    holders = collections.defaultdict(list)
    for i, shingles in enumerate(sets):
        for shingle in shingles:
            holders[shingle].append(i)
    shared = collections.Counter()
    for numbers in holders.values():
        shared.update(itertools.combinations(numbers, 2))
    return {(a, b): count / (len(sets[a]) + len(sets[b]) - count) for (a, b), count in shared.items()}


def dedup(folder: pathlib.Path, every_pair: bool = True) -> dict:
    """Real near-duplicates: chapters of the same books in several editions; against every pair, which takes longer."""
    docs = [json.loads(line) for line in (folder / 'docs.jsonl').open(encoding='utf-8')]
    labels = {row['id']: row for row in map(json.loads, (folder / 'labels.jsonl').open(encoding='utf-8'))}
    found = near_duplicates([doc['text'] for doc in docs])
    clusters = [labels[doc['id']]['cluster'] for doc in docs]
    same = sum(clusters[a] == clusters[b] for a, b in found)
    # By the labels: copies at 0.8 or more of a cluster's first chapter must share a component with it.
    joined = minhash.clusters(len(docs), np.array(sorted(found), np.int64).reshape(-1, 2))
    place = {doc['id']: i for i, doc in enumerate(docs)}
    first, hits, copies = {}, 0, 0
    for name, row in labels.items():  # an edition after the other, the first one first
        if row['cluster'] not in first:
            first[row['cluster']] = place[name]
        elif row['jaccard5_to_first'] is not None and row['jaccard5_to_first'] >= 0.8:
            copies += 1
            hits += int(joined[place[name]] == joined[first[row['cluster']]])
    result = {'recall_of_labelled_copies': hits / copies, 'precision_same_chapter': same / len(found)}
    if every_pair:
        exact = jaccards([doc['text'] for doc in docs])
        must = {pair for pair, value in exact.items() if value >= 0.8}
        wrong = {pair for pair in found if exact.get(pair, 0) < 0.7}
        result |= {'pairs_at_0.8': len(must), 'recall_of_pairs': len(must & found) / len(must)}
        result |= {'pairs_found': len(found), 'found_below_0.7': len(wrong) / len(found)}
    return result


def f1(text: str, expected: str) -> float:
    """Of the words, with their number."""
    left, right = (collections.Counter(re.findall(r'\w+', part.lower())) for part in (text, expected))
    both = sum((left & right).values())
    return 2 * both / (sum(left.values()) + sum(right.values()))


def extraction(folder: pathlib.Path) -> dict:
    """Text of pages beside what trafilatura gives by itself."""
    import lxml.html
    import trafilatura

    pages = [(page, page.with_suffix('.expected.txt')) for page in sorted(folder.glob('gutenberg_html/*.htm'))]
    pages += [(page, page.with_name('expected.html')) for page in sorted(folder.glob('readability/*/source.html'))]
    rows = {}
    for page, truth in pages:
        source, expected = web.decode(page.read_bytes(), html=True), truth.read_text(encoding='utf-8')
        if truth.suffix == '.html':
            expected = ' '.join(lxml.html.fromstring(expected).itertext())
        ours = clean.without_markup(clean.plain_unicode(web.extract(source)))
        name = page.parent.name if page.name == 'source.html' else page.stem
        rows[name] = {'f1': f1(ours, expected), 'trafilatura': f1(trafilatura.extract(source) or '', expected)}
    means = {name: float(np.mean([row[name] for row in rows.values()])) for name in ('f1', 'trafilatura')}
    return {'mean': means, **rows}


_SYLLABLES = 'ba be bi bo da de di do fa fe ga go ka ki la le lo ma mi mo na ne ni no pa po ra re ri ro sa se si ta te'


def prose(count: int, seed) -> list[str]:
    """Made-up words."""
    source = random.Random(str(seed))
    return [''.join(source.choices(_SYLLABLES.split(), k=source.randint(2, 4))) for _ in range(count)]


def planted_duplicates() -> dict:
    """Pairs at known similarities: how many of them are taken for near-duplicates."""
    texts, wanted = [], []
    for number in range(1200):
        similarity = random.Random(number).uniform(0.3, 0.98)
        text = prose(300, number)
        copy, source = list(text), random.Random(f'{number} copy')
        for place in source.sample(range(len(copy)), round(len(copy) * (1 - similarity) / (1 + similarity) / 5)):
            copy[place] = f'zu{source.randrange(10**6)}'
        texts += [' '.join(text), ' '.join(copy)]
    exact, found = jaccards(texts), near_duplicates(texts)
    for low, high in ((0.0, 0.5), (0.5, 0.7), (0.7, 0.8), (0.8, 0.85), (0.85, 1.01)):
        pairs = [(2 * i, 2 * i + 1) for i in range(1200) if low <= exact.get((2 * i, 2 * i + 1), 0) < high]
        wanted.append(
            (f'{low}-{min(high, 1.0)}', len(pairs), sum(pair in found for pair in pairs) / max(1, len(pairs)))
        )
    strange = sum(b != a + 1 or a % 2 for a, b in found)
    return {name: {'pairs': count, 'taken': share} for name, count, share in wanted} | {'unrelated_taken': strange}


_PII = ('a.b{0}@mail-{0}.org', '8.8.{0}.44', '+49 30 1234{0:03}5', '(555) 123-4{0:03}')
_NOT_PII = ('version 1.2.{0}', '192.168.1.{0}', '12,{0:03} people', '2024-05-{0:02}', '{0:03} 456 789 units')


def planted_flaws() -> dict:
    """PII, wrong encodings, markup and evaluation text hidden in prose: recall and precision of each step."""
    found = {}
    hits = sum(item not in clean.mask_pii(f'so {item} and') for i in range(200) for item in [_PII[i % 4].format(i)])
    kept = sum(
        item in clean.mask_pii(f'so {item} and') for i in range(200) for item in [_NOT_PII[i % 5].format(i % 90)]
    )
    found['pii'] = {'recall': hits / 200, 'precision': hits / (hits + 200 - kept)}

    good = [
        'Er hörte, daß “alles” schön sei — für 5 €…',
        '“Où est-il ?” demanda la fée.',
        'naïve café — “yes”',
        '他说：“好。”',
    ]
    import ftfy.bad_codecs  # noqa: F401  (registers what browsers mean by windows-1252)

    broken = [(text, text.encode().decode('sloppy-windows-1252')) for text in good[:3]]
    lines = [
        (f'{" ".join(prose(9, i))} {text}', f'{" ".join(prose(9, i))} {bad}') for i in range(60) for text, bad in broken
    ]
    mended = sum(clean.mend_encoding(bad) == text for text, bad in lines)
    left = sum(clean.mend_encoding(text) == text for i in range(60) for text in good)
    found['encoding'] = {'recall': mended / len(lines), 'precision': mended / (mended + 240 - left)}

    found['exact duplicates'] = _exact()
    found['substrings'] = _quoted()

    rests = ('<br />', '</div>', '&amp;nbsp;', '<span class="x">', '\nhttp://example.org/a/b?c=d\n', '<!-- ad -->')
    gone = sum(rest.strip() not in clean.without_markup(f'so {rest} and {i}') for i in range(60) for rest in rests)
    prose_like = ('a < b and c > d', 'AT&T', 'x<y>', 'see https://example.org for more', 'R&D;', '<3')
    stay = sum(clean.without_markup(f'so {text} {i}') == f'so {text} {i}' for i in range(60) for text in prose_like)
    found['markup'] = {'recall': gone / 360, 'precision': gone / (gone + 360 - stay)}

    index = decontaminate.Index({13: np.unique(np.concatenate([_shingles(f'eval {i}', 40) for i in range(50)]))})
    dirty = sum(index.finds(_hidden(i)) for i in range(200))
    clear = sum(index.finds(words.word_hashes(' '.join(prose(300, f'clear {i}')))) for i in range(200))
    found['decontamination'] = {'recall': dirty / 200, 'precision': dirty / max(1, dirty + clear)}

    nav = '<nav><ul>' + ''.join(f'<li><a href="/{i}">Section {i}</a></li>' for i in range(12)) + '</ul></nav>'
    foot = '<footer><p>Copyright someone. <a href="/terms">Terms of use</a> <a href="/x">Privacy</a></p></footer>'
    pages = [
        (f'<html><body>{nav}<article><h1>{title}</h1>{body}</article>{foot}</body></html>', text)
        for title, body, text in _articles()
    ]
    texts = [(web.extract(page), text) for page, text in pages]
    clean_pages = sum('Section 3' not in out and 'Terms of use' not in out for out, _ in texts)
    whole = sum(all(part in out for part in text) for out, text in texts)
    found['boilerplate'] = {
        'pages_without_it': clean_pages / len(texts),
        'pages_with_all_their_text': whole / len(texts),
    }
    return found


def _exact() -> dict:
    """Copies with other white space, and texts that differ in one letter."""
    texts = [' '.join(prose(100, i)) for i in range(200)]
    same = sum(
        assign_splits.digest(text).tolist() == assign_splits.digest(f'\n{text}'.replace(' ', '  ')).tolist()
        for text in texts
    )
    other = sum(assign_splits.digest(text).tolist() == assign_splits.digest(f'{text[:-1]}x').tolist() for text in texts)
    return {'recall': same / 200, 'precision': same / max(1, same + other)}


def _quoted(length: int = 50) -> dict:
    """Runs of words, some long enough to be cut, that every second document takes from the one before."""
    texts, long = [], {}
    for number in range(0, 400, 2):
        source, copy = prose(300, f'quoted {number}'), prose(300, f'quoting {number}')
        count = random.Random(number).choice((10, 30, 49, 50, 51, 80, 150))
        copy[100:100] = source[60 : 60 + count]
        texts += [' '.join(source), ' '.join(copy)]
        if count >= length:
            long[number + 1] = ' '.join(source[60 : 60 + count])
    with tempfile.TemporaryDirectory() as folder:
        work, windows = pathlib.Path(folder), substring_dedup.Windows(length)
        for number, text in enumerate(texts):
            windows.add(text, number)
        shards.save_array(work / 'windows' / '00000.npy', windows.merged())
        for task in range(substring_dedup.SUBSTRING_TASKS):
            substring_dedup.substrings(work, 1, task)
        cutter = substring_dedup.Substrings(work, length)
        left = [cutter.cut(text, number) for number, text in enumerate(texts)]
    gone = sum(left[number] == texts[number].replace(f'{run} ', '') for number, run in long.items())
    wrong = sum(left[number] != texts[number] for number in range(400) if number not in long)
    return {'recall': gone / len(long), 'precision': gone / max(1, gone + wrong)}


def _shingles(seed, count):
    return words.shingles(words.word_hashes(' '.join(prose(count, seed))), 13)


def _hidden(number: int) -> np.ndarray:
    text = prose(300, f'train {number}')
    start = random.Random(number).randrange(0, 20)
    text[100:100] = prose(40, f'eval {number % 50}')[start : start + 16]
    return words.word_hashes(' '.join(text))


def _articles():
    for i in range(60):
        parts = [' '.join(prose(60, f'{i} {j}')).capitalize() + '.' for j in range(5)]
        yield f'Title {i}', ''.join(f'<p>{part}</p>' for part in parts), parts


def survival(folder: pathlib.Path) -> dict:
    """Share of documents and characters that the presets for Chinese and for code let through."""
    result = {}
    for path in sorted(folder.glob('*_zh.*')) + sorted(folder.glob('code_python.jsonl')):
        lines = path.read_text(encoding='utf-8')
        texts = [json.loads(line)['text'] for line in lines.splitlines()] if path.suffix == '.jsonl' else [lines]
        preset = 'code' if path.name.startswith('code') else 'zh'
        settings = plans.Plan((), {'filter.preset': preset}, 'text', '', {}).settings
        kept = []
        for text in texts:
            text = clean.plain_unicode(clean.mend_encoding(text))
            text = steps.STEPS.get(preset).process(Document('', text, preset, metadata={'language': 'zh'}), settings)
            if not isinstance(text, Dropped):
                kept.append(text)
        result[path.name] = {
            'documents': len(texts),
            'survive': len(kept) / len(texts),
            'characters': sum(map(len, kept)) / sum(map(len, texts)),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=pathlib.Path, default=pathlib.Path('data'), help='folder with the truth')
    data = parser.parse_args().data
    print(json.dumps({'planted_near_duplicates': planted_duplicates()}), flush=True)
    print(json.dumps({'planted_flaws': planted_flaws()}), flush=True)
    for name, measure, folder in (
        ('near_duplicates', dedup, data / 'dedup'),
        ('extraction_f1', extraction, data / 'web'),
        ('survival', survival, data / 'pretrain'),
    ):
        if folder.is_dir():
            print(json.dumps({name: measure(folder)}, ensure_ascii=False), flush=True)
        else:
            print(json.dumps({name: f'{folder} is not there'}), flush=True)


if __name__ == '__main__':
    main()
