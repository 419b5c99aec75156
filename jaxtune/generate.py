"""`task=generate`: completions of the prompts in `data.eval`, in their order, to `samples.jsonl`."""

import itertools
import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxtune import console, runinfo
from jaxtune.assemble import Assembly, assemble
from jaxtune.beam import beam_search
from jaxtune.data import formats, templates
from jaxtune.data.documents import open_documents
from jaxtune.data.examples import demonstrations, open_data, open_template, prepare
from jaxtune.data.prepare import HELD_OUT
from jaxtune.data.records import Records
from jaxtune.data.spans import Encoder, end_of_turn
from jaxtune.errors import UserError
from jaxtune.metrics import peak_memory_bytes
from jaxtune.parallel import make_mesh, place
from jaxtune.report import write_report
from jaxtune.sampling import Sampling, from_config, pad_prompts, sample
from jaxtune.workdir import write_result

SHOWN = 2  # completions printed at the end


def run(config: ConfigDict, workdir: pathlib.Path, command) -> dict:
    """Completes every prompt; returns `result.json`'s content. A stopped run goes on after its last whole batch.

    Raises:
      UserError: the recipe, the prompts or the model is wrong.
    """
    mesh = make_mesh(config.mesh)
    info = runinfo.RunInfo(command, config, mesh)
    rows = mesh.shape['data'] * mesh.shape['fsdp']
    if config.generate.batch_size % rows:
        raise UserError(
            f'generate.batch_size={config.generate.batch_size}: expected a multiple of mesh.data x mesh.fsdp = {rows}'
        )
    if config.generate.beams > 1 and config.generate.samples > 1:
        raise UserError(
            f'generate.samples={config.generate.samples}: expected 1 with generate.beams > 1, which keep one'
        )
    with jax.set_mesh(mesh):
        with info.timed('load'):
            parts = assemble(config, mesh)
        if parts.model.kind == 'decoder' and 'score' in parts.params:
            raise UserError(f'model.path={config.model.path}: a reward model writes no text; expected a language model')
        info.describe_model(parts.model, parts.params, None, None)
        prompts = read_prompts(config, parts)
        sampling = from_config(config.generate, parts.tokenizer, parts.model, _ends(config, parts))
        started = time.perf_counter()
        tokens = _complete(config, workdir, mesh, parts, sampling, prompts, info)
        seconds = time.perf_counter() - started
    metrics = {
        'generate/prompts': len(prompts),
        'generate/completions': len(prompts) * config.generate.samples,
        'generate/tokens': tokens,
        'generate/tokens_per_second': tokens / seconds,
        'memory/peak_bytes': peak_memory_bytes(),
    }
    if not console.is_primary():
        return {'task': 'generate', 'status': 'done', 'step': 0, 'metrics': metrics}
    os.replace(_partial(workdir), workdir / 'samples.jsonl')
    info.write(workdir)
    result = write_result(workdir, 'generate', 0, metrics)
    write_report(workdir)
    _show(workdir / 'samples.jsonl')
    console.note(f'made {workdir}/samples.jsonl: {metrics["generate/completions"]} completions, {tokens:,} tokens')
    return result


def read_prompts(config: ConfigDict, parts: Assembly) -> list[tuple[Any, list[int]]]:
    """The prompts of `data.eval` as text and token ids, cut to `generate.prompt_tokens`; or conversations' questions.

    Raises:
      UserError: none, an empty one, or one that leaves no room for the completion in the model's positions.
    """
    settings = config.generate
    if parts.model.kind == 'decoder' and (source := _conversations(config)) is not None:
        return _fitting(config, parts, _questions(config, parts, source))
    text_key = {'prompt': 'prompt', 'pair': config.data.source_key}.get(config.data.format, config.data.text_key)
    # What an encoder reads ends, and was introduced in training.
    answers = parts.model.kind == 'encdec'
    prefix, eos = (config.seq2seq.prefix, parts.tokenizer.eos_token_id) if answers else ('', None)
    prepared = pathlib.Path(config.data.eval) / HELD_OUT
    texts = open_documents(str(prepared) if prepared.is_file() else config.data.eval, 'data.eval', text_key)
    prompts = []
    for text in itertools.islice(texts, settings.prompts or None):
        if settings.prompt_tokens:
            # A token is rarely longer than this; tokenising whole books for their first words takes long.
            text = text[: 64 * settings.prompt_tokens]
        text = prefix + text
        ids = parts.tokenizer(text).input_ids
        if settings.prompt_tokens:
            ids = ids[: settings.prompt_tokens]
            text = parts.tokenizer.decode(ids, skip_special_tokens=True)
        if answers and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        prompts.append((text, ids))
    return _fitting(config, parts, prompts)


def _fitting(config: ConfigDict, parts: Assembly, prompts: list[tuple[Any, list[int]]]) -> list[tuple[Any, list[int]]]:
    settings, limit = config.generate, parts.model.config.max_positions
    for number, (_, ids) in enumerate(prompts, 1):
        if not ids:
            raise UserError(f'data.eval={config.data.eval}: prompt {number} is empty; expected at least one token')
        if limit and len(ids) + settings.max_new_tokens > limit:
            raise UserError(
                f'data.eval={config.data.eval}: prompt {number} has {len(ids)} tokens; expected at most the '
                f"model's {limit} positions less generate.max_new_tokens={settings.max_new_tokens} "
                '(generate.prompt_tokens cuts prompts)'
            )
    if not prompts:
        raise UserError(f'data.eval={config.data.eval}: holds no prompt; expected at least one')
    return prompts


def _conversations(config: ConfigDict) -> Records | None:
    """The records of `data.eval` where they are conversations; None where they are texts to go on from."""
    name, path = config.data.format, config.data.eval
    if name not in ('auto', *formats.CHATS) or (path != 'python-stdlib' and not pathlib.Path(path).exists()):
        return None
    if path == 'python-stdlib' and (name == 'auto' or config.generate.prompt_tokens):
        return None
    if (pathlib.Path(path) / HELD_OUT).is_file():
        return None
    records = open_data(path, 'data.eval', formats.CHATS)
    for _, record in records:
        kind = formats.detect(record)
        asked = kind == 'prompt' and config.data.template == 'auto' and isinstance(record.get('prompt'), str)
        return None if kind not in formats.CHATS or asked else records
    return None


def _questions(config: ConfigDict, parts: Assembly, records: Records) -> list[tuple[Any, list[int]]]:
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
        prompts.append(([{'role': turn['role'], 'content': turn['content']} for turn in asked.turns], ids))
    return prompts


def _ends(config: ConfigDict, parts: Assembly) -> list[int]:
    """What ends an answer by the chat template, where the tokenizer has one."""
    if not parts.tokenizer.chat_template:
        return []
    end = end_of_turn(templates.open_template('auto', parts.tokenizer), parts.tokenizer)
    return [] if end is None else [end]


def _partial(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / '.samples.partial.jsonl'


def _finished_lines(path: pathlib.Path, batch_size: int) -> list[dict]:
    """Samples of whole batches that an earlier run left; a torn or surplus end is cut off the file."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b'\n')[:-1]
    lines = lines[: len(lines) // batch_size * batch_size]
    with open(path, 'r+b') as file:
        file.truncate(sum(len(line) + 1 for line in lines))
    return [json.loads(line) for line in lines]


def _complete(
    config: ConfigDict,
    workdir: pathlib.Path,
    mesh: Mesh,
    parts: Assembly,
    sampling: Sampling,
    prompts: list[tuple[str, list[int]]],
    info: runinfo.RunInfo,
) -> int:
    """Samples batch by batch, appending to the partial file; returns the number of tokens sampled."""
    tokenizer, batch_size = parts.tokenizer, config.generate.batch_size
    root = jax.random.key(config.seed)

    def run_batch(params, batch):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, batch['number'])
        prompts = (batch['prompts'], batch['lengths'])
        if config.generate.beams > 1:
            return beam_search(
                parts.model, sampling, params, *prompts, config.generate.beams, config.generate.length_penalty
            )
        return sample(parts.model, sampling, params, *prompts, keys)

    sampler = jax.jit(run_batch, out_shardings=NamedSharding(mesh, P()))
    work = [prompt for prompt in prompts for _ in range(config.generate.samples)]
    done = _finished_lines(_partial(workdir), batch_size)
    tokens = sum(len(tokenizer(line['completion']).input_ids) for line in done)
    with (
        open(_partial(workdir) if console.is_primary() else os.devnull, 'a', encoding='utf-8') as file,
        console.progress(len(work), 'generate', 'completion', initial=len(done)) as bar,
    ):
        for first in range(len(done), len(work), batch_size):
            chosen = work[first : first + batch_size]
            filled = chosen + [chosen[-1]] * (batch_size - len(chosen))
            ids, lengths = pad_prompts([prompt for _, prompt in filled], sampling.pad_id)
            arrays = {
                'prompts': ids,
                'lengths': lengths,
                'number': np.arange(first, first + batch_size, dtype=np.int32),
            }
            rows = place(lambda low, high, a=arrays: {k: v[low:high] for k, v in a.items()}, batch_size, mesh)
            with info.timed('generate'):
                completions = jax.tree.map(np.asarray, sampler(parts.params, rows))
            for row, (text, prompt) in enumerate(chosen):
                new = completions.tokens[row, : completions.lengths[row]].tolist()
                tokens += len(new)
                completion = decode_continuation(tokenizer, [] if parts.model.kind == 'encdec' else prompt, new)
                line = {'prompt': text, 'completion': completion, 'score': None, 'step': 0}
                file.write(json.dumps(line, ensure_ascii=False) + '\n')
            file.flush()
            bar.advance(len(chosen))
    return tokens


def decode_continuation(tokenizer, prompt: list[int], new: list[int]) -> str:
    """The text that new tokens add to a prompt's.

    Decoded by themselves they could lose what depends on the text before: a leading space, half a character.
    """
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)


def _show(path: pathlib.Path) -> None:
    with open(path, encoding='utf-8') as file:
        for line in itertools.islice(file, SHOWN):
            pair = json.loads(line)
            prompt = pair['prompt'] if isinstance(pair['prompt'], str) else pair['prompt'][-1]['content'] + '\n'
            prompt, completion = prompt[-200:], pair['completion'][:400]
            console.note(f'\n{prompt} ▸{completion}')
    console.note('')
