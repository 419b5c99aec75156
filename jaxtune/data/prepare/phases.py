"""The phases of preparation by steps, each cut into tasks that know nothing of each other.

How the work is cut depends on the data alone, and every file appears whole or not at all: the result is the same bytes
whatever runs the tasks, however many at once, and however often they were interrupted.
"""

import collections
import json
import os
import shutil
from collections.abc import Iterator

import numpy as np

from jaxtune.common import io
from jaxtune.data.prepare import (
    Phase,
    Work,
    assign_splits,
    build,
    near_duplicates,
    readers,
    shards,
    steps,
    task_of_each_source_part,
)
from jaxtune.data.prepare.filtering import Filters
from jaxtune.data.prepare.plan import Plan
from jaxtune.data.prepare.remaining import Remaining
from jaxtune.data.prepare.sources import Unit
from jaxtune.data.prepare.stats import Stats
from jaxtune.errors import UserError


def pipeline(plan: Plan) -> list[Phase]:
    """What a plan asks for, in order: `(name, what it does, function, number of tasks)`."""
    corpora = [step.corpus for step in steps.asked_for(plan) if step.corpus is not None]
    before = [phase for corpus in corpora for phase in corpus.before_splits]
    after = [phase for corpus in corpora for phase in corpus.after_splits]
    each = task_of_each_source_part
    return [
        Phase('collect', 'files are read, their documents go through the per-document steps', collect, each),
        *before,
        Phase('decide', 'duplicates are dropped, documents are held out', split),
        *after,
        *([] if plan.records else [Phase('tokenizer', 'one is trained, or the one named is copied', make_tokenizer)]),
        Phase('tokenise', 'what stays becomes tokens, or records', tokenise, each),
        Phase('build', 'the parts become the training set, its statistics and its manifest', assemble),
    ]


def collect(work: Work, rank: int) -> None:
    """Reads a task's files; stores the documents that pass, and what the whole-corpus steps note of them."""
    plan = work.plan
    units = [Unit(**unit) for unit in json.loads((work.folder / 'tasks' / f'{rank:05d}.json').read_text())]
    stats = Stats()
    passes = Filters(plan, stats)
    corpora = [step.corpus for step in steps.asked_for(plan) if step.corpus is not None]
    indexes = [corpus.index(plan.settings) for corpus in corpora if corpus.index is not None]
    writer = shards.Writer(work.folder / 'documents' / f'{rank:05d}.jsonl.zst')
    for unit in units:
        for document in readers.read(unit, plan, stats.set_aside):
            if not passes(document, unit.source):
                continue
            stored = shards.Stored(
                unit.source, document.id, document.text, document.kind, document.metadata, document.record
            )
            writer.add(stored)
            for index in indexes:
                index.add(stored)
    writer.close()
    for index in indexes:
        index.save(work.folder, rank)
    state = json.dumps({**stats.state(), 'seconds': stats.seconds})
    shards.write_text(work.folder / 'stats' / f'collect-{rank:05d}.json', state)


def split(work: Work, rank: int) -> None:
    """Drops duplicates, and assigns the splits of all documents."""
    plan = work.plan
    check_broken(work)
    corpus = assign_splits.Corpus(work.folder, work.tasks)
    near = plan.settings.steps.dedup.near
    pairs = near_duplicates.pairs(work) if near else np.zeros((0, 2), np.int64)
    fates = assign_splits.assign_splits(corpus, plan, pairs)
    for task in range(work.tasks):
        part = slice(corpus.starts[task], corpus.starts[task + 1])
        values = {name: values[part] for name, values in fates.items()}
        shards.save(work.folder / 'fates' / f'{task:05d}.npz', start=corpus.starts[task], **values)
    for step in steps.asked_for(plan):
        if step.corpus is not None and step.corpus.at_splits is not None:
            step.corpus.at_splits(work, corpus, fates['state'])


def check_broken(work: Work) -> None:
    """Fails where more is broken than the recipe allows.

    Raises:
      UserError: with the first of it.
    """
    paths = [work.folder / 'stats' / f'collect-{rank:05d}.json' for rank in range(work.tasks)]
    broken = [row for path in paths for row in json.loads(path.read_text())['broken']]
    limit = work.plan.steps['limits.broken']
    if len(broken) > limit:
        raise UserError(
            f'{broken[0]["place"]}: {broken[0]["reason"]}; {len(broken)} broken files and records in all, more than '
            f'data.steps.limits.broken={limit}'
        )


def make_tokenizer(work: Work, rank: int) -> None:
    """Trains a tokenizer on the training split, or copies the one that the recipe names."""
    from jaxtune.data import tokenizer as tokenizers  # slow to import: worker processes do without

    plan = work.plan
    if plan.tokenizer:
        tokenizer = tokenizers.load(plan.tokenizer)
    else:
        model, special_tokens = plan.steps['tokenizer.model'], plan.steps['tokenizer.special_tokens']
        tokenizer = tokenizers.train(_sample(work), plan.keys['vocab_size'], model, special_tokens)
    tokenizers.add_tokens(tokenizer, plan.added)
    temporary = work.folder / f'.tokenizer.{os.uname().nodename}.{os.getpid()}'
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save_pretrained(str(temporary))
    io.replace_folder(temporary, work.folder / 'tokenizer')


def _sample(work: Work) -> Iterator[str]:
    """About `data.steps.tokenizer.sample_bytes` of the texts to train on."""
    size = 0
    for rank in range(work.tasks):
        size += int(shards.load(work.folder / 'index' / f'{rank:05d}.npz')['bytes'].sum())
    share = work.plan.steps['tokenizer.sample_bytes'] / max(1, size)
    for rank in range(work.tasks):
        for candidate in Remaining(work, rank):
            if candidate.side != assign_splits.TRAIN:
                continue
            if share >= 1 or assign_splits.digest(candidate.text)[1] / 2.0**64 < share:
                yield candidate.text


def tokenise(work: Work, rank: int) -> None:
    """Makes tokens, or records, of the documents of a task that stay."""
    stats, copies = Stats(), collections.Counter()
    with build.Part(work, rank) as part:
        for candidate in Remaining(work, rank, stats):
            part.add(candidate.document, candidate.text, candidate.side == assign_splits.TRAIN, candidate.copies)
            copies[work.plan.sources[candidate.document.source].label] += candidate.copies
    state = {**stats.state(), 'copies': dict(copies), 'tokens': part.tokens}
    shards.write_text(work.folder / 'stats' / f'tokenise-{rank:05d}.json', json.dumps(state))


def assemble(work: Work, rank: int) -> None:
    """Puts the parts together in the workdir."""
    build.assemble(work, work.folder.parent)
