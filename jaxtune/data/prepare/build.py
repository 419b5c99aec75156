"""The end: each task's tokens or records, and the training set, its statistics and its manifest made of them."""

import functools
import hashlib
import json
import os
import pathlib
import shutil
import zlib
from importlib import metadata
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from jaxtune.common import io
from jaxtune.data.prepare import HELD_OUT, Work, steps
from jaxtune.data.prepare.plan import Plan
from jaxtune.data.prepare.shards import Stored
from jaxtune.data.prepare.stats import total

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 21, 4096
_GZIP_LIMIT = 64 << 20
STATS, MANIFEST, SET_ASIDE, TRAIN_RECORDS = 'stats.json', 'manifest.json', 'set_aside.jsonl', 'train.jsonl'
_SIDES: tuple[str, str] = ('train', 'eval')


class Part:
    """The tokens, or records, of one task; in place once the context is left without an exception.

    Args:
      work: the folder between the phases, and the plan.
      rank: of the task.
    """

    def __init__(self, work: Work, rank: int) -> None:
        plan, folder = work.plan, work.folder
        self.folder, self.plan = folder / 'parts' / f'{rank:05d}', plan
        self.temporary = self.folder.with_name(f'.{rank:05d}.{os.uname().nodename}.{os.getpid()}')
        self.tokens: dict[str, int] = {}
        if not plan.records:
            from jaxtune.data import tokenizer as tokenizers  # slow to import: worker processes do without
            from jaxtune.data.tokens import dtype_of  # slow to import: worker processes do without

            changed = (folder / 'tokenizer').stat().st_mtime_ns
            self.tokenizer = _tokenizer(str(folder / 'tokenizer'), changed)
            self.encode = tokenizers.encode_batch
            self.eos = self.tokenizer.eos_token_id if plan.keys['append_eos'] else None
            self.dtype = dtype_of(tokenizers.vocab_size(self.tokenizer))

    def __enter__(self) -> 'Part':
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        self.texts = {side: (self.temporary / f'{side}.jsonl').open('w', encoding='utf-8') for side in _SIDES}
        self.bins = {side: (self.temporary / f'{side}.bin').open('wb') for side in _SIDES}
        self.lengths: dict[str, list[int]] = {side: [] for side in _SIDES}
        self.text_bytes: dict[str, int] = dict.fromkeys(_SIDES, 0)
        self.pending: list[tuple[str, str, int, str]] = []
        self.characters = 0
        return self

    def add(self, document: Stored, text: str, train: bool, copies: int) -> None:
        """Takes one document."""
        side = 'train' if train else 'eval'
        if self.plan.records:
            line = json.dumps(document.record, ensure_ascii=False) + '\n'
            self.texts[side].write(line * copies)
            self.lengths[side] += [1] * copies
            self.text_bytes[side] += copies * len(text.encode())
            return
        if not train:
            self.texts[side].write(json.dumps({'text': text}, ensure_ascii=False) + '\n')
        self.pending.append((side, text, copies, self.plan.sources[document.source].label))
        self.characters += len(text)
        if self.characters >= _BATCH_CHARACTERS or len(self.pending) >= _BATCH_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        encoded = self.encode(self.tokenizer, [text for _, text, _, _ in self.pending])
        for (side, text, copies, label), ids in zip(self.pending, encoded, strict=True):
            if self.eos is not None and (not ids or ids[-1] != self.eos):
                ids = [*ids, self.eos]
            data = np.asarray(ids, self.dtype).tobytes()
            for _ in range(copies):
                self.bins[side].write(data)
            self.lengths[side] += [len(ids)] * copies
            self.text_bytes[side] += copies * len(text.encode())
            self.tokens[label] = self.tokens.get(label, 0) + copies * len(ids)
        self.pending, self.characters = [], 0

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and self.pending:
            self._flush()
        for file in (*self.texts.values(), *self.bins.values()):
            file.close()
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        for side in _SIDES:
            np.save(self.temporary / f'{side}.npy', np.array(self.lengths[side], np.int64), allow_pickle=False)
        (self.temporary / 'bytes.json').write_text(json.dumps(self.text_bytes))
        try:
            os.rename(self.temporary, self.folder)
        except OSError:  # the same part, by a run before this one
            shutil.rmtree(self.temporary, ignore_errors=True)


@functools.lru_cache(1)
def _tokenizer(path: str, changed: int) -> 'PreTrainedTokenizerBase':
    """Opened once a process, not once a task."""
    from jaxtune.data import tokenizer as tokenizers  # slow to import: worker processes do without

    return tokenizers.load(path)


def assemble(work: Work, workdir: pathlib.Path) -> None:
    """Puts the parts together in the workdir."""
    stats = statistics(work)
    folder, plan, tasks = work.folder, work.plan, work.tasks
    if plan.records:
        for side, name in zip(_SIDES, (TRAIN_RECORDS, HELD_OUT), strict=True):
            _join(folder, tasks, f'{side}.jsonl', workdir / name)
    else:
        from jaxtune.data import tokenizer as tokenizers  # slow to import: worker processes do without

        _copy_folder(folder / 'tokenizer', workdir / 'tokenizer')
        tokenizer = tokenizers.load(str(workdir / 'tokenizer'))
        for side in _SIDES:
            temporary = workdir / f'.{side}.{os.getpid()}'
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            meta = _tokens(folder, tasks, side, temporary, tokenizer, plan)
            if meta['documents']:
                io.replace_folder(temporary, workdir / side)
            else:
                shutil.rmtree(temporary)
            stats[side] = {name: meta[name] for name in ('documents', 'tokens', 'text_bytes', 'gzip_bits_per_byte')}
        stats['vocab_size'] = tokenizers.vocab_size(tokenizer)
        _join(folder, tasks, 'eval.jsonl', workdir / HELD_OUT)
    rows = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in stats['broken'])
    io.write_text(workdir / SET_ASIDE, rows, sync=False)
    io.write_text(workdir / STATS, json.dumps(stats, indent=1, ensure_ascii=False) + '\n', sync=False)
    contents = json.dumps(manifest(workdir, plan, stats), indent=1, ensure_ascii=False) + '\n'
    io.write_text(workdir / MANIFEST, contents, sync=False)


def statistics(work: Work) -> dict[str, Any]:
    """What all tasks counted, without anything that differs from run to run."""
    plan, folder, ranks = work.plan, work.folder / 'stats', range(work.tasks)
    collected = [json.loads((folder / f'collect-{rank:05d}.json').read_text()) for rank in ranks]
    tokenised = [json.loads((folder / f'tokenise-{rank:05d}.json').read_text()) for rank in ranks]
    order = [step.name for step in steps.every(plan.custom_steps)]
    stats = total(collected + [{**state, 'broken': [], 'languages': {}} for state in tokenised], order)
    for name in ('tokens', 'copies'):
        for state in tokenised:
            for label, count in state[name].items():
                entry = stats['sources'].setdefault(label, {})
                entry[name] = entry.get(name, 0) + count
    stats['sources'] = {source.label: stats['sources'].get(source.label, {}) for source in plan.sources}
    stats['broken'] += [{'place': path, 'reason': 'holds no data that can be read'} for path in plan.empty]
    return stats


def _tokens(
    work: pathlib.Path, tasks: int, side: str, folder: pathlib.Path, tokenizer: 'PreTrainedTokenizerBase', plan: Plan
) -> dict[str, Any]:
    from jaxtune.data import tokenizer as tokenizers  # slow to import: worker processes do without
    from jaxtune.data.tokens import dtype_of, write_meta  # slow to import: worker processes do without

    parts = [work / 'parts' / f'{rank:05d}' for rank in range(tasks)]
    lengths = [np.load(part / f'{side}.npy', allow_pickle=False) for part in parts]
    size = np.dtype(dtype_of(tokenizers.vocab_size(tokenizer))).itemsize
    shards, file, room = [], None, 0
    for part, counts in zip(parts, lengths, strict=True):
        with (part / f'{side}.bin').open('rb') as source:
            left = int(counts.sum())
            ends = np.cumsum(counts)
            done = 0
            while done < left:
                if file is None or room <= 0:
                    if file is not None:
                        file.close()
                    file, room = (folder / f'tokens-{len(shards):05d}.bin').open('wb'), plan.steps['build.shard_tokens']
                    shards.append(0)
                # Up to the last document that fits, or one that alone is larger than a file.
                fits = int(np.searchsorted(ends, done + room, 'right'))
                end = int(ends[fits - 1]) if fits and ends[fits - 1] > done else 0
                if not end:
                    if shards[-1]:
                        room = 0
                        continue
                    end = int(ends[np.searchsorted(ends, done, 'right')])
                _copy(source, file, (end - done) * size)
                shards[-1] += end - done
                room -= end - done
                done = end
    if file is not None:
        file.close()
    if len(shards) == 1:
        os.rename(folder / 'tokens-00000.bin', folder / 'tokens.bin')
    text_bytes = sum(json.loads((part / 'bytes.json').read_text())[side] for part in parts)
    ratio = _gzip(work, tasks, text_bytes) if side == 'eval' and text_bytes else None
    source = ', '.join(f'{source.key}={source.path}' for source in plan.sources)
    counts = np.concatenate(lengths)
    return write_meta(folder, counts, text_bytes, tokenizer, plan.keys['append_eos'], source, ratio, shards)


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        data = source.read(min(count, 1 << 22))
        target.write(data)
        count -= len(data)


def _gzip(work: pathlib.Path, tasks: int, text_bytes: int) -> float | None:
    """Bits a byte that `gzip -9` needs for the held-out documents joined by newlines."""
    if text_bytes > _GZIP_LIMIT:
        return None
    packer, size, first = zlib.compressobj(9, wbits=31), 0, True
    for rank in range(tasks):
        with (work / 'parts' / f'{rank:05d}' / 'eval.jsonl').open(encoding='utf-8') as file:
            for line in file:
                data = json.loads(line)['text'].encode()
                size += len(packer.compress(data if first else b'\n' + data))
                first = False
    return 8 * (size + len(packer.flush())) / text_bytes


def _join(work: pathlib.Path, tasks: int, name: str, target: pathlib.Path) -> None:
    parts = [work / 'parts' / f'{rank:05d}' / name for rank in range(tasks)]
    if not any(part.stat().st_size for part in parts):
        return
    with io.atomic_file(target, sync=False) as file:
        for path in parts:
            with path.open('rb') as part:
                shutil.copyfileobj(part, file, 1 << 20)


def _copy_folder(source: pathlib.Path, target: pathlib.Path) -> None:
    temporary = target.with_name(f'.{target.name}.new')
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    io.replace_folder(temporary, target)


def manifest(workdir: pathlib.Path, plan: Plan, stats: dict[str, Any]) -> dict[str, Any]:
    """What was made, of what, by what: files with their SHA-256, counts, versions and the recipe."""
    names = ('train', 'eval', 'tokenizer', TRAIN_RECORDS, HELD_OUT, STATS, SET_ASIDE)
    paths = []
    for name in names:
        path = workdir / name
        paths += sorted(path.rglob('*')) if path.is_dir() else [path] if path.is_file() else []
    packages = ('jaxtune', 'datatrove', 'ftfy', 'numpy', 'tokenizers', 'trafilatura', 'transformers')
    return {
        'files': {
            path.relative_to(workdir).as_posix(): {'bytes': path.stat().st_size, 'sha256': _sha256(path)}
            for path in paths
            if path.is_file()
        },
        'sources': [{**vars(source), **stats['sources'][source.label]} for source in plan.sources],
        'steps': dict(plan.steps),
        **({'custom_steps': list(plan.custom_steps)} if plan.custom_steps else {}),
        'keys': {**plan.keys, 'format': plan.format, 'tokenizer': plan.tokenizer},
        'set_aside': len(stats['broken']),
        'versions': {name: version for name in packages if (version := _version(name))},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ''


def _sha256(path: pathlib.Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
