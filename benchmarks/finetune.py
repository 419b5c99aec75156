"""Fine-tunes a model here and in `transformers`' PyTorch: same start, same batches, same rates, losses side by side.

    python benchmarks/finetune.py OBJECTIVE MODEL TRAIN.jsonl TEST.jsonl WORKDIR [--steps 300] [--seeds 0 1 2]
        [--set KEY=VALUE] [--tokenize 13a]

OBJECTIVE is `seq2seq` (scored by sacrebleu on greedy completions of TEST) or `classification` (by accuracy). Prints for
each seed the largest relative difference of the first 50 losses and both scores.
"""

import argparse
import json
import pathlib

import jax
import numpy as np
from recipe_runs import run_recipe

from jaxtune.data.loader import Loader
from jaxtune.generation.text_metrics import scores
from jaxtune.models import hf
from jaxtune.parallel import make_mesh
from jaxtune.pretrained.load import load_model
from jaxtune.recipe import recipes
from jaxtune.tasks import specs

CURVE = 50
LR, WARMUP, DECAY, CLIP = 1e-3, 30, 0.01, 1.0


def start(config, folder: pathlib.Path) -> None:
    """Writes the model with its freshly made head, which both sides begin with."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        parts = load_model(specs.model_spec(config), mesh)
        hf.save(folder, parts.model, parts.params, add_files=parts.tokenizer.save_pretrained)


def rows_of(config, split: str, tokenizer, workdir: pathlib.Path):
    return specs.objective(config).dataset(split, tokenizer, workdir / 'cache')


def logits_and_labels(model, objective: str, batch: dict):
    """PyTorch's `[..., classes]` and what they should say, -100 where nothing is scored."""
    import torch

    batch = {name: torch.from_numpy(value).long() for name, value in batch.items()}
    if objective == 'classification':
        inputs = {'input_ids': batch['tokens'], 'attention_mask': batch['segment_ids']}
        return model(**inputs, token_type_ids=batch['token_types']).logits, batch['labels']
    labels = batch['targets'].masked_fill(batch['target_segment_ids'] == 0, -100)
    outputs = model(input_ids=batch['tokens'], attention_mask=batch['segment_ids'], labels=labels)
    return outputs.logits, labels


def torch_train(model, config, rows, steps: int) -> list[float]:
    """Trains `model` in place as `config` says; returns every loss."""
    import torch

    groups = [
        {'params': [w for w in model.parameters() if w.ndim > 1], 'weight_decay': DECAY},
        {'params': [w for w in model.parameters() if w.ndim == 1], 'weight_decay': 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    loader, losses = Loader(rows, config.train.batch_size, config.seed), []
    for t in range(steps):
        for group in optimizer.param_groups:
            group['lr'] = LR * min((t + 1) / WARMUP, 1 - (t - WARMUP) / (steps - WARMUP))
        logits, labels = logits_and_labels(model, config.objective, loader.rows(t, 0, config.train.batch_size))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def torch_accuracy(model, config, rows) -> float:
    import torch

    loader, right = Loader(rows, 64, shuffle=False), 0
    with torch.inference_mode():
        for t in range(len(loader)):
            logits, labels = logits_and_labels(model, config.objective, loader.rows(t, 0, 64))
            right += int(((logits.argmax(-1) == labels)[: len(rows) - 64 * t]).sum())
    return right / len(rows)


def torch_texts(model, tokenizer, sources: list[str], length: int, room: int) -> list[str]:
    import torch

    texts = []
    for at in range(0, len(sources), 64):
        ids = [[*tokenizer(text).input_ids[: length - 1], tokenizer.eos_token_id] for text in sources[at : at + 64]]
        width = max(map(len, ids))
        padded = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
        with torch.inference_mode():
            made = model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=room, do_sample=False)
        texts += tokenizer.batch_decode(made, skip_special_tokens=True)
    return texts


def compare(args, seed: int, workdir: pathlib.Path) -> dict:
    """Both trainings from one seed; their losses' largest relative difference and their scores."""
    import torch
    import transformers

    classes = args.objective == 'classification'
    keys = {'objective': args.objective, 'data.train': args.train, 'data.eval': args.test, 'data.packing': False}
    keys |= {'train.steps': args.steps, 'train.batch_size': 32, 'train.accumulate': 1}
    keys |= {'optimizer.lr': LR, 'optimizer.warmup_steps': WARMUP, 'optimizer.weight_decay': DECAY}
    keys |= {'optimizer.schedule': 'linear', 'optimizer.clip_norm': CLIP, 'optimizer.eps': 1e-8, 'seed': seed}
    keys |= {'eval.every': 0, 'eval.patience': 0, 'log.every': 1}
    keys |= {name: json.loads(value) if value[:1].isdigit() else value for name, value in args.set}
    config = recipes.defaults()
    recipes.apply_overrides(config, {'task': 'train', 'model.path': args.model} | keys)
    start(config, workdir / 'start')

    model_class = transformers.AutoModelForSequenceClassification if classes else transformers.AutoModelForSeq2SeqLM
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / 'start')
    torch.manual_seed(seed)
    model = model_class.from_pretrained(workdir / 'start').eval()  # no dropout, as here
    theirs = torch_train(model, config, rows_of(config, 'train', tokenizer, workdir), args.steps)

    metrics = run_recipe('finetune_full.py', workdir / 'ours', keys | {'model.path': workdir / 'start'})
    lines = [json.loads(line) for line in (workdir / 'ours' / 'metrics.jsonl').read_text().splitlines()]
    ours = [line['train/loss'] for line in lines if 'train/loss' in line]
    found = {'curve': float(np.max(np.abs(np.divide(ours[:CURVE], theirs[:CURVE]) - 1)))}
    found |= {'losses': (ours[-1], theirs[-1])}
    if classes:
        accuracy = torch_accuracy(model, config, rows_of(config, 'eval', tokenizer, workdir))
        return found | {'scores': (metrics['eval/accuracy'], accuracy)}

    room = config.data.target_len or config.data.seq_len
    written = {'model.path': workdir / 'ours', 'data.eval': args.test, 'data.format': 'pair'}
    written |= {name: keys[name] for name in ('data.source_key', 'data.target_key', 'seq2seq.prefix') if name in keys}
    written |= {'generate.temperature': 0, 'generate.max_new_tokens': room, 'generate.batch_size': 64}
    written |= {'generate.prompt_tokens': config.data.seq_len - 1, 'generate.bleu_tokenize': args.tokenize}
    bleu = run_recipe('generate.py', workdir / 'written', written)['generate/bleu']
    records = [json.loads(line) for line in pathlib.Path(args.test).read_text().splitlines()]
    sources = [config.seq2seq.prefix + record[config.data.source_key] for record in records]
    references = [record[config.data.target_key] for record in records]
    texts = torch_texts(model, tokenizer, sources, config.data.seq_len, room)
    return found | {'scores': (bleu, scores(texts, references, args.tokenize)['bleu'])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('objective', choices=('seq2seq', 'classification'))
    for name in ('model', 'train', 'test', 'workdir'):
        parser.add_argument(name)
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--seeds', type=int, nargs='+', default=(0, 1, 2))
    parser.add_argument('--tokenize', default='13a', help="sacrebleu's tokenisation: zh for Chinese")
    parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE', type=lambda pair: pair.split('=', 1))
    args = parser.parse_args()
    name = 'BLEU' if args.objective == 'seq2seq' else 'accuracy'
    print(f'seed  first {CURVE} losses  last loss (here, PyTorch)  {name} (here, PyTorch)')
    pairs = []
    for seed in args.seeds:
        found = compare(args, seed, pathlib.Path(args.workdir) / str(seed))
        pairs.append(found['scores'])
        cells = ['{:.4f}  {:.4f}'.format(*found[part]) for part in ('losses', 'scores')]
        print(f'{seed:4}  {found["curve"]:15.1e}  {cells[0]:>25}  {cells[1]}', flush=True)
    means, spread = np.mean(pairs, 0), np.std(pairs, 0, ddof=1) if len(pairs) > 1 else np.zeros(2)
    print('mean ± standard deviation: ' + ', '.join(f'{m:.4f} ± {s:.4f}' for m, s in zip(means, spread, strict=True)))


if __name__ == '__main__':
    main()
