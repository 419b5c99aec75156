"""The table of docs/fit.md: popular models by tuning methods by hardware, every cell compiled, none of it at hand.

    python benchmarks/fit_table.py WORKDIR [--on v5e-4,v5p-8,v6e-8,rtx4090,h100,h100x8] [--models Qwen3-8B] \
        [--write docs/fit.md]

Needs `pip install 'jaxtune[tpu,cuda]'`. A cell that is in WORKDIR already is not compiled again, so that the same
command goes on where it stopped.
"""

import argparse
import json
import pathlib
import sys

from jaxtune.main import main as jaxtune

LLAMA = {'model_type': 'llama', 'vocab_size': 128256, 'num_key_value_heads': 8, 'rope_theta': 500000.0}
QWEN3 = {'model_type': 'qwen3', 'vocab_size': 151936, 'num_key_value_heads': 8, 'head_dim': 128, 'rope_theta': 1e6}


def sized(width: int, inner: int, layers: int, heads: int) -> dict:
    sizes = {'hidden_size': width, 'intermediate_size': inner, 'num_hidden_layers': layers}
    return sizes | {'num_attention_heads': heads, 'max_position_embeddings': 32768, 'rms_norm_eps': 1e-5}


# The fields of their published config.json that the shapes of a step depend on.
MODELS = {
    'Qwen3-4B': QWEN3 | sized(2560, 9728, 36, 32) | {'tie_word_embeddings': True},
    'Mistral-7B-v0.3': LLAMA | sized(4096, 14336, 32, 32) | {'model_type': 'mistral', 'vocab_size': 32768},
    'Llama-3.1-8B': LLAMA | sized(4096, 14336, 32, 32),
    'Qwen3-8B': QWEN3 | sized(4096, 12288, 36, 32),
    'Qwen3-14B': QWEN3 | sized(5120, 17408, 40, 40),
    'Qwen3-30B-A3B': QWEN3
    | sized(2048, 6144, 48, 32)
    | {'model_type': 'qwen3_moe', 'num_key_value_heads': 4, 'num_experts': 128, 'num_experts_per_tok': 8}
    | {'moe_intermediate_size': 768, 'norm_topk_prob': True},
    'Qwen3-32B': QWEN3 | sized(5120, 25600, 64, 64),
    'Llama-3.3-70B': LLAMA | sized(8192, 28672, 80, 64),
}
METHODS = ('full', 'lora', 'qlora')


def cells_of(name: str, args: argparse.Namespace) -> list[dict]:
    """The cells of a model, compiled where they are not yet."""
    folder = pathlib.Path(args.workdir) / name
    (folder / 'model').mkdir(parents=True, exist_ok=True)
    (folder / 'model' / 'config.json').write_text(json.dumps(MODELS[name]))
    words = ['fit', str(folder / 'model'), '--on', args.on, '--seq-len', str(args.seq_len)]
    status = jaxtune(['jaxtune', *words, '--workdir', str(folder / 'fit')])
    if status:
        sys.exit(status)
    return json.loads((folder / 'fit' / 'compile.json').read_text())['cells']


def cell_text(cell: dict) -> str:
    def memory(one: dict) -> str:
        return f'{one["peak_bytes"] / 2**30:.1f} of {one["limit"] / 2**30:.1f} GiB'

    def speed(one: dict) -> str:
        return f'{one["tokens_per_second"]:,.0f} tokens/s' if one['tokens_per_second'] else ''

    if cell['fits']:
        return f'{memory(cell)}<br>{speed(cell)}'
    if not (found := cell['advice']):
        return '–'
    settings = '<br>'.join(f'`{key}={value}`' for key, value in found['changes'].items())
    return f'with {settings}:<br>{memory(found)}<br>{speed(found)}'


def table(found: dict[str, list[dict]], topologies: list[str]) -> str:
    lines = [f'| model | method | {" | ".join(topologies)} |', '|---|---|' + '---|' * len(topologies)]
    for name, cells in found.items():
        for method in METHODS:
            by_hardware = {cell['topology']: cell for cell in cells if cell['method'] == method}
            row = ' | '.join(cell_text(by_hardware[topology]) for topology in topologies)
            lines.append(f'| {name} | {method} | {row} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('workdir')
    parser.add_argument('--on', default='rtx4090,h100,h100x8,v5e-8,v5p-8,v6e-8')
    parser.add_argument('--models', default=','.join(MODELS))
    parser.add_argument('--seq-len', type=int, default=4096)
    parser.add_argument('--write', default='', help='a Markdown file whose table is replaced')
    args = parser.parse_args()
    found = {name: cells_of(name, args) for name in args.models.split(',')}
    text = table(found, args.on.split(','))
    print(text)
    if args.write:
        path = pathlib.Path(args.write)
        page = path.read_text() if path.exists() else '<!-- table -->\n<!-- end of the table -->\n'
        before, after = page.split('<!-- table -->')[0], page.split('<!-- end of the table -->')[1]
        path.write_text(f'{before}<!-- table -->\n{text}\n<!-- end of the table -->{after}')


if __name__ == '__main__':
    main()
