"""Peak host memory of importing a sharded Hugging Face folder, on the CPU, where the parameters themselves lie in it.

    python benchmarks/import_memory.py [--gib 2]

Makes a random Llama folder of about so many GiB in a temporary place, in shards of 0.5 GiB, and imports it in a process
of its own. Prints one JSON line: the folder's size, the process's peak and how much lies between them, in MiB.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

WIDTH, MLP, VOCAB = 2048, 5632, 32000


def make(folder: pathlib.Path, gib: float) -> None:
    """Writes the folder."""
    import jax

    from jaxtune import models
    from jaxtune.models import hf

    per_layer = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP)
    layers = max(1, round((gib * 2**30 - 8 * VOCAB * WIDTH) / per_layer))
    fields = {'model_type': 'llama', 'hidden_size': WIDTH, 'intermediate_size': MLP, 'vocab_size': VOCAB}
    fields |= {'num_hidden_layers': layers, 'num_attention_heads': 16}
    model = models.build(models.read_config(fields))
    hf.save(folder, model, jax.jit(model.init)(jax.random.key(0)), max_shard_bytes=2**29)


def load(folder: pathlib.Path) -> int:
    """Imports the folder; returns this process's peak in bytes."""
    import resource

    import jax

    from jaxtune import models
    from jaxtune.models import hf

    params, _ = hf.load(folder, models.build(models.read_config(str(folder))))
    jax.block_until_ready(params)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gib', type=float, default=2.0)
    parser.add_argument('--make', type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument('--load', type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.gib)
    elif args.load:
        print(load(args.load))
    else:
        with tempfile.TemporaryDirectory() as parent:
            folder = pathlib.Path(parent) / 'model'
            words = [sys.executable, __file__, '--gib', str(args.gib)]
            subprocess.run([*words, '--make', str(folder)], check=True)
            files = list(folder.glob('*.safetensors'))
            size = sum(file.stat().st_size for file in files)
            peak = int(subprocess.run([*words, '--load', str(folder)], check=True, capture_output=True).stdout)
            mib = {'folder_mib': size / 2**20, 'peak_mib': peak / 2**20, 'above_mib': (peak - size) / 2**20}
            print(json.dumps({'shards': len(files), **{name: round(value) for name, value in mib.items()}}))


if __name__ == '__main__':
    main()
