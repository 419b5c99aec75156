"""What a GPU does with models of published sizes, beside PyTorch where it is there, and beside our own estimate.

    python benchmarks/gpu.py [--only full,lora,qlora,decode] [--length 4096] [--steps 6] [--small]

Updates of a Llama of 1.2 billion parameters (full, AdamW) and of 8 billion (LoRA and QLoRA, rank 16, all linear
layers), bfloat16, random tokens; and decoding of the smaller one. The peer is `transformers` with SDPA under
`torch.compile`, with PEFT and bitsandbytes where they are installed and CUDA is there. Each runs in a process of its
own, ours first. Prints a JSON line a measurement, then a table with ratios. `--small` takes toy sizes, to try the
script itself on any machine. On one card of 80 GB or more it takes under 8 minutes.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

SMALL = {'hidden_size': 128, 'intermediate_size': 256, 'num_hidden_layers': 2, 'num_attention_heads': 4}
BILLION = {'hidden_size': 2048, 'intermediate_size': 8192, 'num_hidden_layers': 16, 'num_attention_heads': 32}
EIGHT = {'hidden_size': 4096, 'intermediate_size': 14336, 'num_hidden_layers': 32, 'num_attention_heads': 32}
CASES = {'full': BILLION, 'lora': EIGHT, 'qlora': EIGHT, 'decode': BILLION}
DECODED = {'batch': 64, 'prompt': 128, 'new': 256}


def fields_of(case: str, small: bool) -> dict:
    shape = SMALL if small else CASES[case]
    vocabulary = 1024 if small else 128256
    heads = {'num_key_value_heads': 4 if small else 8, 'tie_word_embeddings': case in ('full', 'decode')}
    return {'model_type': 'llama', 'vocab_size': vocabulary, 'max_position_embeddings': 8192, **shape, **heads}


def ours(case: str, args: argparse.Namespace) -> dict:
    """Our measurement of a case."""
    import jax
    from train_step import measure

    fields = fields_of(case, args.small)
    known = {} if case == 'decode' else estimated(case, fields, args)  # before this process takes the card
    if case == 'decode':
        return {'tokens_per_second': our_decoding(fields)}
    dtypes = {'param_dtype': 'bfloat16', 'compute_dtype': 'bfloat16', 'remat': 'full'}
    found = measure(case, args.steps, args.batch, args.length, 1, fields, **dtypes)
    stats = jax.local_devices()[0].memory_stats() or {}
    return found | {'peak_bytes': stats.get('peak_bytes_in_use')} | known


def our_decoding(fields: dict) -> float:
    """Sampled tokens a second of a batch, compiling left out."""
    import jax
    import numpy as np

    from jaxtune import models
    from jaxtune.generation.sampling import Sampling, sample

    model = models.build(models.read_config(fields), param_dtype='bfloat16', compute_dtype='bfloat16')
    params = jax.jit(model.init)(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(3, fields['vocab_size'], (DECODED['batch'], DECODED['prompt']))
    lengths = np.full(DECODED['batch'], DECODED['prompt'], np.int32)
    sampling = Sampling(max_new_tokens=DECODED['new'], pad_id=0, stop_ids=(), temperature=1.0)
    keys = jax.random.split(jax.random.key(1), DECODED['batch'])
    run = jax.jit(lambda params, prompts: sample(model, sampling, params, prompts, lengths, keys).tokens)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        run(params, prompts.astype(np.int32)).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return DECODED['batch'] * DECODED['new'] / statistics.median(seconds[1:])


def estimated(case: str, fields: dict, args: argparse.Namespace) -> dict:
    """What `task=compile` says of the same update on the device that is here."""
    from recipe_runs import run_recipe

    keys = {'compile.topology': '', 'method.name': case, 'data.seq_len': args.length, 'train.batch_size': args.batch}
    keys |= {'train.accumulate': 1, 'data.packing': False}
    keys |= {f'model.config.{name}': value for name, value in fields.items()}
    with tempfile.TemporaryDirectory() as folder:
        metrics = run_recipe('compile_causal_lm.py', pathlib.Path(folder) / 'run', keys)
    names = ('estimated_seconds', 'peak_bytes_per_device', 'estimated_mfu')
    return {name: metrics[name] for name in names if name in metrics}


def theirs(case: str, args: argparse.Namespace) -> dict:
    """PyTorch's measurement of a case."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    device = 'cuda' if cuda else 'cpu'
    fields = {name: value for name, value in fields_of(case, args.small).items() if name != 'model_type'}
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation='sdpa')).to(torch.bfloat16)
    if case == 'decode':
        return {'tokens_per_second': their_decoding(model, fields, device)}
    if case == 'qlora':
        quantise(model, device)
    if case != 'full':
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules='all-linear'))
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
    model.train()
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-4, fused=cuda)
    run = torch.compile(model) if cuda else model
    tokens = torch.randint(0, fields['vocab_size'], (args.batch, args.length), device=device)
    seconds = []
    for _ in range(args.steps + 3):
        start = time.perf_counter()
        run(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[3:])
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {'step_seconds': step, 'tokens_per_second': args.batch * args.length / step, 'peak_bytes': peak}


def quantise(model, device: str) -> None:
    """Replaces linear layers but the head by bitsandbytes' NF4 with double quantisation."""
    import bitsandbytes as bnb
    import torch

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and 'lm_head' not in name:
            parent, own = name.rsplit('.', 1)
            shape = (module.in_features, module.out_features)
            new = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.bfloat16, quant_type='nf4')
            weight = module.weight.data.cpu()
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type='nf4')
            setattr(model.get_submodule(parent), own, new.to(device))


def their_decoding(model, fields: dict, device: str) -> float:
    import torch

    prompts = torch.randint(3, fields['vocab_size'], (DECODED['batch'], DECODED['prompt']), device=device)
    keys = {'do_sample': True, 'temperature': 1.0, 'top_k': 0, 'pad_token_id': 0, 'eos_token_id': None}
    keys |= {'min_new_tokens': DECODED['new'], 'max_new_tokens': DECODED['new']}
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model.eval().generate(prompts, attention_mask=torch.ones_like(prompts), **keys).cpu()
        seconds.append(time.perf_counter() - start)
    return DECODED['batch'] * DECODED['new'] / statistics.median(seconds[1:])


def in_own_process(side: str, case: str, args: argparse.Namespace) -> dict | None:
    """A measurement, or None where a side cannot run the case; why is printed."""
    words = [sys.executable, __file__, '--side', side, '--only', case]
    words += [f'--{name}={getattr(args, name)}' for name in ('length', 'steps', 'batch')]
    words += ['--small'] if args.small else []
    done = subprocess.run(words, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"side"')]
    if done.returncode or not lines:
        print(f'{side} {case}: {(done.stderr.strip().splitlines() or ["no result"])[-1]}', flush=True)
        return None
    print(lines[-1], flush=True)
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default=','.join(CASES))
    parser.add_argument('--length', type=int, default=4096)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--steps', type=int, default=6)
    parser.add_argument('--small', action='store_true')
    parser.add_argument('--side', default='', choices=('', 'jaxtune', 'torch'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        measured = (ours if args.side == 'jaxtune' else theirs)(args.only, args)
        print(json.dumps({'side': args.side, 'case': args.only} | measured), flush=True)
        return
    rows = ['case     tokens/s  torch     ratio  GiB    torch  estimated/measured s  bytes']
    for case in args.only.split(','):
        here, there = in_own_process('jaxtune', case, args), in_own_process('torch', case, args)
        if here is None:
            continue
        speed, their_speed = here['tokens_per_second'], there['tokens_per_second'] if there else None
        ratio = f'{speed / their_speed:5.2f}' if their_speed else '    -'
        peaks = [
            f'{one["peak_bytes"] / 2**30:5.1f}' if one and one.get('peak_bytes') else '    -' for one in (here, there)
        ]
        time_ratio = f'{here["estimated_seconds"] / here["step_seconds"]:.2f}' if 'estimated_seconds' in here else '-'
        known = here.get('peak_bytes') and here.get('peak_bytes_per_device')
        bytes_ratio = f'{here["peak_bytes_per_device"] / here["peak_bytes"]:.2f}' if known else '-'
        theirs_text = f'{their_speed:,.0f}' if their_speed else '-'
        rows.append(
            f'{case:8} {speed:<9,.0f} {theirs_text:<9} {ratio}  {peaks[0]}  {peaks[1]}  {time_ratio:20}  {bytes_ratio}'
        )
    print('\n'.join(rows))


if __name__ == '__main__':
    main()
