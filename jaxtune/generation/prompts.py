"""The prompts of a recipe's data: texts to go on from, sources to answer, or conversations; with what was expected."""

import dataclasses
import itertools
import pathlib
from typing import Any, NamedTuple

from jaxtune.common import console
from jaxtune.common.sources import DataSource
from jaxtune.data import formats, holdout
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.chat_encoder import ChatEncoder
from jaxtune.data.examples import demonstrations, is_text, open_data, open_template, prepare
from jaxtune.data.prepare import HELD_OUT
from jaxtune.data.records import Records, field, open_records
from jaxtune.data.spec import DataSpec
from jaxtune.errors import UserError
from jaxtune.pretrained.load import ModelBundle


class Prompt(NamedTuple):
    """What a model is given.

    Attributes:
      text: the prompt, or a conversation's turns.
      ids: its tokens.
      reference: the text that the record holds as its continuation, or None.
    """

    text: Any
    ids: list[int]
    reference: str | None = None


@dataclasses.dataclass(frozen=True)
class PromptSpec:
    """Which prompts are read.

    Attributes:
      data: where they are.
      max_new_tokens: room that each needs after it.
      count: at most so many; 0 = all.
      prompt_tokens: the first so many tokens of each text are the prompt; 0 = the whole text.
      prefix: before each source of an encoder-decoder.
      limit: tokens of prompt and completion at most, where that is less than the model's positions; None = no limit.
    """

    data: DataSpec
    max_new_tokens: int
    count: int = 0
    prompt_tokens: int = 0
    prefix: str = ''
    limit: int | None = None


def read_prompts(
    spec: PromptSpec,
    bundle: ModelBundle,
    chats: bool = False,
    fitting: bool = False,
    split: str = 'eval',
    needed: bool = True,
) -> list[Prompt]:
    """The prompts of `data.eval`, cut to `generate.prompt_tokens`; or the questions of conversations.

    Those of several sources follow each other; where at most some are wanted, they take turns.

    Args:
      spec: which.
      bundle: model and tokenizer.
      chats: the data holds conversations, whatever it looks like.
      fitting: leave out those that are empty or too long instead of refusing them, and say how many.
      split: `eval`, or `train` for those of `data.train`.
      needed: there must be one that fits.

    Raises:
      UserError: none, where one is needed; an empty one, or one that leaves no room for the completion in the model's
        positions.
    """
    by_source = list(prompts_by_source(spec, bundle, chats, fitting, split, needed).values())
    if not spec.count:
        return [prompt for prompts in by_source for prompt in prompts]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_source))
    return [prompt for prompt in turns if prompt is not None][: spec.count]


def prompts_by_source(
    spec: PromptSpec,
    bundle: ModelBundle,
    chats: bool = False,
    fitting: bool = False,
    split: str = 'eval',
    needed: bool = True,
) -> dict[str, list[Prompt]]:
    """The prompts of each source by its label; those of a path by ''. Texts beside conversations have none.

    Args and errors: as `read_prompts`.
    """
    found = {}
    for source in spec.data.sources(split) or (DataSource('', ''),):
        data = spec.data.of(split, source)
        if not (chats and is_text(data, split)):
            one = dataclasses.replace(spec, data=data)
            found[source.label] = _read_source(one, bundle, chats, fitting, split, needed)
    return found


def _read_source(
    spec: PromptSpec, bundle: ModelBundle, chats: bool, fitting: bool, split: str, needed: bool
) -> list[Prompt]:
    source, key, path = None, f'data.{split}', spec.data.path(split)
    if chats:
        source = _selected(open_data(path, holdout.key_of(spec.data, split), formats.CHATS), spec, split)
    elif bundle.model.kind == 'decoder':
        source = _conversations(spec, split, templated=bool(bundle.tokenizer.chat_template))
    prompts = _texts(spec, bundle, split) if source is None else _questions(spec, bundle, source)
    limits = [size for size in (bundle.model.config.max_positions, spec.limit) if size]
    room, limit = spec.max_new_tokens, min(limits, default=None)
    if fitting:
        total = len(prompts)
        prompts = [prompt for prompt in prompts if prompt.ids and not (limit and len(prompt.ids) + room > limit)]
        if needed and len(prompts) < total:
            console.note(
                f'{key}={path}: {total - len(prompts):,} of {total:,} prompts are left out: empty, or '
                f'too long to have generate.max_new_tokens={room} after them in {limit} tokens'
            )
    for number, prompt in enumerate(prompts, 1):
        if not prompt.ids:
            raise UserError(f'{key}={path}: prompt {number} is empty; expected at least one token')
        if limit and len(prompt.ids) + room > limit:
            shown = '' if isinstance(prompt.text, str) else " as the tokenizer's template renders it"
            raise UserError(
                f'{key}={path}: prompt {number} has {len(prompt.ids)} tokens{shown}; expected at most the '
                f"model's {limit} positions less generate.max_new_tokens={room} (generate.prompt_tokens cuts prompts)"
            )
    if not prompts and needed:
        fits = f' of at most {limit} tokens with generate.max_new_tokens={room}' if fitting and limit else ''
        raise UserError(f'{key}={path}: holds no prompt{fits}; expected at least one')
    return prompts


def _selected(records: Records, spec: PromptSpec, split: str) -> Records:
    return holdout.part(records, spec.data, split)


def _texts(spec: PromptSpec, bundle: ModelBundle, split: str) -> list[Prompt]:
    data, limit = spec.data, spec.prompt_tokens
    # What an encoder reads ends, and was introduced in training.
    answers = bundle.model.kind == 'encdec'
    prefix, eos = (spec.prefix, bundle.tokenizer.eos_token_id) if answers else ('', None)
    held_out = pathlib.Path(data.path(split)).expanduser() / HELD_OUT
    path = str(held_out) if held_out.is_file() else data.path(split)
    prompts = []
    records = _selected(open_records(path, holdout.key_of(data, split), None, data.text_key), spec, split)
    for place, record in itertools.islice(records, spec.count or None):
        text_key, named, reference_key = _text_keys(data, record)
        text = field(record, place, text_key, named)
        reference = record.get(reference_key) if reference_key else None
        if limit:
            # A token is rarely longer than this; tokenising whole books for their first words takes long.
            text = text[: 64 * limit]
        text = prefix + text
        ids = bundle.tokenizer(text).input_ids
        if limit and len(ids) > limit:
            ids = ids[:limit]
            text = bundle.tokenizer.decode(ids, skip_special_tokens=True)
        if answers and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        if max(ids, default=0) >= (rows := bundle.model.config.vocab_size):
            raise UserError(f'{place}: {tokenizers.no_row(bundle.tokenizer, max(ids), rows)}')
        prompts.append(Prompt(text, ids, reference if isinstance(reference, str) else None))
    return prompts


def _text_keys(data: DataSpec, record: Any) -> tuple[str, str, str]:
    """Where a record's prompt stands, the recipe's key that says so, and where its reference does; '' = nowhere."""
    held = record if isinstance(record, dict) else {}
    guessed = data.format == 'auto' and data.text_key not in held
    if data.format == 'prompt' or (guessed and formats.detect(held) == 'prompt'):
        prompt, completion = formats.prompt_fields(held)
        return prompt, '', completion
    if data.format == 'pair' or (guessed and data.source_key in held):
        return data.source_key, 'data.source_key', data.target_key
    return data.text_key, 'data.text_key', ''


def _conversations(spec: PromptSpec, split: str, templated: bool) -> Records | None:
    """The records of a split where they are conversations; None where they are texts to go on from.

    A prompt that is a text is asked as a user's turn where there is a template (`templated`: the tokenizer has one).
    """
    name, path = spec.data.format, spec.data.path(split)
    if name not in ('auto', *formats.CHATS):
        return None
    if path == 'python-stdlib' and (name == 'auto' or spec.prompt_tokens):
        return None
    if (pathlib.Path(path).expanduser() / HELD_OUT).is_file():
        return None
    records = _selected(open_data(path, holdout.key_of(spec.data, split), formats.CHATS), spec, split)
    for _, record in records:
        kind = formats.detect(record)
        if kind not in formats.CHATS:
            return None
        asked = kind == 'prompt' and isinstance(record.get(formats.prompt_fields(record)[0]), str)
        return None if asked and spec.data.template == 'auto' and not templated else records
    return None


def _questions(spec: PromptSpec, bundle: ModelBundle, records: Records) -> list[Prompt]:
    """Each conversation without the answer that ends it, as turns and as ids up to where the assistant writes."""
    chosen = list(itertools.islice(records, spec.count or None))
    counts = formats.find(chosen, spec.data.format, records.name, formats.CHATS)
    kind = next(iter(counts)) if len(counts) == 1 else ''
    template = open_template(spec.data, bundle.tokenizer, kind, chosen)
    encode = ChatEncoder(template, bundle.tokenizer, vocab_size=bundle.model.config.vocab_size)
    shown = demonstrations(spec.data.demonstrations)
    chats = formats.read(chosen, lambda place, record: formats.chat(kind, place, record, False), records.name)
    prompts = []
    for where, chat in chats:
        last = max(i for i, turn in enumerate(chat.turns) if turn['role'] != 'assistant')
        asked = prepare(chat.before(last + 1), spec.data.system, shown)
        try:
            _, ids = encode.prompt(asked)
        except formats.FormatError as error:
            raise UserError(f'{where}: {error}') from None
        answer = chat.turns[last + 1].get('content') if last + 1 < len(chat.turns) else None
        turns = [{'role': turn['role'], 'content': turn['content']} for turn in asked.turns]
        prompts.append(Prompt(turns, ids, answer or None))
    return prompts
