"""A folder of Hugging Face's format, or a workdir: tokenizer, model and parameters on the mesh."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune import methods, models
from jaxtune.common import console, hub, paths
from jaxtune.common.hub import TOKENIZER_FILES
from jaxtune.common.settings import Settings
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.tokenizer import Added
from jaxtune.errors import UserError
from jaxtune.methods import BoundMethod, apply, new_tokens, peft
from jaxtune.methods.new_tokens import NewTokens
from jaxtune.models import hf, value_head
from jaxtune.models.fields import folder_config
from jaxtune.objectives import BoundObjective
from jaxtune.parallel import match_rules, shardings
from jaxtune.parallel.rules import with_shardings
from jaxtune.pretrained import companions, overrides, vocabulary
from jaxtune.pretrained.heads import check_heads, head_of, kinds_of
from jaxtune.pretrained.overrides import Overridden

_NO_MODEL = "model.path='': expected a model folder, or model.config with model_type to start from scratch"


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Which model a task opens, and for what.

    Attributes:
      path: a folder, a hub id or a workdir; '' = from scratch.
      settings: the recipe's `model` subtree: the fields from scratch, and how the model computes.
      tokenizer: a folder, a hub id or a workdir; '' = the model's own.
      added: name and description (a text, or '') of tokens that the tokenizer gets, and the model rows for.
      overrides: config fields over those of the folder.
      method: which weights train, and the adapters that it begins with.
      adapters: adapter folders or workdirs, with commas between them; '' = what `path` is, if an adapter.
      several: whether there may be several adapters.
      rows: what is learnt or scored of rows of data, which decides the head; None = no rows are read, and the folder's
        own head stays.
      trains: the method begins.
      new_heads: heads that the folder lacks begin at random.
      value_head: a value head is added.
      seed: of what begins at random.
      key: the recipe's key that names the model, for messages.
    """

    path: str
    settings: Settings
    tokenizer: str
    method: BoundMethod
    adapters: str = ''
    several: bool = False
    rows: BoundObjective | None = None
    trains: bool = False
    new_heads: bool = False
    value_head: bool = False
    seed: int = 0
    key: str = 'model.path'
    added: tuple[tuple[str, str], ...] = ()
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ModelBundle:
    """A model with its parameters on the mesh, its tokenizer, and where they came from.

    Attributes:
      model: without its parameters.
      params: its parameters; with several adapters, with the first of them.
      specs: how they lie on the mesh.
      tokenizer: its tokenizer.
      newly_initialized: paths of parameters that the folder lacked.
      folder: where it was read; '' = from scratch.
      adapters: where several are read, the parameters with each of them by its name; they share the base's arrays.
      base: where several may be read and some are, the parameters without any; None where the adapters' tokens have no
        rows there.
      end_ids: tokens that end a text that it writes.
      brought: paths of the model's own leaves that came with the adapter.
      overrides: config fields that are others than the folder's.
      also_trained: paths of further leaves that the recipe lets train whole.
    """

    model: models.Model
    params: Any
    specs: Any
    tokenizer: Any
    newly_initialized: frozenset[str]
    folder: str
    adapters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: Any = None
    end_ids: tuple[int, ...] = ()
    brought: frozenset[str] = frozenset()
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    also_trained: frozenset[str] = frozenset()

    @property
    def trained_whole(self) -> frozenset[str]:
        """Paths that train whole: what the folder lacked, what the adapter brought along, what the recipe names."""
        return self.newly_initialized | self.brought | self.also_trained


def _own(method: BoundMethod) -> methods.Method | None:
    """The method, if it is none of those that are shipped."""
    return None if method.method.name in methods.METHODS.names else method.method


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


def adapter_folders(spec: ModelSpec) -> dict[str, str]:
    """The adapters that a model begins with, by name.

    Raises:
      UserError: there is none at `method.path`, more than the task can use, or training it is another method's work.
    """
    names = [path.strip() for path in spec.adapters.split(',') if path.strip()]
    if len(names) > 1 and not spec.several:
        raise UserError(f'method.path={spec.adapters}: expected one adapter; task=generate alone takes several')
    folders = {path: peft.find(path) for path in names}
    if not folders and spec.path and (folder := adapter_in(spec.path)):
        folders = {spec.path: folder}
    if folders and spec.trains:
        (folder,) = folders.values()
        own = _own(spec.method)
        name = peft.kinds(own)[peft.read_config(folder, own)['peft_type']].name
        if spec.method.method.name.removeprefix('q') != name:
            raise UserError(f'method.name={spec.method.method.name}: {folder} holds an adapter of method.name={name}')
    return folders


def tokenizer_folder(spec: ModelSpec) -> str:
    """What `tokenizer.path` means: a workdir stands for its `tokenizer/` or `export/`; empty is the model's own.

    With an adapter that is the one it was trained with, whose chat template the base may not have.
    """
    path = spec.tokenizer or _adapters_tokenizer(spec)
    path = path or (model_folder(spec.path) if spec.path else '')
    if not path:
        raise UserError("tokenizer.path='': expected a folder, a hub id, @STAGE or 'bytes' for a model from scratch")
    folder = paths.local(path, 'tokenizer.path')
    return next((str(folder / part) for part in ('tokenizer', 'export') if (folder / part).is_dir()), path)


def open_tokenizer(spec: ModelSpec) -> Any:
    """The tokenizer of a model, with the tokens that are added; raises as `open_with_added`."""
    return open_with_added(spec)[0]


def open_with_added(spec: ModelSpec) -> tuple[Any, tuple[Added, ...]]:
    """The tokenizer of a model, and the tokens that it was given.

    What is wrong with the model is said first: the tokenizer is in the same folder.

    Raises:
      UserError: there is none, or no such model.
    """
    if not spec.path and not spec.settings.config.to_dict():
        raise UserError(_NO_MODEL)
    if spec.path:
        folder = hub.resolve(model_folder(spec.path, spec.key), spec.key)
        hub.check_companions(folder)
        models.read_config(str(folder), spec.settings.family)
    tokenizer = tokenizers.load(tokenizer_folder(spec), 'tokenizer.path' if spec.tokenizer else spec.key)
    return tokenizer, tokenizers.add_tokens(tokenizer, spec.added) if spec.added else ()


def _adapters_tokenizer(spec: ModelSpec) -> str:
    """The folder with the tokenizer of the first adapter, '' if it has none: its own, or the `export/` beside it."""
    for folder in map(pathlib.Path, list(adapter_folders(spec).values())[:1]):
        for place in (folder, folder.parent / 'export'):
            if any((place / name).is_file() for name in TOKENIZER_FILES):
                return str(place)
    return ''


def config_of(spec: ModelSpec) -> Overridden:
    """The config fields of a model that is loaded, with what the base of its adapters had over them, and the recipe.

    Raises:
      UserError: one of them is wrong.
    """
    layers = overrides.of_adapters(adapter_folders(spec).values()), spec.overrides
    return overrides.read(model_folder(spec.path), layers, spec.settings.family)


def open_model(
    spec: ModelSpec, tokenizer: Any, own_head: bool = False, vocab_size: int = 0
) -> tuple[models.Model, str]:
    """A model without its parameters, and the folder they are in ('' from scratch).

    Args:
      spec: which model.
      tokenizer: its tokenizer; without one (None) a model from scratch must name its `vocab_size`.
      own_head: as for `models.build`.
      vocab_size: rows that it has in place of the folder's; 0 = as many.

    Raises:
      UserError: no model is named, the tokenizer does not fit, or a row is longer than the model's positions.
    """
    settings = spec.settings
    if spec.path:
        folder = model_folder(spec.path)
        fields = {**config_of(spec).fields, **({'vocab_size': vocab_size} if vocab_size else {})}
    else:
        folder, own = '', settings.config.to_dict()
        if not own:
            raise UserError(_NO_MODEL)
        # A multiple of 64 keeps the matrix units whole; no token ever has these last numbers.
        if tokenizer is not None:
            size = tokenizers.vocab_size(tokenizer) + _extra_vocab(spec, tokenizer)
            own.setdefault('vocab_size', -(-size // 64) * 64)
            for name in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
                own.setdefault(name, getattr(tokenizer, name))
            if kinds_of(spec).get(str(own.get('model_type'))) == 'encdec':
                own.setdefault('decoder_start_token_id', tokenizer.pad_token_id)  # as T5's own begin
        fields = models.read_config(own, settings.family)
    if tokenizer is not None:
        _check_vocab(spec, tokenizer, fields['vocab_size'])
    head, fields = head_of(spec, fields, folder)
    if head.get('head') == 'reward' and tokenizer is not None:
        padding = tokenizers.padding_id(tokenizer)
        fields = fields | {'pad_token_id': padding if padding is None or padding < fields['vocab_size'] else None}
    model = models.build(
        fields,
        param_dtype=settings.param_dtype,
        compute_dtype=settings.compute_dtype,
        remat=settings.remat,
        attention=settings.attention,
        matmul=settings.matmul,
        packed=spec.rows is None or spec.rows.data.packing,
        own_head=own_head,
        family=settings.family,
        **head,
    )
    _check_positions(spec, model)
    return model, folder


def announce_config(spec: ModelSpec) -> dict[str, Any]:
    """Says which config fields are others than the folder's; returns them."""
    if not spec.path:
        return {}
    config = config_of(spec)
    config.note()
    return config.changes


def _extra_vocab(spec: ModelSpec, tokenizer: Any) -> int:
    """How many ids beyond the tokenizer's the objective uses."""
    return spec.rows.extra_vocab(tokenizer) if spec.rows else 0


def _check_vocab(spec: ModelSpec, tokenizer: Any, vocab_size: int) -> None:
    tokenizers.check_vocab(tokenizer, vocab_size)
    extra, size = _extra_vocab(spec, tokenizer), tokenizers.vocab_size(tokenizer, below=vocab_size)
    if spec.rows and extra and vocab_size < size + extra:
        raise UserError(
            f'objective={spec.rows.objective.name}: needs {extra} tokens more than the tokenizer has; expected '
            f'vocab_size >= {size + extra}, not {vocab_size}, or a tokenizer with sentinels (<extra_id_0>, ...)'
        )


def _check_positions(spec: ModelSpec, model: models.Model) -> None:
    """Refuses rows that the model has no positions for."""
    if spec.rows is None:
        return
    method, settings = spec.method.method, spec.method.settings
    data, limit, taken = spec.rows.data, model.config.max_positions, method.virtual_tokens(settings)
    if limit and data.seq_len + taken > limit:
        less = f' less method.virtual_tokens={taken}' if taken else ''
        raise UserError(f"data.seq_len={data.seq_len}: expected at most the model's {limit} positions{less}")
    if not (taken and method.virtual_embeddings(settings) and data.packing):
        return
    if model.kind != 'decoder' and spec.rows.objective.head == 'lm':
        raise UserError('data.packing=True: an encoder reads its prompt with one text a row; expected False')
    if model.border is not None and data.seq_len + taken > model.border:
        raise UserError(
            f'data.packing=True: with LongRoPE a trained prompt has other angles before texts of over {model.border} '
            'tokens; expected False, or a shorter data.seq_len'
        )


def load_model(spec: ModelSpec, mesh: Mesh, *, weights: bool = True) -> ModelBundle:
    """Tokenizer, model and parameters, each parameter straight on its devices.

    Args:
      spec: which model, and for what.
      mesh: the mesh.
      weights: False reads of the weights' files only the headers; the parameters are `jax.ShapeDtypeStruct`s.

    Raises:
      UserError: whatever is wrong with the model or tokenizer that is named.
    """
    method, own = spec.method.method, _own(spec.method)
    method.check(spec.method.settings)
    tokenizer, added = open_with_added(spec)
    changes = announce_config(spec)
    stored, folder = open_model(spec, tokenizer)
    chosen = adapter_folders(spec)
    parted = peft.parts_table(chosen.values(), stored, own)
    own_head = bool(folder) and (parted or (weights and hf.has_own_head(folder, stored)))
    if own_head:
        stored, folder = open_model(spec, tokenizer, own_head=True)
    fresh = frozenset(hf.newly_initialized_paths(folder, stored)) if folder else frozenset()
    if folder and spec.trains and method.save_adapter is not None:
        _note_images(folder, stored)
    also = apply.also_trained(spec.method, stored) if spec.trains else frozenset()
    held = {name: peft.token_ids(adapter, own) for name, adapter in chosen.items()} or {'': set()}
    plans = {name: plan_tokens(spec, tokenizer, added, stored, tokens) for name, tokens in held.items()}
    model = with_new_tokens(spec, tokenizer, stored, plans.values(), own_head)
    new = plans.get('')
    vocabulary.note(tokenizer, stored.config.vocab_size, model.config.vocab_size, new)
    if new and spec.trains:
        _check_new_tokens(spec, tokenizer, stored, model, new, fresh | also)
    codecs = apply.codecs(spec.method, stored, fresh)
    shapes = jax.eval_shape(lambda params: apply.encoded(params, codecs), stored.shapes)
    specs = match_rules(shapes, mesh)
    placed = shardings(specs, mesh)
    rng = jax.random.key(spec.seed)
    if not weights:
        params = with_shardings(shapes, placed)
    elif folder:
        params, _ = hf.load(folder, stored, placed, rng=rng, codecs=codecs)
    else:
        # A plain array keeps initialisation independent of how the mesh divides it.
        params = jax.jit(lambda key: apply.encoded(stored.init(key), codecs), out_shardings=placed)(rng)
    base = params if chosen and spec.several and model is stored else None
    adapters, wholes = {}, []
    for name, adapter in chosen.items():
        init, arrays = peft.reader(adapter, model, own, stored.config.vocab_size)
        adapters[name] = _grown(spec, apply.attach(init, params, mesh, arrays), mesh, model, plans[name], fresh | also)
        wholes.append(frozenset(arrays.whole))
    brought = frozenset.intersection(*wholes) if wholes else frozenset()
    check_heads(spec, model, folder, fresh - brought)
    if adapters:
        params = next(iter(adapters.values()))
        apply.check_also_trained(params, model, also, spec.adapters)
    elif spec.trains:
        params = apply.attach(lambda params: _begin(spec, stored, params, fresh, tokenizer), params, mesh)
        if refine := method.refine(spec.method.settings):
            if not folder:
                init = spec.method.settings.init
                raise UserError(f'method.init={init}: expected model.path, a model whose weights were quantised')
            params = refine(params, hf.kernels(folder, stored)) if weights else params
    if not adapters:
        params = _grown(spec, params, mesh, model, plans[''], fresh | also)
    if spec.value_head:
        params = apply.attach(lambda params: value_head.with_value(params, model), params, mesh)
        fresh |= value_head.PATHS
    several = adapters if len(adapters) > 1 else {}
    ends = companions.end_ids(tokenizer, model, folder)
    return ModelBundle(model, params, specs, tokenizer, fresh, folder, several, base, ends, brought, changes, also)


def _note_images(folder: str, model: models.Model) -> None:
    """Says that an adapter does not fit a base which `transformers` opens with its vision tower, under other names."""
    model_type = folder_config(hub.resolve(folder)).get('model_type')
    if model_type != model.hf_config['model_type']:
        console.note(
            f'{folder}: PEFT puts no adapter of its language model into model_type={model_type}; expected the merged '
            'export there'
        )


def plan_tokens(
    spec: ModelSpec, tokenizer: Any, added: tuple[Added, ...], stored: models.Model, held: Iterable[int] = ()
) -> NewTokens | None:
    """The rows that begin anew, as `vocabulary.plan` says; None for a model from scratch, which counts them already.

    Raises:
      UserError: too few rows are asked for, or a token's number is far beyond the others.
    """
    if spec.path:
        return vocabulary.plan(tokenizer, added, stored.config.vocab_size, held, model_folder(spec.path))
    vocabulary.check_scratch(added, stored.config.vocab_size)
    return None


def with_new_tokens(
    spec: ModelSpec,
    tokenizer: Any,
    stored: models.Model,
    plans: Iterable[NewTokens | None],
    own_head: bool = False,
) -> models.Model:
    """The model with rows for the tokens of all plans: `stored` itself, where those that it has are enough."""
    size = max((plan.vocab_size for plan in plans if plan), default=0)
    if size <= stored.config.vocab_size:
        return stored
    return open_model(spec, tokenizer, own_head, size)[0]


def _begin(spec: ModelSpec, stored: models.Model, params: Any, fresh: frozenset[str], tokenizer: Any) -> Any:
    return apply.begin(spec.method, stored, params, fresh, tokenizer)


def _grown(
    spec: ModelSpec, params: Any, mesh: Mesh, model: models.Model, new: NewTokens | None, fresh: frozenset[str]
) -> Any:
    """The tree with rows for new tokens, if there are any."""
    if new is None:
        return params
    return apply.attach(lambda params: new_tokens.grow(params, model, new, spec.method, fresh), params, mesh)


def _check_new_tokens(
    spec: ModelSpec, tokenizer: Any, stored: models.Model, model: models.Model, new: NewTokens, fresh: frozenset[str]
) -> None:
    """Refuses new rows that could not train, before weights are read.

    Raises:
      UserError: the method freezes the model and holds no rows, or adapts a table that gets new ones.
    """
    new_tokens.check(spec.method)

    def begin(params: Any) -> Any:
        return new_tokens.grow(_begin(spec, stored, params, fresh, tokenizer), model, new, spec.method, fresh)

    jax.eval_shape(begin, stored.shapes)
