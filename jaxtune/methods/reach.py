"""What part of a model LoRA's targets reach, in the words of a run's first lines."""

from typing import Any

import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.models.model import Model, leaf_paths
from jaxtune.weights import LoRA


def reached(params: Any, model: Model) -> str:
    """Which share of the model's weights has factors beside it, and whether experts are among them; '' without any."""
    share, experts = _share(params, model)
    if not share:
        return ''
    count = model.config.experts.count if _experts(model) else 0
    among = f', all {count} experts of a layer among them' if experts else ''
    return f'{100 * share:.3g} % of the parameters{among}'


def warning(params: Any, model: Model, settings: Settings) -> str:
    """What a user may not expect of the targets, in one line; '' where there is nothing to say."""
    leaves = leaf_paths(params)
    loras = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LoRA)}
    if not loras or not _experts(model):
        return ''
    of_experts = [leaf for path, leaf in loras.items() if '/experts/' in path]
    shapes = leaf_paths(model.shapes)
    held = sum(leaf.size for path, leaf in shapes.items() if '/experts/' in path)
    held /= sum(leaf.size for leaf in shapes.values())
    if not of_experts and held > 0.5:
        return (
            f'method.targets={settings.targets}: reaches no expert, and experts hold {100 * held:.3g} % of the '
            'parameters; experts.down_proj and its like, or all-linear, reach them'
        )
    if any(leaf.magnitude is not None for leaf in of_experts):
        return (
            'method.dora=True: adapter/ has a module of each expert, as PEFT read it before transformers 5; '
            'with that it has no DoRA of experts'
        )
    return ''


def _experts(model: Model) -> Any:
    return getattr(model.config, 'experts', None)


def _share(params: Any, model: Model) -> tuple[float, bool]:
    """The share of the model's own weights that have factors, and whether those of experts have."""
    shapes, found, experts = leaf_paths(model.shapes), 0.0, False
    for path, leaf in leaf_paths(params).items():
        if not isinstance(leaf, LoRA) or path not in shapes:
            continue
        layers = len(leaf.layers) / leaf.shape[0] if leaf.layers else 1.0
        found += layers * float(np.prod(leaf.shape))
        experts = experts or '/experts/' in path
    return found / sum(leaf.size for leaf in shapes.values()), experts
