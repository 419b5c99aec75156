"""Times sampling, and `transformers`' `generate` in the same run: answers of equal lengths, and of very unequal ones.

    python benchmarks/generate.py [equal|unequal] [--slots 16] [--prompt 128] [--new 128] [--batches 1] [--rounds 1]
        [--without-peer]

The model is that of `train_step.py`, random weights, float32, temperature 1. `equal`: nothing ends an answer early.
`unequal`: one token in 32 ends it, so that answers have about a quarter of the longest one's tokens; ours refills its
slots, theirs waits for the longest of a batch. Prints one JSON line a run: answers' tokens per second (the median of
three calls after a first one), the same by the seconds of CPU that the process took, which tell more on a busy machine,
and for ours the share of slots' steps that wrote a token; and a last line with the ratios of the means (ours over
theirs). The peer runs before and after every round.

Needs the `test` extra (torch, transformers).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

from train_step import CONFIG, print_ratios, run

CALLS, ENDS = 4, 32


def timed(who: str, args: argparse.Namespace, call: Callable[[], int], **more: Callable[[], float]) -> dict:
    """A line: medians over calls that return how many tokens they wrote."""
    rates, work = [], []
    for _ in range(CALLS):
        start, before = time.perf_counter(), time.process_time()
        tokens = call()
        rates.append(tokens / (time.perf_counter() - start))
        work.append(tokens / (time.process_time() - before))
    found = {'tokens_per_second': statistics.median(rates[1:]), 'tokens_per_cpu_second': statistics.median(work[1:])}
    found |= {name: value() for name, value in more.items()}
    return {'peer': who, 'lengths': args.lengths, **{name: round(value, 3) for name, value in found.items()}}


def drawn_prompts(args: argparse.Namespace) -> list[list[int]]:
    """Random tokens."""
    import numpy as np

    shape = (args.slots * args.batches, args.prompt)
    return np.random.default_rng(0).integers(CONFIG['vocab_size'] // ENDS, CONFIG['vocab_size'], shape).tolist()


def stop_ids(args: argparse.Namespace) -> tuple[int, ...]:
    """The tokens that end an answer."""
    return tuple(range(CONFIG['vocab_size'] // ENDS)) if args.lengths == 'unequal' else ()


def jaxtune(args: argparse.Namespace) -> dict:
    """Ours: every prompt in one queue."""
    import jax

    from jaxtune import models
    from jaxtune.generation.sampling import Sampling
    from jaxtune.generation.slot_sampler import SlotSampler
    from jaxtune.parallel import AXES, make_mesh

    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = models.build(models.read_config(CONFIG))
        params = jax.jit(model.init)(jax.random.key(0))
        sampling = Sampling(args.new, stop_ids=stop_ids(args))
        sampler, prompts = SlotSampler(model, sampling, mesh, args.slots, jax.random.key(1)), drawn_prompts(args)
        call = lambda: int(sampler([params], prompts).lengths.sum())  # noqa: E731
        return timed('jaxtune', args, call, occupancy=lambda: sampler.usage.occupancy)


def transformers(args: argparse.Namespace) -> dict:
    """The peer: batch by batch."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, pad_token_id=0, bos_token_id=None, eos_token_id=None)).eval()
    prompts, stops = torch.tensor(drawn_prompts(args)), stop_ids(args)
    how = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, max_new_tokens=args.new)
    how.eos_token_id = list(stops) or None
    write: Callable = getattr(model, 'generate')  # noqa: B009  # its type refuses every model

    def call() -> int:
        tokens = 0
        for batch in prompts.split(args.slots):
            whole = write(batch, attention_mask=torch.ones_like(batch), generation_config=how)
            new = whole[:, args.prompt :]
            ended = torch.isin(new, torch.tensor(stops)).int().cumsum(1) if stops else torch.zeros_like(new)
            tokens += int((ended == 0).sum()) + int((ended > 0).any(1).sum())
        return tokens

    return timed('transformers', args, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('lengths', nargs='?', default='equal', choices=['equal', 'unequal'])
    for name, size in (('slots', 16), ('prompt', 128), ('new', 128), ('batches', 1), ('rounds', 1)):
        parser.add_argument(f'--{name}', type=int, default=size)
    parser.add_argument('--without-peer', action='store_true')
    parser.add_argument('--inside', choices=['jaxtune', 'transformers'], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f'--rounds={args.rounds}: expected 1 or more')
    if args.inside == 'jaxtune':
        from jaxtune.common import huge_pages

        huge_pages.begin()  # as the command does
    if args.inside:
        print(json.dumps({'jaxtune': jaxtune, 'transformers': transformers}[args.inside](args)), flush=True)
        return
    own = [args.lengths, *(f'--{name}={getattr(args, name)}' for name in ('slots', 'prompt', 'new', 'batches'))]

    def command(who: str) -> list[str]:
        return [sys.executable, __file__, *own, '--inside', who]

    theirs, mine = [] if args.without_peer else run(command('transformers')), []
    for _ in range(args.rounds):
        mine += run(command('jaxtune'))
        theirs += [] if args.without_peer else run(command('transformers'))
    if theirs:
        print_ratios(args.lengths, mine, theirs, 'tokens_per_second', 'tokens_per_cpu_second')


if __name__ == '__main__':
    main()
