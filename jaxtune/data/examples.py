"""Examples: tokens of conversations with which of them are trained, encoded once into a folder and memory-mapped."""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtune.common import console
from jaxtune.common.io import replace_folder
from jaxtune.data import formats, holdout, stdlib_instructions, templates
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.cache import once, prepared_tokens
from jaxtune.data.chat_encoder import ChatEncoder, Encoded
from jaxtune.data.formats import Chat, FormatError
from jaxtune.data.packing import Row, pack
from jaxtune.data.records import Records, open_records
from jaxtune.data.spec import DataSpec
from jaxtune.data.templates import Template
from jaxtune.errors import UserError

_VERSION = 4  # of how conversations become tokens: another number makes the cache anew
_AT_ONCE = 32  # conversations rendered in one request


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples one after the other.

    Attributes:
      ids: `[tokens]` int32.
      assistant_mask: `[tokens]` bool, whether a token is trained.
      offsets: `[examples + 1]` int64, where each begins.
      extra: further arrays by name, as the objective put them there.
      notes: what there is to say about how they were made.
      weights: `[tokens]` float32, of trained tokens, where any is not 1; else None.
    """

    ids: np.ndarray
    assistant_mask: np.ndarray
    offsets: np.ndarray
    extra: Mapping[str, np.ndarray]
    notes: tuple[str, ...] = ()
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Encoded:
        low, high = self.offsets[index], self.offsets[index + 1]
        weights = self.assistant_mask if self.weights is None else self.weights
        return Encoded(np.asarray(self.ids[low:high]), np.asarray(weights[low:high], np.float32))

    @classmethod
    def of(
        cls, encoded: Iterable[Encoded], extra: Mapping[str, Any] | None = None, notes: Iterable[str] = ()
    ) -> 'Examples':
        """Examples in memory."""
        encoded = list(encoded)
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(one.ids) for one in encoded], out=offsets[1:])
        ids = np.concatenate([one.ids for one in encoded] or [np.zeros(0, np.int32)])
        assistant_mask = np.concatenate([one.assistant_mask for one in encoded] or [np.zeros(0, np.float32)])
        arrays = {name: np.asarray(value) for name, value in (extra or {}).items()}
        trained = assistant_mask > 0
        weights = None if (assistant_mask[trained] == 1).all() else assistant_mask.astype(np.float32)
        return cls(ids.astype(np.int32), trained, offsets, arrays, tuple(notes), weights)

    def save(self, folder: pathlib.Path) -> None:
        """Writes a folder that appears whole or not at all."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f'.{folder.name}.{os.getpid()}')
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        arrays = {'ids': self.ids, 'trained': self.assistant_mask, 'offsets': self.offsets}
        arrays |= {} if self.weights is None else {'weights': self.weights}
        arrays |= {f'extra.{name}': value for name, value in self.extra.items()}
        for name, array in arrays.items():
            np.save(temporary / f'{name}.npy', array, allow_pickle=False)
        meta = {'arrays': sorted(arrays), 'notes': list(self.notes)}
        (temporary / 'meta.json').write_text(json.dumps(meta, ensure_ascii=False) + '\n', encoding='utf-8')
        replace_folder(temporary, folder)

    @classmethod
    def open(cls, folder: pathlib.Path) -> 'Examples':
        """Maps a folder that `save` made.

        Raises:
          UserError: it is damaged.
        """
        try:
            meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
            arrays = {name: np.load(folder / f'{name}.npy', 'r', allow_pickle=False) for name in meta['arrays']}
            extra = {name.removeprefix('extra.'): array for name, array in arrays.items() if name.startswith('extra.')}
            parts = arrays['ids'], arrays['trained'], arrays['offsets'], extra, tuple(meta['notes'])
            return cls(*parts, arrays.get('weights'))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f'{folder}: damaged: {error}; expected what an earlier run cached there') from None


class Source:
    """The conversations of `data.train` or `data.eval`, and the template that they are read with.

    Args:
      data: where they are, and how they are read.
      split: `train` or `eval`.
      tokenizer: of the run; gets the template as its own, so that the exported folder carries it.
      suits: formats that the objective reads.

    Raises:
      UserError: no such data or template, or data of another format.
    """

    def __init__(self, data: DataSpec, split: str, tokenizer: PreTrainedTokenizerBase, suits: tuple[str, ...]) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.records = holdout.part(open_data(data.path(split), holdout.key_of(data, split), suits), data, split)
        counts = formats.find(self.records, data.format, self.records.name, suits)
        self.formats = ', '.join(f'{name} ({count:,})' for name, count in counts.items())
        self.format = next(iter(counts), '') if len(counts) == 1 else ''
        self.template = open_template(data, tokenizer, self.format, self.records)
        self.demonstrations = demonstrations(data.demonstrations)

    def prepared(self, chat: Chat) -> Chat:
        """A conversation with the recipe's system prompt and demonstrations."""
        return prepare(chat, self.data.system, self.demonstrations)

    def encoder(self, train_on: str) -> ChatEncoder:
        """Encodes prepared conversations."""
        skip = len(self.demonstrations) + 1 if self.demonstrations else 0
        return ChatEncoder(self.template, self.tokenizer, train_on, skip, self.data.vocab_size)

    def cached(self, cache: pathlib.Path, key: str, settings: list, build: Callable[[], Examples]) -> Examples:
        """What `build` makes, from the cache if these settings made it before."""
        identity = [_VERSION, self.records.identity, tokenizers.fingerprint(self.tokenizer), self.template.source]
        identity += [list(self.template.tokens), self.template.args, self.format, self.data.system, settings]
        identity += [json.dumps(list(self.demonstrations), sort_keys=True)]
        if tokenizers.vocab_size(self.tokenizer) > (rows := self.data.vocab_size) > 0:
            identity.append(rows)  # with which a conversation may be refused
        folder = cache / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        once(lambda: (folder / 'meta.json').is_file(), lambda: build().save(folder), key)
        examples = Examples.open(folder)
        console.note(f'{self.records.name}: format {self.formats}, template {self.template.name}')
        for note in examples.notes:
            console.note(f'{self.records.name}: {note}')
        return examples


def open_data(path: str, key: str, suits: tuple[str, ...]) -> Records:
    """The records of a recipe's key; `python-stdlib` stands for instructions made of its documentation."""
    if path == 'python-stdlib':
        return stdlib_instructions.open_instructions(key, 'preference' in suits)
    return open_records(path, key)


def is_text(data: DataSpec, split: str) -> bool:
    """Whether a source holds texts, not conversations: by its format, or beside other sources by its first record.

    Alone and without `data.format=text`, texts are taken for conversations that are wrong.
    """
    if data.format != 'auto' or not data.label:
        return data.format == 'text'
    if prepared_tokens(data.path(split), holdout.key_of(data, split)) is not None:
        return True
    record = first_record(data, split)
    return formats.detect(record) is None and data.text_key in record


def first_record(data: DataSpec, split: str) -> dict[str, Any]:
    """The first record of a source; {} where it is no object, and for `python-stdlib`, which has no fields."""
    path = data.path(split)
    if path == 'python-stdlib':
        return {}
    _, record = next(iter(open_records(path, holdout.key_of(data, split), None, data.text_key)), ('', None))
    return record if isinstance(record, dict) else {}


def recordwise(name: str, suits: tuple[str, ...]) -> holdout.Recordwise:
    """How conversations or pairs are told apart: by all that is read of them, and by nothing else."""

    def content(data: DataSpec, record: Any) -> Any:
        held = record if isinstance(record, dict) else {}
        found = {name: held[name] for name in formats.CONTENT if name in held}
        return found or held.get(data.text_key, record)

    def open_source(data: DataSpec, key: str) -> Records:
        if 'preference' not in suits and is_text(data, 'train'):
            return open_records(data.path('train'), key, None, data.text_key)
        return open_data(data.path('train'), key, suits)

    return holdout.Recordwise(name, open_source, content)


def open_template(data: DataSpec, tokenizer: PreTrainedTokenizerBase, format_name: str, records: Iterable) -> Template:
    """The template that the data wants, which becomes the tokenizer's own.

    Raises:
      UserError: there is no such template, or it does not compile.
    """
    raw = is_raw(format_name, records)
    template = templates.open_template(data.template, tokenizer, format_name, raw, data.template_args)
    if data.template == 'auto' and not tokenizer.chat_template:
        marks = ', '.join(templates.unknown_marks(template, tokenizer))
        console.note(
            f'data.template=auto: the tokenizer has no chat template, so {template.name} is taken'
            + (f'; {marks} is no token of its vocabulary and is cut in pieces' if marks else '')
        )
    tokenizer.chat_template = template.source
    return template


def is_raw(format_name: str, records: Iterable) -> bool:
    """Whether the first record is made of texts that follow each other, not of turns."""
    for place, record in records:
        try:
            if format_name == 'preference':
                pair = formats.preference(place, record)
                answer = pair.chosen or pair.rejected
                assert answer is not None  # `formats.preference` refuses a record without either
                return answer.raw
            return formats.chat(format_name, place, record, answered=False).raw
        except FormatError:
            return False  # reading all of them says what is wrong
    return False


def demonstrations(path: str) -> tuple[dict, ...]:
    """The turns of `sft.demonstrations`, which stand before every conversation.

    Raises:
      UserError: they are no conversations.
    """
    if not path:
        return ()
    records = open_records(path, 'sft.demonstrations')
    formats.find(records, 'auto', records.name, formats.CHATS)
    chats = formats.read(records, lambda place, record: formats.chat('', place, record), records.name)
    return tuple(turn for _, chat in chats for turn in chat.turns if turn['role'] != 'system')


def prepare(chat: Chat, system: str, shown: tuple[dict, ...]) -> Chat:
    """A conversation with a system prompt, where it has none, and demonstrations before it."""
    turns = chat.turns
    if system and turns[0]['role'] != 'system':
        turns = ({'role': 'system', 'content': system}, *turns)
    head = [turn for turn in turns[:1] if turn['role'] == 'system']
    return dataclasses.replace(chat, turns=(*head, *shown, *turns[len(head) :]))


def encode_all(
    chats: list[tuple[str, Chat]], encode: ChatEncoder, seq_len: int, title: str
) -> tuple[list[list[Encoded]], list[str]]:
    """Encodes conversations, cut to `seq_len` tokens.

    Returns:
      `(encoded, notes)`: the rows of each conversation, none where no trained token is left; and how many were divided,
      cut and left out.

    Raises:
      UserError: `file:line` and count of what the template refuses; or nothing is left.
    """
    encoded: list[list[Encoded]] = []
    problems: dict[str, list] = {}
    cut, empty, unmarked, divided = [], [], [], []
    with console.progress(len(chats), title, 'conversation') as bar:
        some = (chats[low : low + _AT_ONCE] for low in range(0, len(chats), _AT_ONCE))
        results = itertools.chain.from_iterable(encode.many([chat for _, chat in part]) for part in some)
        for (place, _), rows in zip(chats, results, strict=True):
            bar.advance(1)
            if isinstance(rows, FormatError):
                problems.setdefault(rows.kind, [f'{place}: {rows}', 0])[1] += 1
                continue
            if isinstance(rows, UserError):
                raise UserError(f'{place}: {rows}')
            kept = [Encoded(row.ids[:seq_len], row.assistant_mask[:seq_len]) for row in rows]
            kept = [row for row in kept if row.assistant_mask[1:].any()]
            if not kept:
                (empty if rows else unmarked).append(place)
            elif len(kept) < len(rows) or any(len(row.ids) > seq_len for row in rows):
                cut.append(place)
            if len(kept) > 1:
                divided.append(len(kept))
            encoded.append(kept)
    for text, count in problems.values():
        raise UserError(f'{text} ({count:,} of {len(chats):,} records are like this)')
    if len(empty) + len(unmarked) == len(chats):
        raise _nothing_left(empty, unmarked, seq_len)
    notes = []
    of = f'of {len(chats):,}'
    if divided:
        notes.append(
            f'{len(divided):,} {of} are {sum(divided):,} rows: when asked for a later answer, '
            f'{encode.template.name} template shows what came before otherwise'
        )
    if cut:
        notes.append(f'{len(cut):,} {of} are longer than data.seq_len={seq_len} and cut, first {cut[0]}')
    if empty:
        notes.append(
            f'{len(empty):,} {of} are left out: their prompt alone fills data.seq_len={seq_len}, first {empty[0]}'
        )
    if unmarked:
        notes.append(f'{len(unmarked):,} {of} are left out: no turn of theirs is trained, first {unmarked[0]}')
    return encoded, notes


def _nothing_left(empty: list[str], unmarked: list[str], seq_len: int) -> UserError:
    if empty:
        return UserError(
            f'{empty[0]}: data.seq_len={seq_len}: the prompt alone fills the row, here and in all {len(empty):,} '
            'records; expected a larger data.seq_len'
        )
    return UserError(
        f'{unmarked[0]}: no turn of the assistant is trained, here and in all {len(unmarked):,} records; expected '
        "sft.train_on='all', or turns with train: true and a weight above 0"
    )


class ExampleRows:
    """Examples by number as rows of `causal_lm`, only trained tokens being scored, for `grain.MapDataset.source`.

    Args:
      examples: none longer than a row.
      seq_len: length of a row.
      packing: several examples share a row, each a segment of its own; else each has its own row.
    """

    def __init__(self, examples: Examples, seq_len: int, packing: bool) -> None:
        self.examples, self.seq_len = examples, seq_len
        sizes = np.diff(examples.offsets)
        rows = pack(sizes, seq_len) if packing else np.arange(len(sizes))
        self.order = np.argsort(rows, kind='stable')
        self.edges = np.concatenate([[0], np.cumsum(np.bincount(rows))]) if len(sizes) else np.zeros(1, np.int64)
        self.facts = {
            'examples': len(examples),
            'tokens': len(examples.ids),
            'trained_tokens': int(np.count_nonzero(examples.assistant_mask)),
        }

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __getitem__(self, index: int) -> Row:
        index = int(index)
        row: Row = {
            name: np.zeros(self.seq_len, np.int32) for name in ('tokens', 'targets', 'positions', 'segment_ids')
        }
        row['loss_mask'] = np.zeros(self.seq_len, np.float32)
        at = 0
        for segment, number in enumerate(self.order[self.edges[index] : self.edges[index + 1]], 1):
            example = self.examples[number]
            size = len(example.ids)
            row['tokens'][at : at + size] = example.ids
            row['targets'][at : at + size - 1] = example.ids[1:]
            row['loss_mask'][at : at + size - 1] = example.assistant_mask[1:]
            row['positions'][at : at + size] = np.arange(size)
            row['segment_ids'][at : at + size] = segment
            at += size
        return row


def pieces(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, assistant_mask: np.ndarray) -> list[tuple[str, bool]]:
    """An example as text in runs of trained and other tokens."""
    trained = assistant_mask > 0
    edges = [0, *(np.flatnonzero(np.diff(trained.astype(np.int8))) + 1).tolist(), len(ids)]
    decode = cast(Callable[..., str], tokenizer.decode)  # of one list of ids it makes one text
    texts, before = [], ''
    for low, high in itertools.pairwise(edges):
        whole = decode(ids[:high].tolist(), skip_special_tokens=False)
        # Decoded by itself a run could lose a leading space.
        text = whole[len(before) :] if whole.startswith(before) else decode(ids[low:high].tolist())
        texts.append((text, bool(trained[low])))
        before = whole
    return texts
