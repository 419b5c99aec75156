"""`task=generate`: completions of the prompts in `data.eval`, in their order, to `samples.jsonl`."""

import itertools
import json
import os
import pathlib
import time
from collections.abc import Iterable

import jax
from jax.sharding import Mesh

from jaxtune import report
from jaxtune.common import console
from jaxtune.common.settings import Settings
from jaxtune.errors import UserError
from jaxtune.generation.generator import Generator, sample_record
from jaxtune.generation.prompts import Prompt, read_prompts
from jaxtune.generation.text_metrics import scores
from jaxtune.metrics.writer import peak_memory_bytes
from jaxtune.parallel import make_mesh
from jaxtune.parallel.batches import check_rows
from jaxtune.pretrained.load import ModelBundle, load_model
from jaxtune.recipe.flags import Command
from jaxtune.tasks import present, setup, specs
from jaxtune.training.run_info import RunInfo

SHOWN = 2  # completions printed at the end
BATCHES = 16  # that are written in one go, and saved; slots stand empty at the end of each


def check(config: Settings, mesh: Mesh) -> None:
    """Refuses what the recipe alone shows to be wrong.

    Raises:
      UserError: the mesh does not divide the batch, or keys that exclude each other.
    """
    check_rows(mesh, 'generate.batch_size', config.generate.batch_size)
    if config.generate.beams > 1 and config.generate.samples > 1:
        raise UserError(
            f'generate.samples={config.generate.samples}: expected 1 with generate.beams > 1, which keep one'
        )
    present.check(config)


def check_writes(config: Settings, bundle: ModelBundle) -> None:
    """Refuses a model that writes no text."""
    if bundle.model.kind == 'decoder' and 'score' in bundle.params:
        raise UserError(f'model.path={config.model.path}: a reward model writes no text; expected a language model')


def run(config: Settings, workdir: pathlib.Path, command: Command) -> dict:
    """Completes every prompt; returns `result.json`'s content. A stopped run goes on after what it saved last.

    Raises:
      UserError: the recipe, the prompts or the model is wrong.
    """
    mesh = make_mesh(config.mesh)
    info = setup.run_info(config, command, mesh)
    check(config, mesh)
    with jax.set_mesh(mesh):
        with info.timed('load'):
            bundle = load_model(specs.model_spec(config), mesh)
        check_writes(config, bundle)
        info.flops_per_token = setup.training_flops(config, bundle.model, specs.objective(config))
        info.describe_model(bundle.model, bundle.params, None, None)
        prompts = read_prompts(specs.prompt_spec(config), bundle)
        complete = Generator(config.generate, mesh, bundle, config.generate.batch_size, config.seed)
        started = time.perf_counter()
        tokens, before = _complete(config, workdir, complete, bundle, prompts, info)
        seconds = time.perf_counter() - started
    metrics = {
        'generate/prompts': len(prompts),
        'generate/completions': len(prompts) * config.generate.samples * max(1, len(bundle.adapters)),
        'generate/tokens': tokens,
        'generate/tokens_per_second': (tokens - before) / seconds,
        'generate/occupancy': complete.usage.occupancy,
        'memory/peak_bytes': peak_memory_bytes(),
    }
    if not console.is_primary():
        return {'task': 'generate', 'status': 'done', 'step': 0, 'metrics': metrics}
    os.replace(_partial(workdir), workdir / 'samples.jsonl')
    metrics |= _scores(workdir / 'samples.jsonl', config.generate.bleu_tokenize, tuple(bundle.adapters))
    info.facts['products'] = bundle.model.kernels.products
    info.write(workdir)
    result = report.finish(workdir, 'generate', 0, metrics)
    _show(workdir / 'samples.jsonl')
    if line := bundle.model.kernels.products_line:
        console.note(f'products: {line}')
    console.note(
        f'made {workdir}/samples.jsonl: {metrics["generate/completions"]} completions, {tokens:,} tokens, '
        f'{metrics["generate/tokens_per_second"]:,.0f} a second; '
        f'{metrics["generate/occupancy"]:.0%} of the steps of {complete.batch_size} slots wrote one'
    )
    return result


def _partial(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / '.samples.partial.jsonl'


def _finished_lines(path: pathlib.Path, ends: Iterable[int]) -> list[dict]:
    """Samples that an earlier run saved, as far as they are whole parts; a torn or surplus end is cut off the file."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b'\n')[:-1]
    lines = lines[: max((end for end in ends if end <= len(lines)), default=0)]
    with open(path, 'r+b') as file:
        file.truncate(sum(len(line) + 1 for line in lines))
    samples = [json.loads(line) for line in lines]
    if all('tokens' in sample for sample in samples):
        return samples
    path.unlink()  # of a version that did not count them
    return []


def _complete(
    config: Settings,
    workdir: pathlib.Path,
    complete: Generator,
    bundle: ModelBundle,
    prompts: list[Prompt],
    info: RunInfo,
) -> tuple[int, int]:
    """Samples part by part, appending to the partial file; returns all sampled tokens, and those of earlier runs."""
    samples = config.generate.samples
    size = max(1, BATCHES * complete.batch_size // samples)
    # What is saved together as (adapter, first prompt, one after the last): adapters follow each other.
    bounds = [(first, min(first + size, len(prompts))) for first in range(0, len(prompts), size)]
    batches = [(name, *bound) for name in bundle.adapters or ('',) for bound in bounds]
    ends = list(itertools.accumulate((last - first) * samples for _, first, last in batches))
    done = _finished_lines(_partial(workdir), ends)
    before = tokens = sum(line['tokens'] for line in done)
    with (
        open(_partial(workdir) if console.is_primary() else os.devnull, 'a', encoding='utf-8') as file,
        console.progress(ends[-1], 'generate', 'completion', initial=len(done)) as bar,
    ):
        for (name, first, last), end in zip(batches, ends, strict=True):
            if end <= len(done):
                continue
            with info.timed('generate'):
                completions = complete(bundle.adapters.get(name, bundle.params), prompts[first:last], first, samples)
            chosen = [prompt for prompt in prompts[first:last] for _ in range(samples)]
            for prompt, (completion, count) in zip(chosen, completions, strict=True):
                tokens += count
                line = sample_record(prompt, completion, 0) | {'tokens': count} | ({'adapter': name} if name else {})
                file.write(json.dumps(line, ensure_ascii=False) + '\n')
            file.flush()
            bar.advance(len(chosen))
    return tokens, before


def _scores(path: pathlib.Path, tokenize: str, adapters: tuple[str, ...]) -> dict[str, float]:
    """Scores of the completions whose references are known, as metrics, for each adapter of several; said, too."""
    with open(path, encoding='utf-8') as file:
        lines = [line for line in map(json.loads, file) if 'reference' in line]
    metrics = {}
    for adapter in adapters or (None,):
        pairs = [(line['completion'], line['reference']) for line in lines if line.get('adapter') == adapter]
        if not pairs:
            continue
        completions, references = zip(*pairs, strict=True)
        values = scores(completions, references, tokenize)
        words = ', '.join(f'{name.replace("_", " ")} {value:.3f}' for name, value in values.items())
        console.note(f'{f"{adapter} " if adapter else ""}against {len(pairs):,} references: {words}')
        end = f'/{adapter}' if adapter else ''
        metrics |= {f'generate/{name}{end}': value for name, value in values.items()}
    return metrics


def _show(path: pathlib.Path) -> None:
    with open(path, encoding='utf-8') as file:
        for line in itertools.islice(file, SHOWN):
            pair = json.loads(line)
            prompt = pair['prompt'] if isinstance(pair['prompt'], str) else pair['prompt'][-1]['content'] + '\n'
            prompt, completion = prompt[-200:], pair['completion'][:400]
            console.note(f'\n{prompt} ▸{completion}')
    console.note('')
