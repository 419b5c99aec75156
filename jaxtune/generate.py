"""`task=generate`: completions of the prompts in `data.eval`, in their order, to `samples.jsonl`."""

import itertools
import json
import os
import pathlib
import time
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxtune import console, runinfo
from jaxtune.assemble import Assembly, assemble
from jaxtune.beam import beam_search
from jaxtune.data import templates
from jaxtune.data.spans import end_of_turn
from jaxtune.errors import UserError
from jaxtune.metrics import peak_memory_bytes
from jaxtune.parallel import make_mesh, place
from jaxtune.prompt_data import Prompt, read_prompts
from jaxtune.report import write_report
from jaxtune.sampling import Sampling, from_config, pad_prompts, sample
from jaxtune.scoring import exact, scores
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
        'generate/completions': len(prompts) * config.generate.samples * max(1, len(parts.adapters)),
        'generate/tokens': tokens,
        'generate/tokens_per_second': tokens / seconds,
        'memory/peak_bytes': peak_memory_bytes(),
    }
    if not console.is_primary():
        return {'task': 'generate', 'status': 'done', 'step': 0, 'metrics': metrics}
    os.replace(_partial(workdir), workdir / 'samples.jsonl')
    metrics |= _scores(workdir / 'samples.jsonl', config.generate.bleu_tokenize, tuple(parts.adapters))
    info.write(workdir)
    result = write_result(workdir, 'generate', 0, metrics)
    write_report(workdir)
    _show(workdir / 'samples.jsonl')
    console.note(f'made {workdir}/samples.jsonl: {metrics["generate/completions"]} completions, {tokens:,} tokens')
    return result


def _ends(config: ConfigDict, parts: Assembly) -> list[int]:
    """What ends an answer by the chat template, where the tokenizer has one."""
    if not parts.tokenizer.chat_template:
        return []
    end = end_of_turn(templates.open_template('auto', parts.tokenizer), parts.tokenizer)
    return [] if end is None else [end]


def _partial(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / '.samples.partial.jsonl'


def _finished_lines(path: pathlib.Path, ends: Iterable[int]) -> list[dict]:
    """Samples of whole batches that an earlier run left; a torn or surplus end is cut off the file."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b'\n')[:-1]
    lines = lines[: max((end for end in ends if end <= len(lines)), default=0)]
    with open(path, 'r+b') as file:
        file.truncate(sum(len(line) + 1 for line in lines))
    return [json.loads(line) for line in lines]


def _complete(
    config: ConfigDict,
    workdir: pathlib.Path,
    mesh: Mesh,
    parts: Assembly,
    sampling: Sampling,
    prompts: list[Prompt],
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
    # Batches as (adapter, first prompt, one after the last): adapters follow each other.
    bounds = [(first, min(first + batch_size, len(work))) for first in range(0, len(work), batch_size)]
    batches = [(name, *bound) for name in parts.adapters or ('',) for bound in bounds]
    ends = list(itertools.accumulate(last - first for _, first, last in batches))
    done = _finished_lines(_partial(workdir), ends)
    tokens = sum(len(tokenizer(line['completion']).input_ids) for line in done)
    with (
        open(_partial(workdir) if console.is_primary() else os.devnull, 'a', encoding='utf-8') as file,
        console.progress(ends[-1], 'generate', 'completion', initial=len(done)) as bar,
    ):
        for (name, first, last), end in zip(batches, ends, strict=True):
            if end <= len(done):
                continue
            chosen = work[first:last]
            filled = chosen + [chosen[-1]] * (batch_size - len(chosen))
            ids, lengths = pad_prompts([prompt.ids for prompt in filled], sampling.pad_id)
            arrays = {
                'prompts': ids,
                'lengths': lengths,
                'number': np.arange(first, first + batch_size, dtype=np.int32),
            }
            rows = place(lambda low, high, a=arrays: {k: v[low:high] for k, v in a.items()}, batch_size, mesh)
            with info.timed('generate'):
                completions = jax.tree.map(np.asarray, sampler(parts.adapters.get(name, parts.params), rows))
            for row, prompt in enumerate(chosen):
                new = completions.tokens[row, : completions.lengths[row]].tolist()
                tokens += len(new)
                completion = decode_continuation(tokenizer, [] if parts.model.kind == 'encdec' else prompt.ids, new)
                line = {'prompt': prompt.text, 'completion': completion, 'score': None, 'step': 0}
                if name:
                    line['adapter'] = name
                if prompt.reference is not None:
                    line |= {'reference': prompt.reference, 'score': exact(completion, prompt.reference)}
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


def _scores(path: pathlib.Path, tokenize: str, adapters: tuple[str, ...]) -> dict[str, float]:
    """Scores of the completions whose references are known, as metrics, for each adapter of several; said, too."""
    with open(path, encoding='utf-8') as file:
        lines = [line for line in map(json.loads, file) if 'reference' in line]
    metrics = {}
    for adapter in adapters or (None,):
        pairs = [(line['completion'], line['reference']) for line in lines if line.get('adapter') == adapter]
        if not pairs:
            continue
        found = scores(*zip(*pairs, strict=True), tokenize)
        words = ', '.join(f'{name.replace("_", " ")} {value:.3f}' for name, value in found.items())
        console.note(f'{f"{adapter} " if adapter else ""}against {len(pairs):,} references: {words}')
        end = f'/{adapter}' if adapter else ''
        metrics |= {f'generate/{name}{end}': value for name, value in found.items()}
    return metrics


def _show(path: pathlib.Path) -> None:
    with open(path, encoding='utf-8') as file:
        for line in itertools.islice(file, SHOWN):
            pair = json.loads(line)
            prompt = pair['prompt'] if isinstance(pair['prompt'], str) else pair['prompt'][-1]['content'] + '\n'
            prompt, completion = prompt[-200:], pair['completion'][:400]
            console.note(f'\n{prompt} ▸{completion}')
    console.note('')
