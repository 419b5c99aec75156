"""Seconds to trace and compile a training step, by number of layers: it must stay flat, since layers are scanned.

    python benchmarks/compile_time.py [--layers 4 32]

Prints one JSON line a depth and a last one with the ratio of the deepest to the shallowest.
"""

import argparse
import json
import time


def seconds(layers: int) -> float:
    """Seconds for a Llama of so many layers, a second compile so that the first one's start-up does not count."""
    import jax
    from train_step import CONFIG

    from jaxtune import models
    from jaxtune.parallel import make_mesh
    from jaxtune.recipe import recipes
    from jaxtune.tasks import specs
    from jaxtune.training.program import abstract_params, make_program, with_shardings

    config = recipes.defaults()
    recipes.apply_overrides(config, {'train.batch_size': 8, 'data.seq_len': 512})
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        model = models.build(models.read_config(CONFIG | {'num_hidden_layers': layers}), remat=config.model.remat)
        trainable, frozen = abstract_params(specs.method(config), mesh, model)
        program = make_program(
            mesh, model, trainable, specs.objective(config), optimizer=config.optimizer, steps=10, batch_size=8
        )
        start = time.perf_counter()
        state = with_shardings(program.shapes, program.placed)
        program.train_step(1).lower(state, frozen, program.batch_shapes()).compile()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--layers', type=int, nargs='+', default=[4, 32])
    layers = sorted(parser.parse_args().layers)
    seconds(1)
    found = {count: min(seconds(count), seconds(count)) for count in layers}
    for count, value in found.items():
        print(json.dumps({'layers': count, 'compile_seconds': round(value, 2)}), flush=True)
    print(json.dumps({'ratio': round(found[layers[-1]] / found[layers[0]], 3)}))


if __name__ == '__main__':
    main()
