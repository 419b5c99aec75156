"""Prompt tuning: tokens before the text train, all else is frozen.

As embeddings (Lester et al. 2021, arXiv:2104.08691), or with `method.prefix` as keys and values in every layer (Li and
Liang 2021, arXiv:2101.00190). They begin as a text (`method.init_text`), or as tokens drawn from the vocabulary.
"""

import pathlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.errors import UserError
from jaxtune.methods import AdapterArrays, Attach, Method, peft
from jaxtune.models.model import Model, leaf_paths
from jaxtune.models.safetensors import Entry
from jaxtune.weights import lookup
from jaxtune.weights.tree import nested

PREFIX = 'JAXTUNE_PREFIX'  # the kind of adapter that PEFT does not have: prefixes of encoders
_STDDEV = 2e-2


def init(params: Any, model: Model, settings: Settings, rng: jax.Array, tokenizer: Any = None) -> Any:
    """The tree with tokens before the text; those of `method.init_text`, if any, are repeated to fill them."""
    count, ids = settings.virtual_tokens, ()
    if settings.init_text and tokenizer is not None:
        ids = tokenizer(settings.init_text, add_special_tokens=False).input_ids
    if ids:
        chosen = jnp.resize(jnp.asarray(ids, jnp.int32), (count,))
    else:
        chosen = jax.random.randint(rng, (count,), 0, model.config.vocab_size)
    if settings.prefix:
        return _with_prefix(params, model, chosen, rng)
    leaves = leaf_paths(params)
    table = leaves['shared/embedding' if model.kind == 'encdec' else 'embed_tokens/embedding']
    scale = getattr(model.config, 'embed_scale', None) or 1.0
    return nested(leaves | {'prompt/embedding': scale * lookup(table, chosen, jnp.float32)})


def _with_prefix(params: Any, model: Model, tokens: jax.Array, rng: jax.Array) -> Any:
    """The tree with a prefix in every attention layer: a decoder's own keys and values of the tokens.

    Where every token sees those after it, none has keys and values without the text: those begin small and random.
    """
    leaves, (count,) = leaf_paths(params), tokens.shape
    c = model.config
    heads = (count, getattr(c, 'num_kv_heads', c.num_heads), c.head_dim)
    if model.kind == 'decoder':
        read = model.apply(params, {'tokens': tokens[None]}, cache=model.init_cache(1, count)).cache
        assert read is not None  # a cache was handed in
        k, v = (read[name][:, 0].swapaxes(1, 2).astype(jnp.float32) for name in 'kv')
        return nested(leaves | _by_stacks(model, k, v))
    for path in [path for path in leaves if path.endswith('_attn/o_proj/kernel')]:
        layer, stack = path.removesuffix('/o_proj/kernel'), leaves[path].shape[:-2]
        for name in ('k', 'v'):
            key = jax.random.fold_in(rng, zlib.crc32(f'{layer}/{name}'.encode()))
            leaves[f'{layer}/prefix/{name}'] = _STDDEV * jax.random.normal(key, (*stack, *heads), jnp.float32)
    return nested(leaves)


def _by_stacks(model: Model, k: Any, v: Any) -> dict[str, Any]:
    """A decoder's prefixes `[layers, virtual, kv_heads, head_dim]` by their paths."""
    return {
        f'{stack.name}/self_attn/prefix/{name}': part[np.asarray(stack.numbers)]
        for stack in model.config.stacks
        for name, part in (('k', k), ('v', v))
    }


def _of_all_layers(model: Model, leaves: dict[str, Any]) -> np.ndarray:
    """Undoes `_by_stacks`: `[2, layers, virtual, kv_heads, head_dim]`."""
    order = np.argsort([number for stack in model.config.stacks for number in stack.numbers])
    both = []
    for name in 'kv':
        parts = [peft.host_array(leaves[f'{stack.name}/self_attn/prefix/{name}']) for stack in model.config.stacks]
        both.append(np.concatenate(parts)[order])
    return np.stack(both)


def trains(path: str) -> bool:
    """Whether the leaf at a path trains: the prompt, or the prefixes."""
    return path.startswith('prompt/') or '/prefix/' in path


def read_prompt(
    folder: pathlib.Path, config: Mapping[str, Any], entries: Mapping[str, Entry], model: Model
) -> tuple[Attach, AdapterArrays]:
    """Reads an adapter of `peft_type=PROMPT_TUNING`; see `peft.reader`."""
    prompt, whole = _prompt_embeddings(folder, entries, model)
    if prompt.shape[1] != model.config.d_model:
        raise peft.wrong_base(
            folder, f'its tokens have {prompt.shape[1]} dimensions, this model has {model.config.d_model}'
        )
    prompt = prompt[: config['num_virtual_tokens']]  # PEFT's own for an encoder-decoder has the decoder's too
    return peft.put_in, AdapterArrays({'prompt/embedding': prompt}, whole)


def read_prefix(
    folder: pathlib.Path, config: Mapping[str, Any], entries: Mapping[str, Entry], model: Model
) -> tuple[Attach, AdapterArrays]:
    """Reads an adapter of `peft_type=PREFIX_TUNING`; see `peft.reader`."""
    if model.kind != 'decoder':
        raise peft.wrong_base(folder, f"PEFT's prefix tuning is read for decoders, and this model is an {model.kind}")
    flat, whole = _prompt_embeddings(folder, entries, model)
    c = model.config
    shape = (c.num_layers, 2, c.num_kv_heads, c.head_dim)
    if flat.shape[1] != np.prod(shape):
        raise peft.wrong_base(
            folder, f'its keys and values are {flat.shape[1]} numbers a token, this model has {np.prod(shape)}'
        )
    k, v = flat.reshape(-1, *shape).transpose(2, 1, 0, 3, 4)  # each [layers, virtual, kv_heads, head_dim]
    return peft.put_in, AdapterArrays(_by_stacks(model, k, v), whole)


def _prompt_embeddings(
    folder: pathlib.Path, entries: Mapping[str, Entry], model: Model
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What PEFT's prompt methods store, `[virtual, ...]`, and the leaves of the model beside it."""
    rest = {name.removeprefix(peft.PROMPT_PREFIX): entry for name, entry in entries.items()}
    if 'prompt_embeddings' not in rest:
        raise UserError(f'{folder}/{peft.WEIGHTS}: expected prompt_embeddings')
    return peft.float_values(rest.pop('prompt_embeddings')), peft.whole_leaves(folder, rest, model)


def read_own_prefix(
    folder: pathlib.Path, config: Mapping[str, Any], entries: Mapping[str, Entry], model: Model
) -> tuple[Attach, AdapterArrays]:
    """Reads an adapter of prefixes under this tree's own names; see `peft.reader`."""
    entries = {name.removeprefix(peft.PROMPT_PREFIX): entry for name, entry in entries.items()}
    arrays = peft.own_arrays(folder, entries, '/prefix/', model)
    _check_prefixes(folder, arrays.added, model)
    return peft.put_in, arrays


def _check_prefixes(folder: pathlib.Path, added: Mapping[str, np.ndarray], model: Model) -> None:
    shapes = leaf_paths(model.shapes)
    for path, value in added.items():
        kernel = shapes.get(path.rsplit('/', 2)[0] + '/o_proj/kernel')
        if kernel is None or (*value.shape[:-3], value.shape[-2] * value.shape[-1]) != kernel.shape[:-1]:
            raise peft.wrong_base(folder, f'{path} {list(value.shape)} does not fit its attention layer')


def save(
    folder: pathlib.Path, params: Any, model: Model, settings: Settings, base: str, whole: Iterable[str] = ()
) -> None:
    """Writes a tree's prompt as PEFT's prompt tuning, or its prefixes; arguments as for `lora_peft.save`."""
    leaves = leaf_paths(params)
    saved = peft.whole_tensors(leaves, whole, model, peft.PROMPT_PREFIX)
    fields: dict[str, Any] = {'num_transformer_submodules': 1}
    fields['modules_to_save'] = peft.modules_to_save(saved, peft.PROMPT_PREFIX) or None
    if 'prompt/embedding' in leaves:
        prompt = peft.host_array(leaves['prompt/embedding'])
        fields |= {'peft_type': 'PROMPT_TUNING', 'prompt_tuning_init': 'RANDOM', 'token_dim': prompt.shape[1]}
        fields['num_attention_heads'] = model.config.num_heads
        fields['num_layers'] = getattr(model.config, 'num_decoder_layers', model.config.num_layers)
    elif model.kind == 'decoder':
        both = _of_all_layers(model, leaves)
        _, layers, count, heads, head_dim = both.shape
        prompt = both.transpose(2, 1, 0, 3, 4).reshape(count, -1)
        fields |= {'peft_type': 'PREFIX_TUNING', 'prefix_projection': False, 'token_dim': heads * head_dim}
        fields |= {'num_attention_heads': heads, 'num_layers': layers}
    else:
        prefixes = {path: peft.host_array(leaf) for path, leaf in leaves.items() if '/prefix/' in path}
        peft.write(folder, {'peft_type': PREFIX}, prefixes | saved, model, base)
        return
    fields['num_virtual_tokens'] = prompt.shape[0]
    peft.write(folder, fields, {'prompt_embeddings': prompt} | saved, model, base)


METHOD = Method(
    name='prompt',
    init=init,
    trains=trains,
    virtual_tokens=lambda settings: settings.virtual_tokens,
    virtual_embeddings=lambda settings: not settings.prefix,
    merges=False,
    save_adapter=save,
    read_adapter={'PROMPT_TUNING': read_prompt, 'PREFIX_TUNING': read_prefix, PREFIX: read_own_prefix},
)
