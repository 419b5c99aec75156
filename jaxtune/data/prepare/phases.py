"""The phases of preparation as datatrove steps, each cut into tasks that know nothing of each other.

1. `Collect`: units are read, extracted, cleaned and filtered; documents and their hashes are stored.
2. `Bands`: near-duplicates are looked for, some bands of the signatures a task.
3. `Decide`: duplicates go, documents are held out (one task).
4. `Windows`, `Substrings`: runs of words that several documents hold are looked for, some of the hashes a task.
5. `Vocabulary`: a tokenizer is trained, or the one named is copied (one task).
6. `Tokenise`: what stays becomes tokens, or records.
7. `Build`: the parts become the training set, its statistics and its manifest (one task).

How the work is cut depends on the data alone, and every file appears whole or not at all: the result is the same bytes
whatever runs the tasks, however many at once, and however often they were interrupted.
"""

import collections
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from jaxtune.common import console, io
from jaxtune.data.prepare import assign_splits, build, minhash, readers, shards, substring_dedup, words
from jaxtune.data.prepare.plan import Plan
from jaxtune.data.prepare.process import Processor
from jaxtune.data.prepare.sources import Unit
from jaxtune.data.prepare.stats import Tally, total
from jaxtune.errors import UserError

logger.disable('datatrove')  # an exception says what is wrong; a page of log beside it does not help


class Phase(PipelineStep):
    """What all phases share.

    Args:
      work: folder that all tasks see.
      plan: what is asked.
      tasks: how many tasks `Collect` and `Tokenise` have.
    """

    type = 'jaxtune'

    def __init__(self, work: str, plan: Plan, tasks: int):
        super().__init__()
        self.work, self.plan, self.tasks = work, plan, tasks

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.work)

    @property
    def count(self) -> int:
        """Into how many tasks the phase is cut."""
        return 1

    @property
    def logs(self) -> pathlib.Path:
        return self.folder / 'logs' / self.name

    @property
    def refusals(self) -> pathlib.Path:
        """Where tasks leave the message of their `UserError`: not every engine hands the exception itself on."""
        return self.logs / 'refused'

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        console.quiet_logs()
        try:
            self.do(rank)
        except UserError as error:
            write_text(self.refusals / f'{rank:05d}', str(error))
            raise

    def do(self, rank: int) -> None:
        raise NotImplementedError


class Collect(Phase):
    name = 'collect'

    @property
    def count(self) -> int:
        return self.tasks

    def do(self, rank: int) -> None:
        units = [Unit(**unit) for unit in json.loads((self.folder / 'tasks' / f'{rank:05d}.json').read_text())]
        tally = Tally()
        process = Processor(self.plan, tally)
        index = _Index(self.plan)
        writer = shards.Writer(self.folder / 'documents' / f'{rank:05d}.jsonl.zst')
        for unit in units:
            for document in readers.read(unit, self.plan, tally.set_aside):
                if process(document, unit.source):
                    stored = shards.Stored(
                        unit.source, document.id, document.text, document.kind, document.metadata, document.record
                    )
                    writer.add(stored)
                    index.add(stored)
        writer.close()
        index.save(self.folder, rank)
        write_text(
            self.folder / 'tally' / f'collect-{rank:05d}.json', json.dumps({**tally.state(), 'seconds': tally.seconds})
        )


class _Index:
    """What `Decide` must know of the documents of a task."""

    def __init__(self, plan: Plan):
        self.plan, steps = plan, plan.steps
        self.near, self.hashes, self.ngram = steps['dedup.near'], steps['dedup.hashes'], steps['dedup.ngram']
        self.digests, self.bytes, self.sources, self.signatures = [], [], [], []
        self.groups, self.paragraphs, self.lines = [], [], []

    def add(self, document: shards.Stored) -> None:
        self.digests.append(assign_splits.digest(document.text))
        group = document.metadata.get('group')
        self.groups.append(assign_splits.digest(group)[0] if group else self.digests[-1][0])
        self.bytes.append(len(document.text.encode()))
        self.sources.append(document.source)
        if self.near:
            self.signatures.append(minhash.signature(words.word_hashes(document.text), self.ngram, self.hashes))
        if self.plan.steps['dedup.paragraphs'] and document.kind not in substring_dedup.WHOLE:
            hashes, _ = assign_splits.paragraph_hashes(document.text)
            hashes = hashes[hashes > 0]
            self.paragraphs.append(hashes)
            self.lines.append(len(hashes))
        else:
            self.lines.append(0)

    def save(self, folder: pathlib.Path, rank: int) -> None:
        if self.near:
            signatures = np.array(self.signatures, np.uint32).reshape(-1, self.hashes)
            values = minhash.band_hashes(signatures, *minhash.bands(self.near, self.hashes))
            save_array(folder / 'bands' / f'{rank:05d}.npy', np.ascontiguousarray(values.T))
            save_array(folder / 'short' / f'{rank:05d}.npy', minhash.short(signatures))
        shards.save(
            folder / 'index' / f'{rank:05d}.npz',
            digest=np.array(self.digests, np.uint64).reshape(-1, 2),
            group=np.array(self.groups, np.uint64),
            bytes=np.array(self.bytes, np.int64),
            source=np.array(self.sources, np.int32),
            lines=np.array(self.lines, np.int64),
            paragraphs=np.concatenate([np.zeros(0, np.uint64), *self.paragraphs]),
        )


class Bands(Phase):
    name = 'near-duplicates'

    @property
    def count(self) -> int:
        return assign_splits.BAND_TASKS

    def do(self, rank: int) -> None:
        found = assign_splits.edges(assign_splits.Corpus(self.folder, self.tasks), self.plan, rank)
        save_array(self.folder / 'edges' / f'{rank:05d}.npy', found)


class Decide(Phase):
    name = 'decide'

    def do(self, rank: int) -> None:
        check_broken(self.folder, self.tasks, self.plan)
        corpus = assign_splits.Corpus(self.folder, self.tasks)
        pairs = np.zeros((0, 2), np.int64)
        if self.plan.steps['dedup.near']:
            parts = [np.load(self.folder / 'edges' / f'{i:05d}.npy') for i in range(assign_splits.BAND_TASKS)]
            pairs = np.concatenate(parts)
        fates = assign_splits.decide(corpus, self.plan, pairs)
        for task in range(self.tasks):
            part = slice(corpus.starts[task], corpus.starts[task + 1])
            shards.save(
                self.folder / 'fates' / f'{task:05d}.npz',
                start=corpus.starts[task],
                **{name: values[part] for name, values in fates.items()},
            )
        if most := self.plan.steps['dedup.paragraphs']:
            substring_dedup.paragraphs(self.folder, corpus, fates['state'], most)


def check_broken(folder: pathlib.Path, tasks: int, plan: Plan) -> None:
    """Fails where more is broken than the recipe allows.

    Raises:
      UserError: with the first of it.
    """
    states = [json.loads((folder / 'tally' / f'collect-{rank:05d}.json').read_text()) for rank in range(tasks)]
    broken = total(states)['broken']
    limit = plan.steps['limits.broken']
    if len(broken) > limit:
        raise UserError(
            f'{broken[0]["place"]}: {broken[0]["reason"]}; {len(broken)} broken files and records in all, more than '
            f'data.steps.limits.broken={limit}'
        )


class Remains(NamedTuple):
    """A document that stays.

    Attributes:
      number: among all documents.
      document: as collected.
      text: as it stays.
      side, copies: as `decide.decide` says.
    """

    number: int
    document: shards.Stored
    text: str
    side: int
    copies: int


class Remaining:
    """The documents of a task that stay, as they stay.

    Args:
      phase: whose folder and plan are used.
      rank: of the task.
      tally: counts what goes; None = nobody asks.
      substrings: whether they are known already.
    """

    def __init__(self, phase: Phase, rank: int, tally: Tally | None = None, substrings: bool = True):
        self.folder, self.plan, self.rank, self.tally = phase.folder, phase.plan, rank, tally or Tally()
        self.fates = shards.load(self.folder / 'fates' / f'{rank:05d}.npz')
        self.cutters = []
        if self.plan.steps['dedup.paragraphs']:
            self.cutters.append(substring_dedup.Paragraphs(self.folder))
        if substrings and (length := self.plan.steps['dedup.substring']):
            self.cutters.append(substring_dedup.Substrings(self.folder, length))

    def __iter__(self) -> Iterator[Remains]:
        states, sides, copies = (self.fates[name].tolist() for name in ('state', 'side', 'copies'))
        number = int(self.fates['start'])
        documents = shards.read(self.folder / 'documents' / f'{self.rank:05d}.jsonl.zst')
        tally, near = self.tally, bool(self.plan.steps['dedup.near'])
        for i, document in enumerate(documents):
            size = len(document.text.encode())
            if states[i] == shards.EXACT:
                tally.dropped('exact duplicates', size, 'the same text before', document.id, document.text)
                continue
            tally.passed('exact duplicates', size, size)
            if states[i] == shards.NEAR:
                tally.dropped('near-duplicates', size, 'nearly the same text before', document.id, document.text)
                continue
            if near:
                tally.passed('near-duplicates', size, size)
            text = document.text if document.kind in substring_dedup.WHOLE else self._cut(document, number + i)
            if text is None:
                continue
            size = len(text.encode())
            if not copies[i]:
                tally.dropped('mixture', size, 'weight of its source below 1', document.id, text)
                continue
            tally.source(self.plan.sources[document.source].label, 'kept', size)
            yield Remains(number + i, document, text, sides[i], copies[i])

    def _cut(self, document: shards.Stored, number: int) -> str | None:
        """A document's text without what others hold; None if too little is left."""
        text, size = document.text, len(document.text.encode())
        for cutter in self.cutters:
            text = cutter.cut(text, number)
            after = len(text.encode())
            if len(text.strip()) < max(1, self.plan.keys['min_chars']):
                self.tally.dropped(cutter.name, size, cutter.reason, document.id, document.text)
                return None
            self.tally.passed(cutter.name, size, after, after != size)
            size = after
        return text


class Windows(Phase):
    name = 'windows'

    @property
    def count(self) -> int:
        return self.tasks

    def do(self, rank: int) -> None:
        found = substring_dedup.Windows(self.plan.steps['dedup.substring'])
        for each in Remaining(self, rank, substrings=False):
            if each.document.kind not in substring_dedup.WHOLE:
                found.add(each.text, each.number)
        save_array(self.folder / 'windows' / f'{rank:05d}.npy', found.merged())


class Substrings(Phase):
    name = 'substrings'

    @property
    def count(self) -> int:
        return substring_dedup.SUBSTRING_TASKS

    def do(self, rank: int) -> None:
        substring_dedup.substrings(self.folder, self.tasks, rank)


class Vocabulary(Phase):
    name = 'tokenizer'

    def do(self, rank: int) -> None:
        from jaxtune.data import tokenizer as tokenizers

        target = self.folder / 'tokenizer'
        if self.plan.tokenizer:
            tokenizer = tokenizers.load(self.plan.tokenizer)
        else:
            steps = self.plan.steps
            tokenizer = tokenizers.train(
                self._texts(), self.plan.keys['vocab_size'], steps['tokenizer.model'], steps['tokenizer.special_tokens']
            )
        temporary = self.folder / f'.tokenizer.{os.uname().nodename}.{os.getpid()}'
        shutil.rmtree(temporary, ignore_errors=True)
        tokenizer.save_pretrained(str(temporary))
        io.replace_folder(temporary, target)

    def _texts(self) -> Iterator[str]:
        indexes = [shards.load(self.folder / 'index' / f'{rank:05d}.npz') for rank in range(self.tasks)]
        share = self.plan.steps['tokenizer.sample_bytes'] / max(1, sum(int(part['bytes'].sum()) for part in indexes))
        del indexes
        for rank in range(self.tasks):
            for each in Remaining(self, rank):
                if each.side == assign_splits.TRAIN and (
                    share >= 1 or assign_splits.digest(each.text)[1] / 2.0**64 < share
                ):
                    yield each.text


class Tokenise(Phase):
    name = 'tokenise'

    @property
    def count(self) -> int:
        return self.tasks

    def do(self, rank: int) -> None:
        tally = Tally()
        made = collections.Counter()
        with build.Part(self.folder, rank, self.plan) as part:
            for each in Remaining(self, rank, tally):
                part.add(each.document, each.text, each.side == assign_splits.TRAIN, each.copies)
                made[self.plan.sources[each.document.source].label] += each.copies
        state = {**tally.state(), 'copies': dict(made), 'tokens': part.tokens}
        write_text(self.folder / 'tally' / f'tokenise-{rank:05d}.json', json.dumps(state))


class Build(Phase):
    name = 'build'

    def do(self, rank: int) -> None:
        build.assemble(self.folder, self.folder.parent, self.plan, self.tasks)


def phases(work: pathlib.Path, plan: Plan, tasks: int) -> list[Phase]:
    """What there is to do, in order."""
    kinds = [Collect]
    if plan.steps['dedup.near']:
        kinds.append(Bands)
    kinds.append(Decide)
    if plan.steps['dedup.substring']:
        kinds += [Windows, Substrings]
    if not plan.records:
        kinds.append(Vocabulary)
    return [kind(str(work), plan, tasks) for kind in [*kinds, Tokenise, Build]]


def save_array(path: pathlib.Path, values: np.ndarray) -> None:
    """Writes an array whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.atomic_file(path, sync=False) as file:
        np.save(file, values, allow_pickle=False)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    io.write_text(path, text, sync=False)
