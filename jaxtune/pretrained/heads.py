"""Heads: which one a model gets, which one a folder was saved with, and what to say of those that it lacks."""

from typing import TYPE_CHECKING, Any

from jaxtune import models
from jaxtune.common import console, hub
from jaxtune.errors import UserError
from jaxtune.models.fields import folder_config

if TYPE_CHECKING:
    from jaxtune.pretrained.load import ModelSpec


def kinds_of(spec: 'ModelSpec') -> dict[str, str]:
    """The kind of every known `model_type`, that of the recipe's `model.family` among them."""
    return {name: family.kind for name, family in models.families(spec.settings.family).items()}


def head_of(spec: 'ModelSpec', fields: dict[str, Any], folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Which head the model gets, as `models.build` takes it, and the fields with its labels.

    Where there is a loss, its objective says; else the folder's own head stays.

    Raises:
      UserError: the objective does not suit this kind of model.
    """
    if spec.rows:
        objective = spec.rows.objective
        known = kinds_of(spec)
        kind = known[fields['model_type']]
        if kind not in objective.kinds:
            fitting = [name for name, its_kind in known.items() if its_kind in objective.kinds]
            raise UserError(
                f'objective={objective.name}: does not suit model_type={fields["model_type"]!r}; expected one of '
                + ', '.join(fitting)
            )
        head = objective.head
        fields = fields | spec.rows.label_fields()
    else:
        head = folder_head(folder) if folder else 'lm'
        if head == 'classification' and kinds_of(spec)[fields['model_type']] == 'decoder':
            head = 'reward'
    return ({} if head == 'lm' else {'head': head, 'labels': len(fields.get('id2label') or (0, 1))}), fields


def folder_head(folder: str) -> str:
    """The head of the class that a folder was saved from."""
    names = folder_config(hub.resolve(folder)).get('architectures') or ['']
    endings = {'ForSequenceClassification': 'classification', 'ForTokenClassification': 'token_classification'}
    return next((head for ending, head in endings.items() if names[0].endswith(ending)), 'lm')


def check_heads(spec: 'ModelSpec', model: models.Model, folder: str, missing: frozenset[str]) -> None:
    """Says which heads a folder lacks, where they are trained, and refuses to use them where they are not."""
    if not missing:
        return
    names = ', '.join(sorted(model.tensors[path].name for path in missing))
    if not spec.new_heads:
        kind = 'no reward model' if any(path.startswith('score') for path in missing) else 'not whole'
        if folder_head(folder) != 'lm' and kind == 'not whole':
            kind = 'a reward model or a classifier'
        raise UserError(
            f'{spec.key}={spec.path}: is {kind}: holds no {names}; expected a folder with that (task=train alone '
            'begins with a head of random numbers)'
        )
    console.note(f'{spec.path} holds no {names}: begins at random, and is trained whole')
