"""A decoder's config, normalised over families, and what families that are like Llama share."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtune.common.checks import ExpectedError, number
from jaxtune.models import Family
from jaxtune.models.fields import FieldError, Fields
from jaxtune.models.layers import ACTIVATIONS
from jaxtune.models.rope import Rope, make_rope
from jaxtune.models.routing import Experts


@dataclasses.dataclass(frozen=True)
class Latent:
    """Attention whose keys and values come out of a narrow vector a token (DeepSeek-V2, arXiv:2405.04434).

    Attributes:
      q_rank: width of the vector that queries come out of; None = they come from the token itself.
      kv_rank: width of that of keys and values.
      rotary_dim: of each head, dimensions that turn, whose keys all heads share.
      value_dim: of each head's values.
    """

    q_rank: int | None
    kv_rank: int
    rotary_dim: int
    value_dim: int


class Stack(NamedTuple):
    """Layers of one kind, whose parameters are stacked under one name: those with experts, or those without."""

    name: str
    sparse: bool
    numbers: tuple[int, ...]


class Run(NamedTuple):
    """Layers of one kind that follow one another: `start` is the first one's place in the stack of that name."""

    name: str
    sparse: bool
    start: int
    numbers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder, normalised over families.

    Attributes:
      d_ff: width of the feed-forward layer.
      max_positions: the longest row.
      windows: each layer's sliding window in tokens, or None.
      ropes: each layer's rotary frequencies, None for a layer without positions; () = learned positions.
      rope_interleaved: what turns together are neighbouring dimensions, not halves (GPT-J, GLM, Cohere).
      norm: `rms` or `layer`; `norm_offset` is added to an RMS norm's stored scale, `norm_bias` says whether layer norms
        have one.
      norm_names: the block's norms before attention, after it, before the feed-forward layer, after it; None = none.
      parallel: attention and feed-forward layer read the same norm, and both are added to the residual (GPT-J).
      gated: the feed-forward layer is `down(act(gate(x)) * up(x))`, not `down(act(up(x)))`.
      fused_qkv: one kernel makes queries, keys and values, in that order; `fused_gate_up` likewise.
      qk_norm: `head` norms each head's queries and keys (Qwen 3), `all` norms them over all heads (OLMo 2), or None.
      embed_scale: factor on embeddings of tokens; None = 1. `input_scale`: on all that enters, a trained prompt too.
      residual_scale: factor on what is added to the residual; None = 1. `logit_scale`: on the logits.
      query_growth: `(beta, positions)`: the query at position p is multiplied by `1 + beta * log(1 + p // positions)`
        (Llama 4); None = off.
      attention_scale: factor on scores; `scale_by_layer` divides it by the layer's number from 1 too.
      attention_softcap, logit_softcap: `cap * tanh(x / cap)`, or None.
      experts: mixtures of experts in place of feed-forward layers, or None.
      latent: attention through a narrow vector; `head_dim` is then that of queries and keys; or None.
      sinks: each head has a score of its own that takes part in the softmax, and adds nothing (gpt-oss).
      qkv_clip: bound on queries, keys and values, or None (OLMoE).
      initializer_range: standard deviation, cut off at `cutoff` of them (None = nowhere); `residual_init_scale`
        multiplies it for kernels that write to the residual.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_positions: int
    windows: tuple[int | None, ...]
    ropes: tuple[Rope | None, ...]
    tied: bool
    activation: str
    norm_epsilon: float
    initializer_range: float
    attention_scale: float
    rope_interleaved: bool = False
    norm: str = 'rms'
    norm_offset: float = 0.0
    norm_bias: bool = True
    norm_names: tuple[str | None, ...] = ('input_layernorm', None, 'post_attention_layernorm', None)
    parallel: bool = False
    gated: bool = True
    fused_qkv: bool = False
    fused_gate_up: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    embed_scale: float | None = None
    input_scale: float | None = None
    residual_scale: float | None = None
    logit_scale: float = 1.0
    query_growth: tuple[float, int] | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    scale_by_layer: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    sinks: bool = False
    qkv_clip: float | None = None
    residual_init_scale: float = 1.0
    cutoff: float | None = None

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def sparse(self) -> tuple[bool, ...]:
        """Which layers have experts."""
        return self.experts.sparse if self.experts else (False,) * self.num_layers

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """All layers under `layers`, or those without experts under a name of their own."""
        kinds = {kind: tuple(i for i, sparse in enumerate(self.sparse) if sparse is kind) for kind in (False, True)}
        if kinds[True] and kinds[False]:
            return Stack('dense_layers', False, kinds[False]), Stack('layers', True, kinds[True])
        return (Stack('layers', bool(kinds[True]), kinds[True] or kinds[False]),)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The layers in their order, cut where their kind changes."""
        runs, seen = [], {stack.sparse: 0 for stack in self.stacks}
        names = {stack.sparse: stack.name for stack in self.stacks}
        for sparse, group in itertools.groupby(range(self.num_layers), lambda i: self.sparse[i]):
            numbers = tuple(group)
            runs.append(Run(names[sparse], sparse, seen[sparse], numbers))
            seen[sparse] += len(numbers)
        return tuple(runs)


# Heads that a folder may hold and a run may not want, and buffers of older versions.
IGNORED = (r'^(language_model\.)?(lm_head|score)\.', r'rotary_emb\.inv_freq$')


def rope_of(fields: Fields, rotary_dim: int) -> Rope:
    """Frequencies of the config's `rope_parameters`, for the first `rotary_dim` dimensions of a head."""
    try:
        return make_rope(fields['rope_parameters'], rotary_dim, fields['max_position_embeddings'])
    except ValueError as error:
        raise FieldError('rope_parameters', str(error)) from None


def head_dim_of(fields: Fields) -> int:
    """The width of a head."""
    return fields.get('head_dim') or fields['hidden_size'] // fields['num_attention_heads']


def whole_rope(fields: Fields) -> Rope:
    """Frequencies of a family that turns whole heads."""
    parameters = fields['rope_parameters']
    is_scaled = parameters.get('rope_type', 'default') not in ('default', 'proportional')
    # Where nothing is scaled `transformers` turns the whole head of these families, whatever the share.
    if is_scaled and (parameters.get('partial_rotary_factor') or 1.0) != 1.0:
        raise FieldError('rope_parameters', 'expected no partial_rotary_factor: this family turns whole heads')
    return rope_of(fields, head_dim_of(fields))


def partial_rope(fields: Fields) -> Rope:
    """Frequencies of a family that turns the `partial_rotary_factor` of each head."""
    parameters, head_dim = fields['rope_parameters'], head_dim_of(fields)
    if parameters.get('rope_type') == 'proportional':  # whose others have the frequency 0
        return rope_of(fields, head_dim)
    try:
        return rope_of(fields, int(head_dim * number(above=0, high=1)(parameters.get('partial_rotary_factor', 1.0))))
    except ExpectedError as error:
        raise FieldError('rope_parameters', f'partial_rotary_factor: expected {error}') from None


def ropes_by_type(fields: Fields) -> tuple[Rope, ...]:
    """Every layer's frequencies, of a family whose `rope_parameters` are told by the names in `layer_types`."""
    made = {}
    for kind in dict.fromkeys(fields['layer_types']):
        parameters = fields['rope_parameters'].get(kind)
        if not isinstance(parameters, Mapping):
            raise FieldError('rope_parameters', f'expected those of {kind}, too')
        # `transformers` looks for `truncate` beside the names, and there is none.
        parameters = {name: value for name, value in parameters.items() if name != 'truncate'}
        try:
            made[kind] = whole_rope({**fields, 'rope_parameters': parameters})
        except FieldError as error:
            raise FieldError(error.name, f'{kind}: {error.expected}') from None
    return tuple(made[kind] for kind in fields['layer_types'])


def windows_of(fields: Fields) -> tuple[int | None, ...]:
    """Every layer's window: by `layer_types` where a family has them, else the same everywhere."""
    layers, window = fields['num_hidden_layers'], fields.get('sliding_window')
    kinds = fields.get('layer_types') or ['sliding_attention'] * layers
    known = ('full_attention', 'sliding_attention')
    if len(kinds) != layers or not set(kinds) <= set(known):
        raise FieldError('layer_types', f'expected {layers} names, each {" or ".join(known)}')
    return tuple(window if kind == 'sliding_attention' else None for kind in kinds)


def llama_like(fields: Fields, **differences: Any) -> DecoderConfig:
    """The config of a family that is like Llama but for some differences.

    A field that `transformers` reads in some families only is theirs to name: a folder may hold any, and where the
    family's own class does not know it, it means nothing.

    Args:
      fields: config fields by the names that `LlamaConfig` has.
      differences: fields of `DecoderConfig`; `rope` stands for the same frequencies in all layers.

    Raises:
      FieldError: a field's value is impossible.
    """
    heads = fields['num_attention_heads']
    head_dim = head_dim_of(fields)
    values = {
        'vocab_size': fields['vocab_size'],
        'd_model': fields['hidden_size'],
        'num_layers': fields['num_hidden_layers'],
        'num_heads': heads,
        'num_kv_heads': fields['num_key_value_heads'],
        'head_dim': head_dim,
        'd_ff': fields['intermediate_size'],
        'max_positions': fields['max_position_embeddings'],
        'windows': (None,) * fields['num_hidden_layers'],
        'tied': bool(fields['tie_word_embeddings']),
        'activation': fields['hidden_act'],
        'norm_epsilon': fields['rms_norm_eps'],
        'initializer_range': fields['initializer_range'],
        'attention_scale': head_dim**-0.5,
        **differences,
    }
    if 'ropes' not in values:
        rope = values.pop('rope') if 'rope' in values else whole_rope(fields)
        values['ropes'] = (rope,) * values['num_layers']
    return DecoderConfig(**values)


def attention_bias(fields: Fields) -> dict[str, bool]:
    """Biases of all four projections, as the field `attention_bias` says."""
    return dict.fromkeys(('qkv_bias', 'o_bias'), bool(fields['attention_bias']))


LLAMA_MODULES = {'embed_tokens': 'model.embed_tokens', 'norm': 'model.norm', 'lm_head': 'lm_head'} | {
    f'layers/{part}/{name}': f'model.layers.{{}}.{part}.{name}'
    for part, names in {
        'self_attn': ('q_proj', 'k_proj', 'v_proj', 'qkv_proj', 'o_proj', 'q_norm', 'k_norm'),
        'mlp': ('gate_proj', 'up_proj', 'gate_up_proj', 'down_proj'),
    }.items()
    for name in names
} | {
    f'layers/{name}': f'model.layers.{{}}.{name}'
    for name in (
        'input_layernorm',
        'post_attention_layernorm',
        'pre_feedforward_layernorm',
        'post_feedforward_layernorm',
        'post_self_attn_layernorm',
        'post_mlp_layernorm',
    )
}  # fmt: skip


def decoder_config(fields: Fields, family: Family) -> DecoderConfig:
    """The normalised config of Hugging Face fields.

    Raises:
      FieldError: a field's value is impossible here.
    """
    for width, heads in (('hidden_size', 'num_attention_heads'), ('n_embd', 'n_head')):
        if width in fields and fields[width] < fields[heads]:
            raise FieldError(heads, f'expected at most {width}={fields[width]}')
    config = family.config(fields)
    if config.num_heads % config.num_kv_heads:
        raise FieldError('num_key_value_heads', f'expected a divisor of num_attention_heads={config.num_heads}')
    if config.activation not in ACTIVATIONS:
        name = next(name for name in ('hidden_activation', 'activation_function', 'hidden_act') if name in fields)
        raise FieldError(name, f'expected one of {", ".join(ACTIVATIONS)}')
    ropes = [rope for rope in config.ropes if rope is not None]
    if ropes and config.head_dim % 2:
        raise FieldError('head_dim', f'expected an even number, got {config.head_dim}')
    if len({rope.original_positions for rope in ropes if rope.long_frequencies is not None}) > 1:
        raise FieldError('rope_parameters', 'expected one original_max_position_embeddings for all kinds of layers')
    if any(window is not None and window < 1 for window in config.windows):
        raise FieldError('sliding_window', 'expected at least 1, or None')
    if config.num_layers < 1:
        raise FieldError('num_hidden_layers', 'expected at least 1')
    return config
