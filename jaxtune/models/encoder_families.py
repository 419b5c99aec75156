"""The encoder families: Hugging Face's config fields to `EncoderConfig`, and where parameters lie in their folders.

A new family is a function and a `Family` here, and a line in `models.FAMILIES`.
"""

import dataclasses
from typing import Any

from jaxtune.models import Family
from jaxtune.models.fields import FieldError, Fields
from jaxtune.models.layers import ACTIVATIONS
from jaxtune.models.rope import Rope, make_rope

HEADS = ('lm', 'classification', 'token_classification')


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """An encoder, normalised over families.

    Attributes:
      d_ff: width of the feed-forward layer.
      max_positions: the longest row.
      windows: each layer's reach in tokens (a token sees those nearer than this, to both sides), or None.
      rope: rotary frequencies of layers without a window; None = learned positions.
      local_rope: those of layers with one.
      token_types: rows of the token-type embedding; 0 = none.
      position_offset: the first learned position.
      pre_norm: norms come before attention and feed-forward layer, and one at the end; the first layer's attention
        has none. Else they come after each is added to the residual.
      gated: the feed-forward layer is `down(act(gate(x)) * up(x))` with one kernel for both (GeGLU, arXiv:2002.05202).
      fused_qkv: one kernel makes queries, keys and values, in that order.
      linear_bias, mlp_bias, norm_bias, decoder_bias, head_bias: which layers have biases: attention's, the feed-forward
        layer's, the norms, the logits, the dense layer in the head.
      lm_activation: in the masked language model's head; pooler_activation: in the classifier's.
      pooler_norm: the classifier's dense layer is followed by a norm.
      token_pooler: the token classifier has that dense layer too.
      pooling: what a sequence is classified by, the first token (`cls`) or the mean.
      initializer_range: standard deviation, cut off at `cutoff` of them; `residual_init_scale` multiplies it for
        kernels that write to the residual and for the dense layer of a head.
      classifier_range: standard deviation of the classifier's kernel.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    head_dim: int
    d_ff: int
    max_positions: int
    windows: tuple[int | None, ...]
    tied: bool
    activation: str
    norm_epsilon: float
    initializer_range: float
    classifier_range: float
    lm_activation: str
    pooler_activation: str
    rope: Rope | None = None
    local_rope: Rope | None = None
    token_types: int = 0
    position_offset: int = 0
    pre_norm: bool = False
    gated: bool = False
    fused_qkv: bool = False
    linear_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    decoder_bias: bool = True
    head_bias: bool = True
    pooler_norm: bool = False
    token_pooler: bool = False
    pooling: str = 'cls'
    cutoff: float | None = None
    residual_init_scale: float = 1.0

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The rotary frequencies of both kinds of layers."""
        return self.rope, self.local_rope


# Heads that a folder may hold and a run may not want, and buffers of older versions.
IGNORED = (
    r'^(cls|lm_head|classifier|pre_classifier|vocab_transform|vocab_layer_norm|vocab_projector|head|decoder)\.',
    r'^(qa_outputs|score)\.',
    r'^(\w+\.)?pooler\.',
    r'(^|\.)(position_ids|inv_freq)$',
)


def _bert_like(fields: Fields, **differences: Any) -> EncoderConfig:
    for name in ('is_decoder', 'add_cross_attention'):
        if fields.get(name):
            raise FieldError(name, 'expected False: this model is trained as an encoder')
    if fields.get('position_embedding_type', 'absolute') != 'absolute':
        raise FieldError('position_embedding_type', 'expected absolute')
    heads, d_model = fields['num_attention_heads'], fields['hidden_size']
    values = {
        'vocab_size': fields['vocab_size'],
        'd_model': d_model,
        'num_layers': fields['num_hidden_layers'],
        'num_heads': heads,
        'head_dim': d_model // heads,
        'd_ff': fields['intermediate_size'],
        'max_positions': fields['max_position_embeddings'],
        'windows': (None,) * fields['num_hidden_layers'],
        'tied': bool(fields['tie_word_embeddings']),
        'activation': fields['hidden_act'],
        'norm_epsilon': fields['layer_norm_eps'],
        'initializer_range': fields['initializer_range'],
        'classifier_range': fields['initializer_range'],
        'lm_activation': fields['hidden_act'],
        'pooler_activation': 'tanh',
        'token_types': fields['type_vocab_size'],
    }
    return EncoderConfig(**values | differences)


def bert(fields: Fields) -> EncoderConfig:
    """BERT (Devlin et al. 2018, arXiv:1810.04805). Its dropout is not applied."""
    return _bert_like(fields)


def roberta(fields: Fields) -> EncoderConfig:
    """RoBERTa (Liu et al. 2019, arXiv:1907.11692): positions begin after the padding's number.

    XLM-R (Conneau et al. 2019, arXiv:1911.02116) and CamemBERT (Martin et al. 2019, arXiv:1911.03894) too.
    """
    offset = fields['pad_token_id'] + 1
    if fields['max_position_embeddings'] <= offset:
        raise FieldError('max_position_embeddings', f'expected more than pad_token_id + 1 = {offset}')
    return _bert_like(
        fields,
        position_offset=offset,
        max_positions=fields['max_position_embeddings'] - offset,
        lm_activation='gelu',
    )


def distilbert(fields: Fields) -> EncoderConfig:
    """DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT without token types and pooler."""
    if fields['sinusoidal_pos_embds']:
        raise FieldError('sinusoidal_pos_embds', 'expected False: positions are learned here')
    names = {
        'hidden_size': 'dim',
        'num_attention_heads': 'n_heads',
        'num_hidden_layers': 'n_layers',
        'intermediate_size': 'hidden_dim',
        'hidden_act': 'activation',
    }
    same = {name: fields[theirs] for name, theirs in names.items()}
    return _bert_like({**fields, **same, 'layer_norm_eps': 1e-12, 'type_vocab_size': 0}, pooler_activation='relu')


def modernbert(fields: Fields) -> EncoderConfig:
    """ModernBERT (Warner et al. 2024, arXiv:2412.13663): rotary positions, local layers between global ones, GeGLU."""
    layers, head_dim = fields['num_hidden_layers'], fields['hidden_size'] // fields['num_attention_heads']
    kinds, known = fields['layer_types'], ('full_attention', 'sliding_attention')
    if len(kinds) != layers or not set(kinds) <= set(known):
        raise FieldError('layer_types', f'expected {layers} names, each {" or ".join(known)}')
    if head_dim % 2:
        raise FieldError('num_attention_heads', f'expected an even width of a head, got {head_dim}')

    def rope(kind: str) -> Rope:
        try:
            return make_rope(fields['rope_parameters'][kind], head_dim, fields['max_position_embeddings'])
        except ValueError as error:
            raise FieldError('rope_parameters', f'{kind}: {error}') from None

    same = {'hidden_act': fields['hidden_activation'], 'layer_norm_eps': fields['norm_eps'], 'type_vocab_size': 0}
    reach = fields['local_attention'] // 2 + 1
    return _bert_like(
        {**fields, **same},
        windows=tuple(reach if kind == 'sliding_attention' else None for kind in kinds),
        rope=rope('full_attention'),
        local_rope=rope('sliding_attention'),
        pre_norm=True,
        gated=True,
        fused_qkv=True,
        linear_bias=bool(fields['attention_bias']),
        mlp_bias=bool(fields['mlp_bias']),
        norm_bias=bool(fields['norm_bias']),
        decoder_bias=bool(fields['decoder_bias']),
        head_bias=bool(fields['classifier_bias']),
        lm_activation=fields['classifier_activation'],
        pooler_activation=fields['classifier_activation'],
        pooler_norm=True,
        token_pooler=True,
        pooling=fields['classifier_pooling'],
        cutoff=fields['initializer_cutoff_factor'] or 3.0,
        residual_init_scale=(2 * layers) ** -0.5,
        classifier_range=fields['hidden_size'] ** -0.5,
    )


def _bert_modules(base: str) -> dict[str, str]:
    layer = f'{base}.encoder.layer.{{}}'
    return {
        'embed_tokens': f'{base}.embeddings.word_embeddings',
        'embed_positions': f'{base}.embeddings.position_embeddings',
        'embed_types': f'{base}.embeddings.token_type_embeddings',
        'embed_norm': f'{base}.embeddings.LayerNorm',
        'layers/self_attn/q_proj': f'{layer}.attention.self.query',
        'layers/self_attn/k_proj': f'{layer}.attention.self.key',
        'layers/self_attn/v_proj': f'{layer}.attention.self.value',
        'layers/self_attn/o_proj': f'{layer}.attention.output.dense',
        'layers/attention_norm': f'{layer}.attention.output.LayerNorm',
        'layers/mlp/up_proj': f'{layer}.intermediate.dense',
        'layers/mlp/down_proj': f'{layer}.output.dense',
        'layers/mlp_norm': f'{layer}.output.LayerNorm',
    }


_BERT_MODULES = _bert_modules('bert') | {
    'lm_head/transform': 'cls.predictions.transform.dense',
    'lm_head/norm': 'cls.predictions.transform.LayerNorm',
    'lm_head': 'cls.predictions',
    'lm_head/decoder': 'cls.predictions.decoder',
    'pooler/dense': 'bert.pooler.dense',
}

_ROBERTA_MODULES = _bert_modules('roberta') | {
    'lm_head/transform': 'lm_head.dense',
    'lm_head/norm': 'lm_head.layer_norm',
    'lm_head': 'lm_head',
    'lm_head/decoder': 'lm_head.decoder',
    'pooler/dense': 'classifier.dense',
    'sequence_classifier': 'classifier.out_proj',
}

_DISTILBERT_MODULES = {
    'embed_tokens': 'distilbert.embeddings.word_embeddings',
    'embed_positions': 'distilbert.embeddings.position_embeddings',
    'embed_norm': 'distilbert.embeddings.LayerNorm',
    'layers/self_attn/q_proj': 'distilbert.transformer.layer.{}.attention.q_lin',
    'layers/self_attn/k_proj': 'distilbert.transformer.layer.{}.attention.k_lin',
    'layers/self_attn/v_proj': 'distilbert.transformer.layer.{}.attention.v_lin',
    'layers/self_attn/o_proj': 'distilbert.transformer.layer.{}.attention.out_lin',
    'layers/attention_norm': 'distilbert.transformer.layer.{}.sa_layer_norm',
    'layers/mlp/up_proj': 'distilbert.transformer.layer.{}.ffn.lin1',
    'layers/mlp/down_proj': 'distilbert.transformer.layer.{}.ffn.lin2',
    'layers/mlp_norm': 'distilbert.transformer.layer.{}.output_layer_norm',
    'lm_head/transform': 'vocab_transform',
    'lm_head/norm': 'vocab_layer_norm',
    'lm_head': 'vocab_projector',
    'lm_head/decoder': 'vocab_projector',
    'pooler/dense': 'pre_classifier',
}

_MODERNBERT_MODULES = {
    'embed_tokens': 'model.embeddings.tok_embeddings',
    'embed_norm': 'model.embeddings.norm',
    'layers/attention_norm': 'model.layers.{}.attn_norm',
    'layers/self_attn/qkv_proj': 'model.layers.{}.attn.Wqkv',
    'layers/self_attn/o_proj': 'model.layers.{}.attn.Wo',
    'layers/mlp_norm': 'model.layers.{}.mlp_norm',
    'layers/mlp/gate_up_proj': 'model.layers.{}.mlp.Wi',
    'layers/mlp/down_proj': 'model.layers.{}.mlp.Wo',
    'norm': 'model.final_norm',
    'lm_head/transform': 'head.dense',
    'lm_head/norm': 'head.norm',
    'lm_head': 'decoder',
    'lm_head/decoder': 'decoder',
    'pooler/dense': 'head.dense',
    'pooler/norm': 'head.norm',
}

BERT = Family('bert', 'encoder', bert, 'BertForMaskedLM', _BERT_MODULES, 'bert.')
ROBERTA = Family('roberta', 'encoder', roberta, 'RobertaForMaskedLM', _ROBERTA_MODULES, 'roberta.')
XLM_ROBERTA = Family('xlm-roberta', 'encoder', roberta, 'XLMRobertaForMaskedLM', _ROBERTA_MODULES, 'roberta.')
CAMEMBERT = Family('camembert', 'encoder', roberta, 'CamembertForMaskedLM', _ROBERTA_MODULES, 'roberta.')
DISTILBERT = Family('distilbert', 'encoder', distilbert, 'DistilBertForMaskedLM', _DISTILBERT_MODULES, 'distilbert.')
MODERNBERT = Family('modernbert', 'encoder', modernbert, 'ModernBertForMaskedLM', _MODERNBERT_MODULES)


def encoder_config(fields: Fields, family: Family) -> EncoderConfig:
    """The normalised config of Hugging Face fields.

    Raises:
      FieldError: a field's value is impossible here.
    """
    config = family.config(fields)
    if config.d_model % config.num_heads:
        name = 'num_attention_heads' if 'num_attention_heads' in fields else 'n_heads'
        raise FieldError(name, f'expected a divisor of the width {config.d_model}')
    if config.activation not in ACTIVATIONS:
        name = next(name for name in ('hidden_act', 'hidden_activation', 'activation') if name in fields)
        raise FieldError(name, f'expected one of {", ".join(ACTIVATIONS)}')
    if config.lm_activation not in ACTIVATIONS:
        raise FieldError('classifier_activation', f'expected one of {", ".join(ACTIVATIONS)}')
    if config.num_layers < 1:
        raise FieldError('num_hidden_layers', 'expected at least 1')
    return config
