"""What llama.cpp has of a model: its architecture, hyper-parameters, and which tensor is which parameter.

As llama.cpp's own `convert_hf_to_gguf.py` has it; what llama.cpp computes in another way than the model was trained is
refused, or said where it only shows in long texts. A new family is a line in `ARCHITECTURES`.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxtune.common import console
from jaxtune.errors import UserError
from jaxtune.models import Model
from jaxtune.models.decoder_config import DecoderConfig
from jaxtune.models.model import leaf_paths
from jaxtune.models.rope import make_rope


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes models of a family.

    Attributes:
      name: of the `gguf` package's `MODEL_ARCH`.
      activation: the only one of its feed-forward layers.
      ropes: rotary scalings that it knows.
      biased: its linear layers may have biases.
      pairs_turn: neighbouring dimensions of a head turn together, not halves: rows of queries and keys are reordered.
      norm_offset: what it wants added to the scales of norms.
      tied: it has no projection to the vocabulary but the embedding.
      windows: the layers with a sliding window, of so many layers how many from the first; None = it has no windows.
      scaled: it computes attention with the model's own factor where that is not `head_dim ** -0.5`.
      conv: linear layers lie `[in, out]` in a Hugging Face folder.
    """

    name: str
    activation: str = 'silu'
    ropes: tuple[str, ...] = ('default', 'linear', 'yarn')
    biased: bool = False
    pairs_turn: bool = False
    norm_offset: float = 0.0
    tied: bool = False
    windows: tuple[int, int] | None = None
    scaled: Callable[[DecoderConfig], bool] = lambda config: False
    conv: bool = False


def _of_width(layers: int) -> Callable[[DecoderConfig], bool]:
    """The largest Gemma 2 and 3, by their number of layers: queries are scaled by the model's width over its heads."""
    return lambda config: (
        config.num_layers == layers and math.isclose(config.attention_scale**-2, config.d_model / config.num_heads)
    )


_GEMMA: dict[str, Any] = {'activation': 'gelu_pytorch_tanh', 'ropes': ('default',), 'norm_offset': 1.0, 'tied': True}
_GEMMA3: dict[str, Any] = _GEMMA | {'ropes': ('default', 'linear')}
_LLAMA = Architecture('LLAMA', ropes=('default', 'linear', 'yarn', 'llama3'), biased=True, pairs_turn=True)

ARCHITECTURES: Mapping[str, Architecture] = {
    'llama': _LLAMA,
    'mistral': _LLAMA,
    'qwen2': Architecture('QWEN2', biased=True),
    'qwen3': Architecture('QWEN3'),
    'qwen3_moe': Architecture('QWEN3MOE'),
    'gemma': Architecture('GEMMA', **_GEMMA),
    'gemma2': Architecture('GEMMA2', **_GEMMA, windows=(2, 1), scaled=_of_width(46)),
    'gemma3_text': Architecture('GEMMA3', **_GEMMA3, windows=(6, 5), scaled=_of_width(62)),
    'phi3': Architecture('PHI3', ropes=('default', 'longrope')),
    'gpt2': Architecture('GPT2', activation='gelu_new', ropes=(), biased=True, conv=True),
}

_KEY = 'export.format=gguf'
_SUFFIXES = ('.weight', '.bias')


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of a GGUF file.

    Attributes:
      name: in the file.
      leaf: path of the parameter that it is of.
      sources: tensors of a Hugging Face folder that it is made of, stacked where it is of experts.
      shape: of the tensor.
      heads: rows are those of so many heads, whose halves lie as pairs in the file; 0 = as they are.
      offset: added in the file.
      transposed: in the folder the matrix lies `[in, out]`.
    """

    name: str
    leaf: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    heads: int = 0
    offset: float = 0.0
    transposed: bool = False

    def from_folder(self, values: list[np.ndarray]) -> np.ndarray:
        """The tensor of those of a folder, in their dtype, or in float32 if something is added."""
        value = np.stack(values) if self.name.endswith('_exps.weight') else values[0]
        if self.heads:
            value = value.reshape(self.heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if self.offset:
            value = value.astype(np.float32) + np.float32(self.offset)
        return np.ascontiguousarray(value.T if self.transposed else value)

    def to_folder(self, value: np.ndarray) -> list[np.ndarray]:
        """What `from_folder` made the tensor of, in float32."""
        value = value.T if self.transposed else value
        if self.offset:
            value = value - np.float32(self.offset)
        if self.heads:
            value = value.reshape(self.heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        return list(value) if self.name.endswith('_exps.weight') else [value]


def architecture(model: Model) -> Architecture:
    """How llama.cpp computes this model.

    Raises:
      UserError: it does not.
    """
    model_type = model.hf_config['model_type']
    if model_type not in ARCHITECTURES:
        raise UserError(
            f'{_KEY}: no mapping for model_type={model_type}; expected one of {", ".join(ARCHITECTURES)}, or '
            'export.format=safetensors'
        )
    made = ARCHITECTURES[model_type]
    for name, expected in _differences(made, model):
        raise UserError(f'{_KEY}: model_type={model_type} with {name} is computed otherwise by llama.cpp: {expected}')
    return made


def _differences(made: Architecture, model: Model) -> Iterator[tuple[str, str]]:
    """What of a model llama.cpp does not have: its name and value, and what was expected."""
    config, fields = model.config, model.hf_config
    if config.activation != made.activation:
        yield f'activation {config.activation}', f'expected {made.activation}'
    for kind, parameters in _ropes(fields).items():
        known = made.ropes if kind != 'sliding_attention' else ('default',)
        rope_type = parameters.get('rope_type', 'default')
        if made.ropes and rope_type not in known:
            yield f'rope_type={rope_type}', f'expected one of {", ".join(known)} (model.config.rope_parameters)'
        if rope_type == 'yarn':
            factor = parameters.get('attention_factor')
            if parameters.get('truncate') is False or parameters.get('mscale') or parameters.get('mscale_all_dim'):
                yield 'YaRN of its own kind', 'expected neither truncate=False nor mscale'
            if factor is not None and not math.isclose(factor, 0.1 * math.log(parameters['factor']) + 1, rel_tol=1e-4):
                yield f'attention_factor={factor}', 'expected that of YaRN, 0.1 * log(factor) + 1'
    if any(config.head_dim != 2 * len(rope.frequencies) for rope in config.ropes if rope) and made.name != 'PHI3':
        yield 'heads that turn in part', 'expected whole heads'
    if not made.biased and any(path.endswith('/bias') for path in leaf_paths(model.shapes)):
        yield 'biases', 'expected none'
    if made.tied and not config.tied:
        yield 'tie_word_embeddings=False', 'expected True'
    if not math.isclose(config.attention_scale, config.head_dim**-0.5) and not made.scaled(config):
        yield f'attention scaled by {config.attention_scale:.4g}', f'expected {config.head_dim**-0.5:.4g}'
    if config.scale_by_layer:
        yield 'scale_attn_by_inverse_layer_idx=True', 'expected False'
    if config.experts and not (all(config.sparse) and config.experts.normalised):
        yield 'layers without experts, or norm_topk_prob=False', 'expected experts in every layer, normalised'
    if made.windows and any(config.windows):
        period, local = made.windows
        if any((window is not None) != (i % period < local) for i, window in enumerate(config.windows)):
            yield 'its layer_types', f'expected {local} of every {period} layers with sliding_attention'


def note_windows(model: Model) -> None:
    """Says that llama.cpp has no windows in an architecture whose models may have them."""
    windows = [window for window in model.config.windows if window is not None]
    if windows and not architecture(model).windows and min(windows) < model.config.max_positions:
        console.note(
            f'model.gguf: llama.cpp has no sliding windows in this architecture: beyond {min(windows):,} tokens, it '
            'attends to more than the model was trained with'
        )


def _ropes(fields: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Rotary parameters by layer type; those of all layers under `full_attention`."""
    parameters = fields.get('rope_parameters') or {}
    by_type = {name: value for name, value in parameters.items() if name in ('full_attention', 'sliding_attention')}
    return by_type or ({'full_attention': parameters} if parameters else {})


def parts(gguf: types.ModuleType, model: Model) -> list[Part]:
    """All tensors of the model in the file, layer by layer.

    Raises:
      UserError: a tensor has no place there.
    """
    made, config = architecture(model), model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[made.name], config.num_layers)
    heads = {'q_proj': config.num_heads, 'k_proj': config.num_kv_heads} if made.pairs_turn else {}
    shapes, found = leaf_paths(model.shapes), []
    for leaf, tensor in model.tensors.items():
        shape, sources = tensor.shape(shapes[leaf].shape), tensor.names(shapes[leaf].shape)
        module = leaf.split('/')[-2]
        experts = shapes[leaf].shape[1] if tensor.stacked > 1 else 0
        groups = [tuple(sources[i : i + experts]) for i in range(0, len(sources), experts)] if experts else []
        for group in groups or [(source,) for source in sources]:
            source = group[0].replace('.experts.0.', '.experts.') if experts else group[0]
            name = names.get_name(source, _SUFFIXES)
            if name is None:
                raise UserError(f'{_KEY}: {source} has no place in the architecture {made.name.lower()}')
            transposed = made.conv and len(shape) == 2 and '/layers/' in f'/{leaf}'
            part = Part(
                name,
                leaf,
                group,
                (*((experts,) if experts else ()), *(shape[::-1] if transposed else shape)),
                heads.get(module, 0),
                made.norm_offset if 'norm' in module else 0.0,
                transposed,
            )
            found.append(part)
    return sorted(found, key=lambda part: int(part.name.split('.')[1]) if part.name.startswith('blk.') else -1)


def made_tensors(model: Model) -> dict[str, np.ndarray]:
    """Tensors that are made of the config: factors that frequencies are divided by, of Llama 3.1 and LongRoPE."""
    parameters = _ropes(model.hf_config).get('full_attention', {})
    rope = next((rope for rope in model.config.ropes if rope is not None), None)
    if rope is None or parameters.get('rope_type') not in ('llama3', 'longrope'):
        return {}
    dim = 2 * len(rope.frequencies)
    plain = make_rope({'rope_type': 'default', 'rope_theta': parameters['rope_theta']}, dim, 1).frequencies
    if parameters['rope_type'] == 'llama3':
        return {'rope_freqs.weight': (np.asarray(plain) / np.asarray(rope.frequencies)).astype(np.float32)}
    return {
        f'rope_factors_{length}.weight': np.asarray(parameters[f'{length}_factor'], np.float32)
        for length in ('long', 'short')
    }


def add_hyper_parameters(gguf: types.ModuleType, writer: Any, model: Model) -> None:
    """Writes what llama.cpp builds the model from: sizes, norms, rotary frequencies, caps, windows, experts."""
    config, fields, made = model.config, model.hf_config, architecture(model)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    if made.conv:
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_kv_heads)
        writer.add_layer_norm_rms_eps(config.norm_epsilon)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if made.windows or made.name == 'PHI3':
        writer.add_sliding_window(next((window for window in config.windows if window), 0))
    if config.attention_softcap:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap:
        writer.add_final_logit_softcapping(config.logit_softcap)
    if config.experts:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.top_k)
        writer.add_expert_feed_forward_length(fields['moe_intermediate_size'])
    if config.ropes:
        _add_rope(gguf, writer, model)


def _add_rope(gguf: types.ModuleType, writer: Any, model: Model) -> None:
    config, ropes = model.config, _ropes(model.hf_config)
    parameters, rope = ropes['full_attention'], next(rope for rope in model.config.ropes if rope is not None)
    writer.add_rope_dimension_count(2 * len(rope.frequencies))
    writer.add_rope_freq_base(parameters['rope_theta'])
    if 'sliding_attention' in ropes:
        writer.add_rope_freq_base_swa(ropes['sliding_attention']['rope_theta'])
    kind = parameters.get('rope_type', 'default')
    if kind in ('linear', 'yarn'):
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        factor = parameters['factor'] or config.max_positions / parameters['original_max_position_embeddings']
        writer.add_rope_scaling_factor(factor)
    if kind == 'yarn':
        writer.add_rope_scaling_orig_ctx_len(parameters['original_max_position_embeddings'])
        writer.add_rope_scaling_yarn_beta_fast(parameters.get('beta_fast') or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(parameters.get('beta_slow') or 1.0)
    if kind == 'longrope':
        writer.add_rope_scaling_orig_ctx_len(rope.original_positions)
        writer.add_rope_scaling_attn_factors(rope.factor)
