"""Model families. Outside this room a model is `apply(params, batch) -> outputs`; Flax lives only in here."""

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp

from jaxtune.common.registry import Registry
from jaxtune.errors import UserError
from jaxtune.models.fields import Fields, read_fields, refuse_model_type
from jaxtune.models.model import Head, Model, Outputs

__all__ = ['FAMILIES', 'KINDS', 'Family', 'Head', 'Model', 'Outputs', 'build', 'families', 'read_config']

KINDS = ('decoder', 'encoder', 'encdec')

_HEAD_CLASSES = {
    'classification': 'ForSequenceClassification',
    'reward': 'ForSequenceClassification',
    'token_classification': 'ForTokenClassification',
}


@dataclasses.dataclass(frozen=True)
class Family:
    """How the models of one `model_type` are read, built and written.

    Attributes:
      model_type: what a folder's `config.json` says.
      kind: the module of this package that builds it: `decoder`, `encoder` or `encdec`.
      config: config fields -> the kind's normalised config (`DecoderConfig`, `EncoderConfig`, `EncDecConfig`); raises
        `fields.FieldError` where a value is impossible.
      architecture: the class of the language model in `transformers`, or what `config.json` is to say in its place.
      modules: module of the parameter tree -> module in a folder, `{}` standing for the layer's number; or a function
        of the normalised config that returns them. An encoder's `sequence_classifier` makes the logits of a row.
      base_prefix: what the tensor names of a folder of the model without its head leave out.
      transposed: kernels are stored `[out, in]` (`torch.nn.Linear`), not `[in, out]` (GPT-2's `Conv1D`).
      ignored: regular expressions of tensors in a folder that are no parameters.
      fields: every config field with its default, where `transformers` has no config class for the model type; None
        reads fields and defaults from that class.
      unlisted: fields that published folders have and the config class does not list.
      classes: head -> its class in `transformers`, where that is not named after `architecture`.
    """

    model_type: str
    kind: str
    config: Callable[[Fields], Any]
    architecture: str
    modules: Mapping[str, str] | Callable[[Any], Mapping[str, str]]
    base_prefix: str = 'model.'
    transposed: bool = True
    ignored: tuple[str, ...] = ()
    fields: Mapping[str, Any] | None = None
    unlisted: tuple[str, ...] = ()
    classes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f'kind={self.kind!r}: expected one of {", ".join(KINDS)}')

    def head_class(self, head: str) -> str:
        """The class in `transformers` of the model with a head, as `build` names heads."""
        if head == 'lm':
            return self.architecture
        if head in self.classes:
            return self.classes[head]
        base = re.sub('(ForCausalLM|LMHeadModel|ForMaskedLM|ForConditionalGeneration)$', '', self.architecture)
        return base + _HEAD_CLASSES[head]

    def module_names(self, config: Any) -> Mapping[str, str]:
        """Module of the parameter tree -> module in a folder, of a model with this normalised config."""
        return self.modules(config) if callable(self.modules) else self.modules


_DECODERS, _ENCODERS, _ENCDECS = (f'jaxtune.models.{kind}_families' for kind in KINDS)
_MIXTURES = 'jaxtune.models.moe_families'

# Hugging Face's model_type -> the family.
FAMILIES = Registry(
    'model.family',
    Family,
    {
        'llama': f'{_DECODERS}:LLAMA',
        'mistral': f'{_DECODERS}:MISTRAL',
        'ministral': f'{_DECODERS}:MINISTRAL',
        'ministral3': f'{_DECODERS}:MINISTRAL3',
        'qwen2': f'{_DECODERS}:QWEN2',
        'qwen3': f'{_DECODERS}:QWEN3',
        'gemma': f'{_DECODERS}:GEMMA',
        'gemma2': f'{_DECODERS}:GEMMA2',
        'gemma3_text': f'{_DECODERS}:GEMMA3',
        'phi3': f'{_DECODERS}:PHI3',
        'olmo2': f'{_DECODERS}:OLMO2',
        'olmo3': f'{_DECODERS}:OLMO3',
        'smollm3': f'{_DECODERS}:SMOLLM3',
        'granite': f'{_DECODERS}:GRANITE',
        'glm4': f'{_DECODERS}:GLM4',
        'cohere2': f'{_DECODERS}:COHERE2',
        'starcoder2': f'{_DECODERS}:STARCODER2',
        'exaone4': f'{_DECODERS}:EXAONE4',
        'gpt2': f'{_DECODERS}:GPT2',
        'mixtral': f'{_MIXTURES}:MIXTRAL',
        'qwen2_moe': f'{_MIXTURES}:QWEN2_MOE',
        'qwen3_moe': f'{_MIXTURES}:QWEN3_MOE',
        'olmoe': f'{_MIXTURES}:OLMOE',
        'gpt_oss': f'{_MIXTURES}:GPT_OSS',
        'granitemoe': f'{_MIXTURES}:GRANITEMOE',
        'deepseek_v3': f'{_MIXTURES}:DEEPSEEK_V3',
        't5': f'{_ENCDECS}:T5',
        'mt5': f'{_ENCDECS}:MT5',
        'umt5': f'{_ENCDECS}:UMT5',
        'bert': f'{_ENCODERS}:BERT',
        'roberta': f'{_ENCODERS}:ROBERTA',
        'xlm-roberta': f'{_ENCODERS}:XLM_ROBERTA',
        'camembert': f'{_ENCODERS}:CAMEMBERT',
        'distilbert': f'{_ENCODERS}:DISTILBERT',
        'modernbert': f'{_ENCODERS}:MODERNBERT',
    },
)


def families(own: str = '') -> dict[str, Family]:
    """Every family by its `model_type`.

    Args:
      own: a recipe's `model.family`: `module:NAME` of one that is not shipped; '' = none.

    Raises:
      UserError: there is no such family; names `model.family`.
    """
    known = {name: FAMILIES.get(name) for name in FAMILIES.names}
    if own:
        family = FAMILIES.get(own)
        known[family.model_type] = family
    return known


def read_config(source: str | Mapping[str, Any], family: str = '') -> dict[str, Any]:
    """Hugging Face config fields, with the defaults of the family's config class filled in.

    Args:
      source: a folder or hub id with `config.json`, or fields such as a recipe's `model.config`, which need no
        `model_type` where a family is named.
      family: a recipe's `model.family`, as for `families`.

    Raises:
      UserError: no such folder, an unknown `model_type` or key, or an impossible value; names
        `model.config.KEY` or the file's key.
    """
    if family and isinstance(source, Mapping):
        model_type = FAMILIES.get(family).model_type
        source = {'model_type': model_type, **source}
        if source['model_type'] != model_type:
            raise UserError(
                f'model.config.model_type={source["model_type"]!r}: expected {model_type!r}, that of '
                f'model.family={family}'
            )
    return read_fields(source, families(family), lambda family, fields: _module(family).check(fields, family))


def build(
    fields: Mapping[str, Any],
    *,
    param_dtype: str = 'float32',
    compute_dtype: str = 'float32',
    remat: str = 'none',
    attention: str = 'auto',
    matmul: str = '',
    packed: bool = True,
    head: str = 'lm',
    labels: int = 0,
    own_head: bool = False,
    family: str = '',
) -> Model:
    """The model of config fields as `read_config` gives them.

    Args:
      fields: Hugging Face config fields.
      param_dtype: `float32` or `bfloat16`, what kernels and embeddings are kept in; norms and biases are float32.
      compute_dtype: what activations and matrix products use; norms, rotary angles and softmax stay in float32.
      remat: as for `remat.rematerialised`.
      attention: `auto`, `xla` or `flash`.
      matmul: `fp8` or `int8`, what linear layers of attention and feed-forward multiply in; '' = `compute_dtype`. Not
        heads, the vocabulary, routers, experts, what a method adds, and T5's products that are in float32.
      packed: False promises that rows are one text each, and padding after it: cuDNN's attention can take those.
      head: what follows the last layer: `lm`, `classification` (of a whole row), `token_classification`, or a decoder's
        `reward` (one number a token).
      labels: classes that a classifier tells apart.
      own_head: the projection to the vocabulary is a parameter of its own, whatever the fields say; from a folder that
        lacks it, it begins as the embedding.
      family: a recipe's `model.family`, as for `families`.

    Raises:
      UserError: the family has no such head; names the key `objective`.
    """
    known = families(family)
    model_type = fields.get('model_type')
    chosen = known.get(model_type) if isinstance(model_type, str) else None
    if chosen is None:
        raise refuse_model_type('model.config.', model_type, known)
    dtypes = {'param_dtype': jnp.dtype(param_dtype), 'compute_dtype': jnp.dtype(compute_dtype)}
    added: dict[str, Any] = {'own_head': own_head}
    if head != 'lm':
        kind = 'decoder' if head == 'reward' else 'encoder'
        if chosen.kind != kind:
            raise UserError(
                f'objective: model_type={model_type!r} has no {head} head in this version; expected one of '
                + ', '.join(name for name, each in known.items() if each.kind == kind)
            )
        added |= {'head': head} if kind == 'decoder' else {'head': head, 'labels': labels}
    if chosen.kind != 'encdec':
        added['packed'] = packed
    return _module(chosen).build(fields, chosen, **dtypes, remat=remat, attention=attention, matmul=matmul, **added)


def _module(family: Family) -> ModuleType:
    return importlib.import_module(f'jaxtune.models.{family.kind}')
