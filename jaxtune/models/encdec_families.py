"""The encoder-decoder families: Hugging Face's config fields to `EncDecConfig`, and where parameters lie in folders.

A new family is a function and a `Family` here, and a line in `models.FAMILIES`.
"""

import dataclasses

from jaxtune.models import Family
from jaxtune.models.fields import FieldError, Fields
from jaxtune.models.layers import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class EncDecConfig:
    """An encoder-decoder, normalised over families.

    Attributes:
      num_layers: of the encoder; `num_decoder_layers` of the decoder.
      d_ff: width of the feed-forward layers.
      activation: theirs; `gated`: they are `down(act(gate(x)) * up(x))`, not `down(act(up(x)))`.
      tied: the projection to the vocabulary is the embedding.
      logit_scale: factor on the logits.
      buckets: learned biases a head for relative positions; beyond `max_distance` all share the last one.
      bias_per_layer: every layer has its own biases; else the stack shares the first one's.
      initializer_factor: multiplies the standard deviation of every parameter.
      start_id: the token that the decoder begins with.
      max_positions: 0, no longest row: positions are relative.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    d_ff: int
    activation: str
    gated: bool
    tied: bool
    logit_scale: float
    buckets: int
    max_distance: int
    bias_per_layer: bool
    norm_epsilon: float
    initializer_factor: float
    start_id: int
    max_positions: int = 0


def _t5_like(fields: Fields, *, tied: bool, scaled: bool, bias_per_layer: bool = False) -> EncDecConfig:
    start = fields.get('decoder_start_token_id')
    if start is None:
        start = fields.get('pad_token_id')
    if not isinstance(start, int):
        raise FieldError('decoder_start_token_id', 'expected one token id')
    return EncDecConfig(
        vocab_size=fields['vocab_size'],
        d_model=fields['d_model'],
        num_layers=fields['num_layers'],
        num_decoder_layers=fields['num_decoder_layers'],
        num_heads=fields['num_heads'],
        head_dim=fields['d_kv'],
        d_ff=fields['d_ff'],
        activation=fields['dense_act_fn'],
        gated=bool(fields['is_gated_act']),
        tied=tied,
        logit_scale=fields['d_model'] ** -0.5 if scaled else 1.0,
        buckets=fields['relative_attention_num_buckets'],
        max_distance=fields['relative_attention_max_distance'],
        bias_per_layer=bias_per_layer,
        norm_epsilon=fields['layer_norm_epsilon'],
        initializer_factor=float(fields['initializer_factor']),
        start_id=start,
    )


def t5(fields: Fields) -> EncDecConfig:
    """T5 (Raffel et al. 2020, arXiv:1910.10683) and its version 1.1, FLAN's too (Shazeer 2020, arXiv:2002.05202).

    The first version ties its head to the embedding and scales what it gives; 1.1 (`tie_word_embeddings` false, which
    `transformers` 5 remembers as `scale_decoder_outputs` alone) does neither. Its dropout is not applied.
    """
    scaled = bool(fields['scale_decoder_outputs'])
    return _t5_like(fields, tied=scaled, scaled=scaled)


def mt5(fields: Fields) -> EncDecConfig:
    """mT5 (Xue et al. 2021, arXiv:2010.11934): T5 1.1, always with a head of its own."""
    return _t5_like(fields, tied=False, scaled=False)


def umt5(fields: Fields) -> EncDecConfig:
    """umT5 (Chung et al. 2023, arXiv:2304.09151): T5 1.1 with relative biases of its own in every layer."""
    scaled = bool(fields['scale_decoder_outputs'])
    return _t5_like(fields, tied=scaled, scaled=scaled, bias_per_layer=True)


def modules(config: EncDecConfig) -> dict[str, str]:
    """Module of the parameter tree -> Hugging Face module, `{}` standing for the layer's number."""
    names = {'shared': 'shared', 'lm_head': 'lm_head'}
    for stack, parts in {
        'encoder': (('self_attn', 'SelfAttention'), ('mlp', 'DenseReluDense')),
        'decoder': (('self_attn', 'SelfAttention'), ('cross_attn', 'EncDecAttention'), ('mlp', 'DenseReluDense')),
    }.items():
        names[f'{stack}/norm'] = f'{stack}.final_layer_norm'
        bias = 'layer.0.SelfAttention.relative_attention_bias'
        names[f'{stack}/relative_bias'] = f'{stack}.block.0.{bias}'
        names[f'{stack}/layers/relative_bias'] = f'{stack}.block.{{}}.{bias}'
        for number, (part, theirs) in enumerate(parts):
            place = f'{stack}.block.{{}}.layer.{number}'
            names[f'{stack}/layers/{part}_norm'] = f'{place}.layer_norm'
            if part == 'mlp':
                kernels = {'gate_proj': 'wi_0', 'up_proj': 'wi_1' if config.gated else 'wi', 'down_proj': 'wo'}
            else:
                kernels = {f'{kernel}_proj': kernel for kernel in 'qkvo'}
            for ours, kernel in kernels.items():
                names[f'{stack}/layers/{part}/{ours}'] = f'{place}.{theirs}.{kernel}'
    return names


T5 = Family('t5', 'encdec', t5, 'T5ForConditionalGeneration', modules)
MT5 = Family('mt5', 'encdec', mt5, 'MT5ForConditionalGeneration', modules)
UMT5 = Family('umt5', 'encdec', umt5, 'UMT5ForConditionalGeneration', modules)


def encdec_config(fields: Fields, family: Family) -> EncDecConfig:
    """The normalised config of Hugging Face fields.

    Raises:
      FieldError: a field's value is impossible here.
    """
    config = family.config(fields)
    if config.activation not in ACTIVATIONS:
        known = ', '.join(ACTIVATIONS)
        raise FieldError('feed_forward_proj', f'expected ACTIVATION or gated-ACTIVATION, with one of {known}')
    if config.num_layers < 1 or config.num_decoder_layers < 1:
        raise FieldError('num_layers', 'expected at least 1')
    if config.buckets < 4 or config.buckets % 4:
        raise FieldError('relative_attention_num_buckets', 'expected a multiple of 4')
    if config.max_distance <= config.buckets // 2:
        raise FieldError('relative_attention_max_distance', f'expected more than {config.buckets // 2}')
    return config
