"""Putting the parts of a recipe together: tokenizer, model and parameters on the mesh."""

import copy
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxtune import methods, models, objectives, rl
from jaxtune.common import console, hub, paths
from jaxtune.common.hub import TOKENIZER_FILES
from jaxtune.config import REWARDED, TRAINING
from jaxtune.data import tokenizer as tokenizers
from jaxtune.errors import UserError
from jaxtune.methods import apply, lora, peft
from jaxtune.models import hf, value_head
from jaxtune.models.fields import folder_config
from jaxtune.parallel import match_rules, shardings
from jaxtune.parallel.rules import with_shardings
from jaxtune.pretrained import companions
from jaxtune.recipe import recipes

_NO_MODEL = "model.path='': expected a model folder, or model.config with model_type to start from scratch"


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A model with its parameters on the mesh, its tokenizer, and where they came from.

    Where `method.path` names several adapters, `adapters` has the parameters with each of them by its name; they share
    the base's arrays, and `params` are those with the first. `end_ids` end a text that it writes; `brought` are the
    model's own leaves that came with the adapter.
    """

    model: models.Model
    params: Any
    specs: Any
    tokenizer: Any
    fresh: frozenset[str]
    folder: str
    adapters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    end_ids: tuple[int, ...] = ()
    brought: frozenset[str] = frozenset()

    @property
    def whole(self) -> frozenset[str]:
        """Paths that train whole with every method: what the folder lacked, and what the adapter brought along."""
        return self.fresh | self.brought


def model_folder(path: str, key: str = 'model.path') -> str:
    """The Hugging Face folder that `model.path` means: a workdir stands for its `export/`, an adapter for its base.

    Args:
      path: as it was written.
      key: what names it, for messages.

    Raises:
      UserError: the run in this workdir has not finished, or an adapter's base is an adapter in turn.
    """
    folder = paths.local(path, key)
    if (folder / 'export' / 'config.json').is_file():
        return str(folder / 'export')
    if adapter := adapter_in(path):
        base = peft.base_of(adapter)
        where = f'{adapter}/{peft.CONFIG}: base_model_name_or_path'
        paths.local(base, where)
        if adapter_in(base):
            raise UserError(f'{where}={base}: expected a model, found another adapter')
        return model_folder(base, where)
    if (folder / 'checkpoints').is_dir():
        raise UserError(f'{key}={path}: the run in this workdir has not finished; expected its export/')
    return str(folder) if folder.is_dir() else path


def adapter_in(path: str) -> str:
    """The adapter folder that `model.path` means, '' if none: itself, or that of a workdir without a merged model."""
    folder = paths.local(path, 'model.path')
    if peft.is_adapter(folder):
        return str(folder)
    finished = peft.is_adapter(folder / 'adapter') and not (folder / 'export' / 'config.json').is_file()
    return str(folder / 'adapter') if finished else ''


def adapter_folders(config: ConfigDict) -> dict[str, str]:
    """The adapters that a recipe begins with, by name: those of `method.path`, or what `model.path` is.

    Raises:
      UserError: there is none at `method.path`, more than the task can use, or training it is another method's work.
    """
    paths = [path.strip() for path in config.method.path.split(',') if path.strip()]
    if len(paths) > 1 and config.task != 'generate':
        raise UserError(f'method.path={config.method.path}: expected one adapter; task=generate alone takes several')
    folders = {path: peft.find(path) for path in paths}
    if not folders and config.model.path and (folder := adapter_in(config.model.path)):
        folders = {config.model.path: folder}
    if folders and config.task in TRAINING:
        (folder,) = folders.values()
        name = peft.METHODS[peft.read_config(folder)['peft_type']]
        if config.method.name.removeprefix('q') != name:
            raise UserError(f'method.name={config.method.name}: {folder} holds an adapter of method.name={name}')
    return folders


def tokenizer_folder(config: ConfigDict) -> str:
    """What `tokenizer.path` means: a workdir stands for its `tokenizer/` or `export/`; empty is the model's own.

    With an adapter that is the one it was trained with, whose chat template the base may not have.
    """
    path = config.tokenizer.path or _adapters_tokenizer(config)
    path = path or (model_folder(config.model.path) if config.model.path else '')
    if not path:
        raise UserError("tokenizer.path='': expected a folder, a hub id, @STAGE or 'bytes' for a model from scratch")
    folder = paths.local(path, 'tokenizer.path')
    return next((str(folder / part) for part in ('tokenizer', 'export') if (folder / part).is_dir()), path)


def open_tokenizer(config: ConfigDict, key: str = 'model.path'):
    """The tokenizer of a recipe. What is wrong with its model is said first: the tokenizer is in the same folder.

    Args:
      config: the recipe.
      key: what names the model, for messages.

    Raises:
      UserError: there is none, or no such model.
    """
    if not config.model.path and not config.model.config.to_dict():
        raise UserError(_NO_MODEL)
    if config.model.path:
        folder = hub.resolve(model_folder(config.model.path, key), key)
        hub.check_companions(folder)
        models.read_config(str(folder), config.model.family)
    return tokenizers.load(tokenizer_folder(config), 'tokenizer.path' if config.tokenizer.path else key)


def _adapters_tokenizer(config: ConfigDict) -> str:
    """The folder with the tokenizer of the first adapter, '' if it has none: its own, or the `export/` beside it."""
    for folder in map(pathlib.Path, list(adapter_folders(config).values())[:1]):
        for place in (folder, folder.parent / 'export'):
            if any((place / name).is_file() for name in TOKENIZER_FILES):
                return str(place)
    return ''


def _reads_rows(config: ConfigDict) -> bool:
    """Whether the task reads rows of `data.seq_len` tokens."""
    requantises = config.task == 'export' and config.export.requantise
    return config.task in (*TRAINING, 'evaluate', 'compile') or requantises


def open_model(config: ConfigDict, tokenizer, own_head: bool = False) -> tuple[models.Model, str]:
    """The model of a recipe without its parameters, and the folder they are in ('' from scratch).

    Without a tokenizer (None) a model from scratch must name its `vocab_size`; `own_head` as for `models.build`.

    Raises:
      UserError: no model is named, the tokenizer does not fit, or a row is longer than the model's positions.
    """
    settings = config.model
    if settings.path:
        folder = model_folder(settings.path)
        fields = models.read_config(folder, settings.family)
    else:
        folder, own = '', settings.config.to_dict()
        if not own:
            raise UserError(_NO_MODEL)
        # A multiple of 64 keeps the matrix units whole; no token ever has these last numbers.
        if tokenizer is not None:
            own.setdefault(
                'vocab_size', -(-(tokenizers.vocab_size(tokenizer) + _spare_tokens(config, tokenizer)) // 64) * 64
            )
            for name in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
                own.setdefault(name, getattr(tokenizer, name))
            if _kinds(config).get(str(own.get('model_type'))) == 'encdec':
                own.setdefault('decoder_start_token_id', tokenizer.pad_token_id)  # as T5's own begin
        fields = models.read_config(own, settings.family)
    if tokenizer is not None:
        tokenizers.check_vocab(tokenizer, fields['vocab_size'])
        spare = _spare_tokens(config, tokenizer)
        if spare and fields['vocab_size'] < tokenizers.vocab_size(tokenizer) + spare:
            raise UserError(
                f'objective={config.objective}: needs {spare} tokens more than the tokenizer has; expected '
                f'vocab_size >= {tokenizers.vocab_size(tokenizer) + spare}, not {fields["vocab_size"]}, or a tokenizer '
                'with sentinels (<extra_id_0>, ...)'
            )
    head, fields = _head(config, fields, folder)
    if head.get('head') == 'reward' and tokenizer is not None:
        fields = fields | {'pad_token_id': tokenizers.padding_id(tokenizer)}
    model = models.build(
        fields,
        param_dtype=settings.param_dtype,
        compute_dtype=settings.compute_dtype,
        remat=settings.remat,
        attention=settings.attention,
        own_head=own_head,
        family=settings.family,
        **head,
    )
    limit, prompted = model.config.max_positions, config.method.name == 'prompt'
    taken = config.method.virtual_tokens if prompted else 0
    if limit and config.data.seq_len + taken > limit and _reads_rows(config):
        less = f' less method.virtual_tokens={taken}' if taken else ''
        raise UserError(f"data.seq_len={config.data.seq_len}: expected at most the model's {limit} positions{less}")
    tokens = prompted and not config.method.prefix
    if tokens and model.kind == 'encoder' and config.objective == 'masked_lm' and config.data.packing:
        raise UserError('data.packing=True: an encoder reads its prompt with one text a row; expected False')
    if tokens and model.border is not None and config.data.seq_len + taken > model.border and config.data.packing:
        raise UserError(
            f'data.packing=True: with LongRoPE a trained prompt has other angles before texts of over {model.border} '
            'tokens; expected False, or a shorter data.seq_len'
        )
    return model, folder


def _kinds(config: ConfigDict) -> dict[str, str]:
    """The kind of every known `model_type`, that of the recipe's `model.family` among them."""
    return {name: family.kind for name, family in models.families(config.model.family).items()}


def _spare_tokens(config: ConfigDict, tokenizer) -> int:
    """How many ids beyond the tokenizer's the objective uses."""
    if not _reads_rows(config):
        return 0
    count = getattr(objectives.get(config.objective), 'spare_tokens', None)
    return count(config, tokenizer) if count else 0


def _head(config: ConfigDict, fields: dict[str, Any], folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Which head the model gets, as `models.build` takes it, and the fields with its labels.

    Where there is a loss, its objective says; else the folder's own head stays.

    Raises:
      UserError: the objective does not suit this kind of model.
    """
    if _reads_rows(config):
        objective = objectives.get(config.objective)
        known = _kinds(config)
        kind = known[fields['model_type']]
        kinds = getattr(objective, 'KINDS', (kind,))
        if kind not in kinds:
            fitting = [name for name, its_kind in known.items() if its_kind in kinds]
            raise UserError(
                f'objective={config.objective}: does not suit model_type={fields["model_type"]!r}; expected one of '
                + ', '.join(fitting)
            )
        head = getattr(objective, 'HEAD', 'lm')
        if head != 'lm':
            fields = fields | objective.label_fields(config)
    else:
        head = folder_head(folder) if folder else 'lm'
        if head == 'classification' and _kinds(config)[fields['model_type']] == 'decoder':
            head = 'reward'
    return ({} if head == 'lm' else {'head': head, 'labels': len(fields.get('id2label') or (0, 1))}), fields


def folder_head(folder: str) -> str:
    """The head of the class that a folder was saved from."""
    names = folder_config(hub.resolve(folder)).get('architectures') or ['']
    endings = {'ForSequenceClassification': 'classification', 'ForTokenClassification': 'token_classification'}
    return next((head for ending, head in endings.items() if names[0].endswith(ending)), 'lm')


def assemble_other(config: ConfigDict, mesh: Mesh, key: str, objective: str = '', *, weights: bool = True) -> Assembly:
    """Another model than the recipe's own, to be asked: what a key names, whole, with its own tokenizer.

    Args:
      config: the recipe.
      mesh: the mesh.
      key: whose value is a folder, hub id or workdir; an adapter's own base comes with it.
      objective: whose head it is to have; '' = the recipe's.
      weights: as for `assemble`.

    Raises:
      UserError: as `assemble`.
    """
    config = copy.deepcopy(config)
    config.task, config.model.path = 'evaluate', recipes.config_get(config, key)
    config.objective = objective or config.objective
    config.tokenizer.path, config.method.name, config.method.path = '', 'full', ''
    return assemble(config, mesh, key, weights=weights)


def assemble(config: ConfigDict, mesh: Mesh, key: str = 'model.path', *, weights: bool = True) -> Assembly:
    """Tokenizer, model and parameters, each parameter straight on its devices.

    Args:
      config: the recipe.
      mesh: the mesh.
      key: what names the model, for messages.
      weights: False reads of the weights' files only the headers; the parameters are `jax.ShapeDtypeStruct`s.

    Raises:
      UserError: whatever is wrong with the model or tokenizer named by the recipe.
    """
    check = getattr(methods.get(config.method.name), 'check', None)
    if check:
        check(config.method)
    tokenizer = open_tokenizer(config, key)
    model, folder = open_model(config, tokenizer)
    chosen = adapter_folders(config)
    parted = peft.parts_table(chosen.values(), model)
    if folder and (parted or (weights and hf.has_own_head(folder, model))):
        model, folder = open_model(config, tokenizer, own_head=True)
    fresh = frozenset(hf.newly_initialized_paths(folder, model)) if folder else frozenset()
    codecs = apply.codecs(config, model, fresh)
    shapes = jax.eval_shape(lambda params: apply.encoded(params, codecs), model.shapes)
    specs = match_rules(shapes, mesh)
    placed = shardings(specs, mesh)
    rng = jax.random.key(config.seed)
    if not weights:
        params = with_shardings(shapes, placed)
    elif folder:
        params, _ = hf.load(folder, model, placed, rng=rng, codecs=codecs)
    else:
        # A plain array keeps initialisation independent of how the mesh divides it.
        params = jax.jit(lambda key: apply.encoded(model.init(key), codecs), out_shardings=placed)(rng)
    adapters, wholes = {}, []
    for name, adapter in chosen.items():
        init, arrays = peft.reader(adapter, model)
        adapters[name] = apply.attach(init, params, mesh, arrays)
        wholes.append(frozenset(arrays.whole))
    brought = frozenset.intersection(*wholes) if wholes else frozenset()
    _check_heads(config, model, folder, key, fresh - brought)
    if adapters:
        params = next(iter(adapters.values()))
    elif config.task in TRAINING:
        config = copy.deepcopy(config)
        if config.method.init_text:
            config.method.init_ids = tokenizer(config.method.init_text, add_special_tokens=False).input_ids
        params = apply.attach(lambda params: apply.begin(config, model, params, fresh), params, mesh)
        if config.method.init == 'loftq':
            if not folder:
                raise UserError('method.init=loftq: expected model.path, a model whose weights were quantised')
            params = lora.make_up(params, hf.kernels(folder, model)) if weights else params
    if config.task in REWARDED and rl.get(config.task).VALUE:
        params = apply.attach(lambda params: value_head.with_value(params, model), params, mesh)
        fresh |= value_head.PATHS
    several = adapters if len(adapters) > 1 else {}
    ends = companions.end_ids(tokenizer, model, folder)
    return Assembly(model, params, specs, tokenizer, fresh, folder, several, ends, brought)


def _check_heads(config: ConfigDict, model: models.Model, folder: str, key: str, missing: frozenset[str]) -> None:
    """Says which heads a folder lacks, where they are trained, and refuses to use them where they are not."""
    if not missing:
        return
    names = ', '.join(sorted(model.tensors[path].name for path in missing))
    if config.task != 'train':
        kind = 'no reward model' if any(path.startswith('score') for path in missing) else 'not whole'
        if folder_head(folder) != 'lm' and kind == 'not whole':
            kind = 'a reward model or a classifier'
        raise UserError(
            f'{key}={config.model.path}: is {kind}: holds no {names}; expected a folder with that (task=train alone '
            'begins with a head of random numbers)'
        )
    console.note(f'{config.model.path} holds no {names}: begins at random, and is trained whole')
