"""The prompts of a recipe's data: texts to go on from, sources to answer, or conversations; with what was expected."""

import itertools
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxtune.common import console
from jaxtune.data import formats
from jaxtune.data.examples import demonstrations, open_data, open_template, prepare
from jaxtune.data.prepare import HELD_OUT
from jaxtune.data.records import Records, field, open_records
from jaxtune.data.spans import Encoder
from jaxtune.errors import UserError
from jaxtune.pretrained.load import Assembly


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


def read_prompts(
    config: ConfigDict,
    parts: Assembly,
    chats: bool = False,
    fitting: bool = False,
    split: str = 'eval',
    limit: int | None = None,
    needed: bool = True,
) -> list[Prompt]:
    """The prompts of `data.eval`, cut to `generate.prompt_tokens`; or the questions of conversations.

    Args:
      config: the recipe.
      parts: model and tokenizer.
      chats: the data holds conversations, whatever it looks like.
      fitting: leave out those that are empty or too long instead of refusing them, and say how many.
      split: `eval`, or `train` for those of `data.train`.
      limit: tokens of prompt and completion at most, where that is less than the model's positions.
      needed: there must be one that fits.

    Raises:
      UserError: none, where one is needed; an empty one, or one that leaves no room for the completion in the model's
        positions.
    """
    source, key = None, f'data.{split}'
    if chats:
        source = open_data(config.data[split], key, formats.CHATS)
    elif parts.model.kind == 'decoder':
        source = _conversations(config, split)
    prompts = _texts(config, parts, split) if source is None else _questions(config, parts, source)
    limits = [size for size in (parts.model.config.max_positions, limit) if size]
    room, limit = config.generate.max_new_tokens, min(limits, default=None)
    if fitting:
        found = len(prompts)
        prompts = [prompt for prompt in prompts if prompt.ids and not (limit and len(prompt.ids) + room > limit)]
        if needed and len(prompts) < found:
            console.note(
                f'{key}={config.data[split]}: {found - len(prompts):,} of {found:,} prompts are left out: empty, or '
                f'too long to have generate.max_new_tokens={room} after them in {limit} tokens'
            )
    for number, prompt in enumerate(prompts, 1):
        if not prompt.ids:
            raise UserError(f'{key}={config.data[split]}: prompt {number} is empty; expected at least one token')
        if limit and len(prompt.ids) + room > limit:
            raise UserError(
                f'{key}={config.data[split]}: prompt {number} has {len(prompt.ids)} tokens; expected at most the '
                f"model's {limit} positions less generate.max_new_tokens={room} (generate.prompt_tokens cuts prompts)"
            )
    if not prompts and needed:
        fits = f' of at most {limit} tokens with generate.max_new_tokens={room}' if fitting and limit else ''
        raise UserError(f'{key}={config.data[split]}: holds no prompt{fits}; expected at least one')
    return prompts


def _texts(config: ConfigDict, parts: Assembly, split: str) -> list[Prompt]:
    data, limit = config.data, config.generate.prompt_tokens
    # What an encoder reads ends, and was introduced in training.
    answers = parts.model.kind == 'encdec'
    prefix, eos = (config.seq2seq.prefix, parts.tokenizer.eos_token_id) if answers else ('', None)
    held_out = pathlib.Path(data[split]).expanduser() / HELD_OUT
    path = str(held_out) if held_out.is_file() else data[split]
    prompts = []
    records = open_records(path, f'data.{split}', None, data.text_key)
    for place, record in itertools.islice(records, config.generate.prompts or None):
        text_key, named, reference_key = _text_keys(data, record)
        text = field(record, place, text_key, named)
        reference = record.get(reference_key) if reference_key else None
        if limit:
            # A token is rarely longer than this; tokenising whole books for their first words takes long.
            text = text[: 64 * limit]
        text = prefix + text
        ids = parts.tokenizer(text).input_ids
        if limit and len(ids) > limit:
            ids = ids[:limit]
            text = parts.tokenizer.decode(ids, skip_special_tokens=True)
        if answers and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        prompts.append(Prompt(text, ids, reference if isinstance(reference, str) else None))
    return prompts


def _text_keys(data: ConfigDict, record: Any) -> tuple[str, str, str]:
    """Where a record's prompt stands, the recipe's key that says so, and where its reference does; '' = nowhere."""
    held = record if isinstance(record, dict) else {}
    guessed = data.format == 'auto' and data.text_key not in held
    if data.format == 'prompt' or (guessed and formats.detect(held) == 'prompt'):
        prompt, completion = formats.prompt_fields(held)
        return prompt, '', completion
    if data.format == 'pair' or (guessed and data.source_key in held):
        return data.source_key, 'data.source_key', data.target_key
    return data.text_key, 'data.text_key', ''


def _conversations(config: ConfigDict, split: str) -> Records | None:
    """The records of a split where they are conversations; None where they are texts to go on from."""
    name, path = config.data.format, config.data[split]
    if name not in ('auto', *formats.CHATS):
        return None
    if path == 'python-stdlib' and (name == 'auto' or config.generate.prompt_tokens):
        return None
    if (pathlib.Path(path).expanduser() / HELD_OUT).is_file():
        return None
    records = open_data(path, f'data.{split}', formats.CHATS)
    for _, record in records:
        kind = formats.detect(record)
        if kind not in formats.CHATS:
            return None
        asked = kind == 'prompt' and isinstance(record.get(formats.prompt_fields(record)[0]), str)
        return None if asked and config.data.template == 'auto' else records
    return None


def _questions(config: ConfigDict, parts: Assembly, records: Records) -> list[Prompt]:
    """Each conversation without the answer that ends it, as turns and as ids up to where the assistant writes."""
    chosen = list(itertools.islice(records, config.generate.prompts or None))
    found = formats.find(chosen, config.data.format, records.name, formats.CHATS)
    kind = next(iter(found)) if len(found) == 1 else ''
    encode = Encoder(open_template(config, parts.tokenizer, kind, chosen), parts.tokenizer)
    shown = demonstrations(config)
    chats = formats.read(chosen, lambda place, record: formats.chat(kind, place, record, False), records.name)
    prompts = []
    for where, chat in chats:
        last = max(i for i, turn in enumerate(chat.turns) if turn['role'] != 'assistant')
        asked = prepare(chat.before(last + 1), config.sft.system, shown)
        try:
            _, ids = encode.prompt(asked)
        except formats.FormatError as error:
            raise UserError(f'{where}: {error}') from None
        answer = chat.turns[last + 1].get('content') if last + 1 < len(chat.turns) else None
        turns = [{'role': turn['role'], 'content': turn['content']} for turn in asked.turns]
        prompts.append(Prompt(turns, ids, answer or None))
    return prompts
