"""`task=prepare`: documents become a tokenizer and two folders of tokens, one of them held out."""

import pathlib

from ml_collections import ConfigDict

from jaxtune import console
from jaxtune.data.cache import once
from jaxtune.data.prepare import plain
from jaxtune.data.tokens import Tokens
from jaxtune.report import write_report
from jaxtune.runinfo import RunInfo
from jaxtune.workdir import read_json, write_result


def run(config: ConfigDict, workdir: pathlib.Path, command) -> dict:
    """Prepares `data.train` (or `data.sources`) in the workdir; returns `result.json`'s content.

    Leaves `tokenizer/` (where one was trained, or a copy of the one named), `train/` and `eval/` (tokens), and
    `eval.jsonl` (the held-out documents, from which generation takes its prompts).

    Raises:
      UserError: the recipe or the data is wrong.
    """
    results = workdir / 'result.json'
    once(results.is_file, lambda: _prepare(config, workdir, command), 'task=prepare')
    return read_json(results)


def _prepare(config: ConfigDict, workdir: pathlib.Path, command) -> None:
    info = RunInfo(command, config)
    documents = plain.collect(config)
    console.note(f'reading {documents.name}; writing to {workdir}')
    with info.timed('collect'):
        plan = plain.Plan(documents, config.data.min_chars, config.data.eval_fraction)
    with info.timed('tokenizer'):
        tokenizer = plain.make_tokenizer(config, plan, workdir / 'tokenizer')
    with info.timed('tokenise'):
        plain.write(config, plan, tokenizer, workdir)

    train = Tokens.open(workdir / 'train')
    held_out = Tokens.open(workdir / 'eval') if plan.count(plain.EVAL) else None
    metrics = {
        'data/documents': plan.count(plain.TRAIN) + plan.count(plain.EVAL),
        'data/train_documents': plan.count(plain.TRAIN),
        'data/eval_documents': plan.count(plain.EVAL),
        'data/dropped_short': plan.short,
        'data/dropped_duplicates': plan.duplicates,
        'data/text_bytes': train.text_bytes + (held_out.text_bytes if held_out else 0),
        'data/train_tokens': len(train),
        'data/eval_tokens': len(held_out) if held_out else 0,
        'data/bytes_per_token': train.text_bytes / len(train),
        'data/vocab_size': train.vocab_size,
    }
    if held_out and held_out.gzip_bits_per_byte is not None:
        metrics['data/eval_gzip_bits_per_byte'] = held_out.gzip_bits_per_byte
    info.write(workdir)
    write_result(workdir, 'prepare', 0, metrics)
    write_report(workdir)
    _say(metrics, workdir, staged=getattr(command, 'workdir', workdir) != workdir)


def _say(metrics: dict, workdir: pathlib.Path, staged: bool) -> None:
    console.note(
        f'{metrics["data/documents"]:,} documents ({metrics["data/dropped_short"]:,} short and '
        f'{metrics["data/dropped_duplicates"]:,} duplicate ones left out): {metrics["data/train_tokens"]:,} tokens to '
        f'train on, {metrics["data/eval_tokens"]:,} held out, {metrics["data/bytes_per_token"]:.2f} bytes a token '
        f'({metrics["data/vocab_size"]:,} in the vocabulary)'
    )
    ratio = metrics.get('data/eval_gzip_bits_per_byte')
    if ratio is not None:
        console.note(f'gzip -9 needs {ratio:.3f} bits per byte of the held-out documents')
    if not staged:
        held_out = f' data.eval={workdir}' if metrics['data/eval_documents'] else ''
        console.note(f'next: train with data.train={workdir}{held_out} tokenizer.path={workdir} in a recipe')
