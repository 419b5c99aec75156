"""The teacher of a recipe: checked before weights are read, loaded, or as shapes."""

import dataclasses

from jax.sharding import Mesh

from jaxtune import models
from jaxtune.common import console, hub
from jaxtune.common.formatting import amount
from jaxtune.common.settings import Settings
from jaxtune.errors import UserError
from jaxtune.models.frozen import FrozenModel
from jaxtune.objectives import TEACHER
from jaxtune.parallel import match_rules, shardings
from jaxtune.parallel.rules import with_shardings
from jaxtune.pretrained.load import ModelSpec, load_model, model_folder, open_model, open_tokenizer
from jaxtune.tasks import specs
from jaxtune.weights import tree


def _spec(config: Settings) -> ModelSpec | None:
    """The teacher as a model to open, with no tokens but its own; None for an objective without one."""
    objective = specs.objective(config)
    teacher = objective.objective.teacher
    if teacher is None:
        return None
    path = teacher.path(objective.settings)
    if not path:
        raise UserError(f"{teacher.key}='': expected a folder, a workdir, a hub id or @STAGE")
    return dataclasses.replace(specs.other_model_spec(config, teacher.key, path), added=())


def check(config: Settings) -> None:
    """Refuses a teacher that is none, or that has another tokenizer; the weights are not read.

    Raises:
      UserError: names the teacher's key.
    """
    spec = _spec(config)
    if spec is None or spec.path.startswith('@'):
        return
    folder = hub.resolve(model_folder(spec.path, spec.key), spec.key)
    model_type = str(models.read_config(str(folder), spec.settings.family)['model_type'])
    kind = models.families(spec.settings.family)[model_type].kind
    if kind not in specs.objective(config).objective.kinds:
        raise UserError(f'{spec.key}={spec.path}: is a {model_type}; expected a model that predicts the next token')
    if any(path.startswith('@') for path in (config.model.path, config.tokenizer.path)):
        return
    ours, theirs = (open_tokenizer(each).get_vocab() for each in (specs.model_spec(config), spec))
    if other := {number: token for token, number in ours.items() if theirs.get(token) != number}:
        number, token = min(other.items())
        there = f'has number {theirs[token]} there' if token in theirs else 'is none there'
        raise UserError(
            f"{spec.key}={spec.path}: has another tokenizer: the student's token {token!r}, number {number}, {there}; "
            'expected a teacher with the same vocabulary'
        )


def load(config: Settings, mesh: Mesh, *, weights: bool = True) -> dict[str, FrozenModel]:
    """What a batch holds of the teacher: itself, on the mesh; {} for an objective without one.

    Args:
      config: the recipe.
      mesh: the mesh.
      weights: False reads of the weights' files only the headers.

    Raises:
      UserError: whatever is wrong with it.
    """
    spec = _spec(config)
    if spec is None:
        return {}
    bundle = load_model(spec, mesh, weights=weights)
    size = amount(tree.count(bundle.params)).strip()
    console.note(f'{spec.key}={spec.path}: a {bundle.model.hf_config["model_type"]} of {size} parameters, frozen')
    return {TEACHER: FrozenModel(bundle.model, bundle.params)}


def shapes(config: Settings, mesh: Mesh) -> dict[str, FrozenModel]:
    """The same as shapes with their shardings, for a mesh that need not be there.

    Raises:
      UserError: there is no such model.
    """
    spec = _spec(config)
    if spec is None:
        return {}
    model, _ = open_model(spec, None)
    placed = shardings(match_rules(model.shapes, mesh), mesh)
    return {TEACHER: FrozenModel(model, with_shardings(model.shapes, placed))}
