"""How fast preparation is: each step in MB/s a core beside plain datatrove, tokenising beside `tokenizers`, and memory.

    python benchmarks/data_prep.py --text BOOKS.jsonl --pages FOLDER

`--text` is records with a field `text`, `--pages` a folder of HTML; without them the running Python's library and pages
made of it serve. Steps are measured in seconds of the processor, one core, so that a busy machine changes little; the
last three lines are wall time of whole runs. Plain datatrove splits words with spaCy (`pip install spacy`); where that
is missing its filters get our words, which flatters them. One line of JSON a measurement.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

os.environ['TOKENIZERS_PARALLELISM'] = 'true'

from datatrove.data import Document

from jaxtune.data import stdlib
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.prepare import Document as Collected
from jaxtune.data.prepare import (
    assign_splits,
    clean,
    decontaminate,
    gopher_quality,
    gopher_repetition,
    language,
    minhash,
    paragraphs,
    substring_dedup,
    web,
    words,
)
from jaxtune.data.prepare import plan as plans
from jaxtune.data.prepare.steps import STEPS


def speed(step, texts: list[str], repeats: int = 2) -> float:
    """MB/s of the processor's time, the best of some rounds."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    best = 1e9
    step(texts[0])  # imports and tables
    for _ in range(repeats):
        start = time.process_time()
        for text in texts:
            step(text)
        best = min(best, time.process_time() - start)
    return size / best


def show(name: str, ours: float, theirs: float | None = None, of: str = 'datatrove') -> None:
    row = {'step': name, 'mb_per_second_a_core': round(ours, 2)}
    if theirs is not None:
        row |= {of: round(theirs, 2), 'ratio': round(ours / theirs, 2)}
    print(json.dumps(row), flush=True)


def steps(texts: list[str], pages: list[str]) -> None:
    from datatrove.pipeline import filters
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
    from datatrove.utils.hashing import HashConfig

    try:
        import spacy  # noqa: F401

        own = {}
    except ImportError:
        own = {'language': words.splitter()}

    def theirs(rule):
        return lambda text: rule.filter(Document(text, ''))

    show('extract', speed(web.extract, pages), speed(Trafilatura().extract, pages))
    show('encoding', speed(clean.mend_encoding, texts), speed(FTFYFormatter().format, texts, 1))
    show('unicode', speed(clean.plain_unicode, texts))
    show('markup', speed(clean.without_markup, texts))
    show('pii', speed(clean.mask_pii, texts), speed(PIIFormatter().format, texts, 1))
    show('language', speed(language.identify, texts))
    few = texts[: max(20, len(texts) // 8)]  # spaCy takes its time
    pairs = (
        ('gopher repetition', gopher_repetition.Repetition(), filters.GopherRepetitionFilter(**own)),
        ('gopher quality', gopher_quality.Quality(), filters.GopherQualityFilter(**own)),
    )
    for name, ours, plain in pairs:
        show(name, speed(ours, few), speed(theirs(plain), few, 1))
    pairs = (
        ('c4', filters.C4QualityFilter(**own, filter_no_terminal_punct=False)),
        ('fineweb', filters.FineWebQualityFilter(**own)),
    )
    settings = plans.Plan((), {'filter.preset': 'web'}, 'text', '', {}).settings

    def process(name: str):
        step = STEPS.get(name)
        return lambda text: step.process(Collected('', text, 'web'), settings)

    for name, plain in pairs:
        show(name, speed(process(name), few), speed(theirs(plain), few, 1))
    show('code', speed(process('code'), texts))
    show('exact', speed(assign_splits.digest, texts))
    show('paragraphs', speed(paragraphs.paragraph_hashes, texts))
    show('substrings', speed(lambda text: substring_dedup.windows(text, 50), texts))
    with tempfile.TemporaryDirectory() as folder:
        # As many hashes as ours; its xxhash does not know xxhash 4, which wants bytes.
        config = MinhashConfig(num_buckets=32, hashes_per_bucket=8, hash_config=HashConfig(hash_fc='sha1'))
        plain = MinhashDedupSignature(folder, config, **own)
        ours = speed(lambda text: minhash.signature(words.word_hashes(text), 5, 256), few)
        show('minhash', ours, speed(lambda text: plain.get_signature(plain.get_shingles(text)), few, 1))
    index = decontaminate.Index({13: words.shingles(words.word_hashes(' '.join(texts[:3])), 13)})
    show('decontaminate', speed(lambda text: index.finds(words.word_hashes(text)), texts[3:]))


def tokenise(texts: list[str]) -> None:
    """The tokenise phase with two workers beside `tokenizers`' own batch encode on two threads."""
    import numpy as np

    from jaxtune.data.prepare import shards
    from jaxtune.recipe import recipes

    tokenizer = tokenizers.train_bpe(texts, 8192)
    texts = texts * max(1, int(8e6 / sum(map(len, texts))))
    size = sum(len(text.encode()) for text in texts) / 1e6
    count = 4
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name) / 'work'
        tokenizer.save_pretrained(str(work / 'tokenizer'))
        config = recipes.defaults()
        recipes.apply_overrides(config, {'data.train': 'x'})
        plan = plans.make(config.data, '')
        for rank in range(count):
            writer = shards.Writer(work / 'documents' / f'{rank:05d}.jsonl.zst')
            part = texts[rank::count]
            for text in part:
                writer.add(shards.Stored(0, '', text, 'text', {}))
            writer.close()
            ones = np.ones(len(part), np.uint8)
            shards.save(work / 'fates' / f'{rank:05d}.npz', start=np.int64(0), state=ones * 0, side=ones, copies=ones)
        backend = tokenizer.backend_tokenizer
        _share(work, plan, size / count)
        ours, theirs = [], []
        spawn = multiprocessing.get_context('spawn')
        with ProcessPoolExecutor(2, spawn, initializer=_warm, initargs=(str(work),)) as pool:
            list(pool.map(_nothing, range(8)))
            for _ in range(4):  # in turn, so that a busy machine is as busy for both
                start = time.perf_counter()
                for at in range(0, len(texts), 256):
                    backend.encode_batch_fast(texts[at : at + 256])
                theirs.append(size / (time.perf_counter() - start))
                start = time.perf_counter()
                list(pool.map(_encode, [(str(work), plan, rank) for rank in range(count)]))
                ours.append(size / (time.perf_counter() - start))
    row = {'step': 'tokenise, 2 cores', 'mb_per_second': round(max(ours), 2), 'batch_encode': round(max(theirs), 2)}
    print(json.dumps({**row, 'ratio': round(max(ours) / max(theirs), 2)}), flush=True)


def _share(work: pathlib.Path, plan, size: float) -> None:
    """Of one task's processor time, how much is `tokenizers`' own batch encode: the ratio of the two speeds."""

    encode, inside = tokenizers.encode_batch, []

    def timed(tokenizer, texts):
        start = time.process_time()
        backend = tokenizer.backend_tokenizer
        encodings = backend.encode_batch_fast(texts, add_special_tokens=True)
        inside.append(time.process_time() - start)
        return [encoding.ids for encoding in encodings]

    tokenizers.encode_batch = timed
    _encode((str(work), plan, 0))  # the tokenizer is opened once a process
    inside.clear()
    start = time.process_time()
    _encode((str(work), plan, 0))
    whole = time.process_time() - start
    tokenizers.encode_batch = encode
    row = {'step': 'tokenise, processor time', 'mb_per_second_a_core': round(size / whole, 2)}
    row |= {'batch_encode': round(size / sum(inside), 2), 'ratio': round(sum(inside) / whole, 2)}
    print(json.dumps(row), flush=True)


def _warm(work: str) -> None:
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    tokenizers.load(str(pathlib.Path(work) / 'tokenizer'))


def _nothing(number: int) -> None:
    time.sleep(0.5)  # long enough for the other worker to start


def _encode(arguments) -> None:
    """One task of the phase, its reading and writing with it."""
    import shutil

    from jaxtune.data.prepare import Work, phases

    work, plan, rank = arguments
    shutil.rmtree(pathlib.Path(work) / 'parts' / f'{rank:05d}', ignore_errors=True)
    phases.tokenise(Work(pathlib.Path(work), plan, 4), rank)


_RECIPE = """
from ml_collections import ConfigDict
def get_config():
    config = ConfigDict({{'task': 'prepare'}})
    config.data = ConfigDict({{'train': {path!r}, 'vocab_size': 8192}})
    config.data.steps = ConfigDict({{
        'clean': {{'encoding': True, 'unicode': True, 'markup': True, 'pii': True}},
        'filter': {{'preset': 'auto'}}, 'dedup': {{'near': 0.8, 'paragraphs': 3}},
        'tokenizer': {{'sample_bytes': 4_000_000}},
    }})
    return config
"""


def memory(texts: list[str], scales: tuple[int, ...]) -> None:
    """Whole runs over growing inputs: seconds, and the most memory that any of their processes held."""
    import psutil

    for scale in scales:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            with (folder / 'in.jsonl').open('w', encoding='utf-8') as file:
                for i in range(scale):
                    for j, text in enumerate(texts):
                        # Every copy has its own words, or deduplication would make the input small again.
                        mark = f' x{i}y{j} '
                        file.write(json.dumps({'text': mark.join(text.split(' '))[: 8000 + 40 * len(mark)]}) + '\n')
            size = (folder / 'in.jsonl').stat().st_size / 1e6
            (folder / 'recipe.py').write_text(_RECIPE.format(path=str(folder / 'in.jsonl')))
            command = [sys.executable, '-m', 'jaxtune.main', '--config', str(folder / 'recipe.py')]
            command += ['--workdir', str(folder / 'run'), '--config.data.workers=2']
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
            most = {'driver': 0, 'worker': 0}
            while process.poll() is None:
                for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                    try:
                        kind = 'driver' if each.pid == process.pid else 'worker'
                        most[kind] = max(most[kind], each.memory_info().rss)
                    except psutil.Error:
                        continue
                time.sleep(0.05)
            seconds = time.perf_counter() - start
            if process.returncode:
                raise SystemExit(f'the run failed with {process.returncode}')
            row = {
                'whole run': f'{size:.0f} MB',
                'seconds': round(seconds, 1),
                'mb_per_second': round(size / seconds, 2),
            }
            print(json.dumps({**row, **{f'{kind}_peak_mb': most[kind] >> 20 for kind in most}}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--text', type=pathlib.Path)
    parser.add_argument('--pages', type=pathlib.Path)
    parser.add_argument('--scales', default='1,10', help='sizes of the whole runs, as multiples of --text')
    parser.add_argument('--only', default='steps,tokenise,memory')
    arguments = parser.parse_args()
    if arguments.text:
        texts = [json.loads(line)['text'] for line in arguments.text.open(encoding='utf-8')]
    else:
        texts = list(stdlib.documents())[:300]
    if arguments.pages:
        pages = [web.decode(page.read_bytes(), html=True) for page in sorted(arguments.pages.rglob('*.htm*'))]
    else:
        pages = ['<html><body><p>' + '</p><p>'.join(text.split('\n\n')) + '</p></body></html>' for text in texts[:40]]
    if 'steps' in arguments.only:
        steps(texts, pages)
    if 'tokenise' in arguments.only:
        tokenise(texts)
    if 'memory' in arguments.only:
        memory(texts, tuple(map(int, arguments.scales.split(','))))


if __name__ == '__main__':
    main()
