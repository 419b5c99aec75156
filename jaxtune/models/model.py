"""What the rest of the house knows of a model: pure functions of a parameter tree."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.models import kv_cache, zigzag
from jaxtune.models.attention import KernelLog
from jaxtune.models.rope import border
from jaxtune.models.routing import Routing
from jaxtune.parallel import platform
from jaxtune.weights import NewRows, Weight, expand, materialise, put_rows

Params = Any
# Arrays and what was made of them: (id of one, which part) -> the two.
Made = dict[tuple[int, Any], tuple[jax.Array, jax.Array]]


def leaf_paths(tree: Params) -> dict[str, Any]:
    """Leaves of a tree of plain dicts by path `a/b/c`; a typed leaf counts as one."""
    if not isinstance(tree, dict):
        return {'': tree}
    return {
        f'{name}/{rest}' if rest else name: leaf
        for name, subtree in tree.items()
        for rest, leaf in leaf_paths(subtree).items()
    }


class Flops(NamedTuple):
    """Training FLOPs a token (PaLM's appendix B, Chowdhery et al. 2022, arXiv:2204.02311).

    Attributes:
      products: 6 a parameter in a product.
      attention: over all keys but those outside of a layer's window.
    """

    products: float
    attention: float


class Outputs(NamedTuple):
    """What a forward pass gives: `hidden [batch, length, d_model]` for `Model.head`, and a cache and a routing or None.

    A classifier of rows has one vector a row, `[batch, 1, d_model]`.
    """

    hidden: jax.Array
    cache: kv_cache.Cache | None = None
    routing: Routing | None = None


def virtual_tokens(params: Params) -> int:
    """How many trained tokens a decoder's tree puts before what the model reads (`models.prompts`)."""
    if 'prompt' in params:
        return params['prompt']['embedding'].shape[0]
    layers = params.get('layers', {})
    prefix = (layers[0] if isinstance(layers, tuple) else layers).get('self_attn', {}).get('prefix')
    return 0 if prefix is None else prefix['k'].shape[-3]


def _cut_layers(params: Params, made: Made) -> Params:
    """The tree with a tuple of one tree a layer in place of each stack that a step goes through."""

    def cut(stack: Params) -> tuple[Params, ...]:
        count = jax.tree.leaves(stack)[0].shape[0]
        return tuple(
            jax.tree.map(lambda leaf, place=i: _once(made, leaf, place, lambda: leaf[place]), stack)
            for i in range(count)
        )

    if 'decoder' in params:
        return {**params, 'decoder': _cut_layers(params['decoder'], made)}
    return {name: cut(part) if name in ('layers', 'dense_layers') else part for name, part in params.items()}


def _once(made: Made, leaf: jax.Array, part: Any, make: Callable[[], jax.Array]) -> jax.Array:
    """A part of a leaf: the cached one if there is one, else made now."""
    key = id(leaf), part
    if key not in made:
        made[key] = leaf, make()  # the leaf too, or another might get its id
    return made[key][1]


def layer_of(stack: Params | tuple[Params, ...], place: int) -> Params:
    """The parameters of one layer of a stack, cut out already (`Model.decode_layout`) or not."""
    return stack[place] if isinstance(stack, tuple) else jax.tree.map(lambda leaf: leaf[place], stack)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['kernel', 'bias', 'rows'],
    meta_fields=['softcap', 'scale', 'vocab_major', 'ids'],
)
@dataclasses.dataclass(frozen=True)
class Head:
    """The projection to the vocabulary: `logits = cap(scale * hidden @ kernel + bias)`.

    Attributes:
      kernel: `[vocab, d_model]` if `vocab_major` (a tied embedding), else `[d_model, vocab]`.
      bias: `[vocab]` or None.
      softcap: `softcap * tanh(logits / softcap)` (Gemma 2), or None.
      scale: factor on the product.
      vocab_major: which way the kernel lies.
      rows: `[new, d_model]`, what tokens have in the kernel's place, or beyond it; or None. They stay apart so that a
        frozen kernel gets no gradient, and is copied only where it must be.
      ids: those tokens, ascending.
    """

    kernel: jax.Array
    bias: jax.Array | None = None
    softcap: float | None = None
    scale: float = 1.0
    vocab_major: bool = False
    rows: jax.Array | None = None
    ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, weight: jax.Array | Weight, **fields: Any) -> 'Head':
        """The projection by a table or kernel of any kind, with the further fields."""
        if isinstance(weight, NewRows):
            return cls(materialise(weight.base), rows=weight.rows, ids=weight.ids, **fields)
        return cls(materialise(weight), **fields)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """All logits `[..., vocab]` of states `[..., d_model]`, in float32."""
        kernel = self.kernel.astype(hidden.dtype)
        dims = (((hidden.ndim - 1,), (1 if self.vocab_major else 0,)), ((), ()))
        logits = jax.lax.dot_general(hidden, kernel, dims, preferred_element_type=jnp.float32)
        if self.rows is not None:
            dims = (((hidden.ndim - 1,), (1,)), ((), ()))
            new = jax.lax.dot_general(hidden, self.rows.astype(hidden.dtype), dims, preferred_element_type=jnp.float32)
            logits = put_rows(logits, new, self.ids, -1)
        logits = logits * self.scale
        if self.bias is not None:
            logits = logits + self.bias.astype(jnp.float32)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a parameter lies in a Hugging Face folder.

    Attributes:
      name: the tensor's name, with `{}` for each dimension that the parameter is stacked over: the layer's number, and
        the expert's where each expert has a tensor.
      transposed: the tensor's matrices are `[out, in]` where the parameter's are `[in, out]`.
      numbers: of the layers that the parameter is stacked over; () = from 0.
      others: its names in folders that lack it under its own.
    """

    name: str
    transposed: bool = False
    numbers: tuple[int, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def stacked(self) -> int:
        """How many leading dimensions the parameter is stacked over: one tensor for each index into them."""
        return self.name.count('{}')

    def names(self, shape: tuple[int, ...], name: str = '') -> list[str]:
        """Names of all tensors of a parameter of this shape; by another name than its own, where one is given."""
        name = name or self.name
        first, *rest = (range(size) for size in (*shape[: self.stacked], 1))
        counts = (self.numbers or first, *rest)
        return [name.format(*index) for index in itertools.product(*counts)]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of each tensor of a parameter of this shape."""
        shape = shape[self.stacked :]
        return (*shape[:-2], *shape[-2:][::-1]) if self.transposed else shape


class Tie(NamedTuple):
    """An embedding that is the projection to the vocabulary as well.

    Attributes:
      table: its path.
      head: the path of a projection of its own.
      name: the tensor that this would be in a folder.
    """

    table: str
    head: str
    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model without its parameters.

    Attributes:
      hf_config: Hugging Face's config fields, all of them.
      architecture: the class in `transformers`.
      kind: `decoder`, `encoder` or `encdec`.
      config: the same, normalised over families: `vocab_size`, `d_model`, `num_layers`, `max_positions`, …
      param_dtype: what kernels and embeddings are kept in; norms and biases are float32.
      compute_dtype: what activations and matrix products use.
      shapes: the parameter tree as `jax.ShapeDtypeStruct`s.
      init: `rng -> params`, Hugging Face's initialisation; pure.
      tensors: parameter path -> where it lies in a Hugging Face folder.
      base_prefix: the part of tensor names that a folder of the model without its head leaves out (`model.`).
      ignored: regular expressions of tensors in a folder that are no parameters (buffers of older versions).
      heads: first parts of the paths that a folder may lack, to be initialised instead.
      tie: the embedding that is the projection to the vocabulary as well, or None.
      kernels: which attention kernels and products the traces of this model have chosen so far.
    """

    hf_config: Mapping[str, Any]
    architecture: str
    kind: str
    config: Any
    param_dtype: jnp.dtype
    compute_dtype: jnp.dtype
    shapes: Params
    init: Callable[[jax.Array], Params]
    forward: Callable[..., Outputs]
    make_head: Callable[[Params], Head]
    make_cache: Callable[[int, int], kv_cache.Cache]
    count_flops: Callable[..., Flops]
    tensors: Mapping[str, Tensor]
    base_prefix: str = ''
    ignored: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    tie: Tie | None = None
    kernels: KernelLog = dataclasses.field(default_factory=KernelLog)

    def apply(
        self,
        params: Params,
        batch: Mapping[str, jax.Array],
        *,
        cache: kv_cache.Cache | None = None,
        rng: jax.Array | None = None,
        begins: bool = True,
    ) -> Outputs:
        """The forward pass.

        Args:
          params: the parameter tree; kernels may be typed leaves.
          batch: `tokens [batch, length]` int32; maybe `positions` (default 0, 1, …) and `segment_ids` (default 1; 0 is
            padding, tokens see only their own segment); an encoder's `token_types` (default 0); `noise [batch, length,
            d_model]`, added to a decoder's embeddings. An encoder-decoder's `tokens` and `segment_ids` are the
            source's; it has `decoder_tokens`, `decoder_segment_ids` and (with a cache) `decoder_positions` too, and
            `hidden` is the decoder's. With a cache, a batch without `tokens` goes on from the source that the cache
            holds.
          cache: from `init_cache`, `prefill` or another call; a token's slot is its position, its keys and values are
            written there, and it sees the slots up to its own. Padding writes nothing.
          rng: key for dropout of added weights, or None.
          begins: False where the cache already holds what comes first, such as a trained prompt.
        """
        return self.forward(expand(params), batch, cache=cache, rng=rng, begins=begins)

    def head(self, params: Params) -> Head:
        """The projection to the vocabulary, or to a classifier's labels."""
        return self.make_head(params)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """All logits `[..., vocab]` in float32: for sampling; losses go through `objectives.cross_entropy`."""
        return self.head(params).logits(hidden)

    def init_cache(self, batch: int, max_length: int) -> kv_cache.Cache:
        """An empty cache: `k` and `v`, each `[layers, batch, kv_heads, max_length, head_dim]`."""
        return self.make_cache(batch, max_length)

    def prefill(
        self, params: Params, prompts: jax.Array, lengths: jax.Array, room: int
    ) -> tuple[jax.Array, kv_cache.Cache, jax.Array]:
        """Reads prompts: a decoder begins with them, an encoder-decoder answers them from its start token on.

        Args:
          params: the parameter tree.
          prompts: `[batch, length]` int32, padded right.
          lengths: `[batch]` int32, at least 1.
          room: how many tokens may follow.

        Returns:
          `(hidden, cache, positions)`: the state `[batch, d_model]` that predicts the first new token, the cache for
          `step`, and the position `[batch]` of that token.
        """
        batch, width = prompts.shape
        places = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), prompts.shape)
        inputs = {'tokens': prompts, 'positions': places, 'segment_ids': (places < lengths[:, None]).astype(jnp.int32)}
        if self.kind == 'encdec':
            start = jnp.zeros((batch, 1), jnp.int32)
            inputs |= {'decoder_tokens': start + self.config.start_id, 'decoder_positions': start}
            inputs['decoder_segment_ids'] = start + 1
            outputs = self.apply(params, inputs, cache=self.init_cache(batch, 1))
            assert outputs.cache is not None  # as one was given
            return outputs.hidden[:, 0], kv_cache.divided(outputs.cache, room - 1), jnp.ones(batch, jnp.int32)
        outputs = self.apply(params, inputs, cache=self.init_cache(batch, virtual_tokens(params) + width))
        assert outputs.cache is not None  # as one was given
        last = jnp.take_along_axis(outputs.hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        return last, kv_cache.divided(outputs.cache, room), lengths

    def decode_layout(self, params: Params, made: Made | None = None) -> tuple[Params, Head]:
        """Parameters and projection as they lie best for many calls of `step` in one program: made once, before them.

        XLA:CPU would cut each layer's kernels out of their stacks, and so copy them, in every step, and multiplies few
        rows with a table by the vocabulary four times as slowly as with its transpose. Elsewhere products read both
        where they lie: nothing is copied. Nor are the layers where `step` may have to read whole rows again.

        Args:
          params: the parameter tree.
          made: copies that other trees got, which arrays that are in both share.
        """
        made = {} if made is None else made
        head = self.head(params)
        if platform() != 'cpu':
            return params, head
        if head.vocab_major:
            kernel = _once(made, head.kernel, 'transposed', lambda: head.kernel.T)
            head = dataclasses.replace(head, kernel=kernel, vocab_major=False)
        return params if self.border is not None else _cut_layers(expand(params), made), head

    @property
    def border(self) -> int | None:
        """The position whose token changes the keys of all tokens before it (LongRoPE's first long one), or None."""
        return border(getattr(self.config, 'ropes', ()))

    def step(
        self,
        params: Params,
        cache: kv_cache.Cache,
        tokens: jax.Array,
        positions: jax.Array,
        running: jax.Array,
        row_tokens: Callable[[jax.Array, int], jax.Array] | None = None,
    ) -> tuple[jax.Array, kv_cache.Cache]:
        """Reads one token more a row.

        Args:
          params: the parameter tree, or what `decode_layout` makes of it.
          cache: from `prefill` or the last step.
          tokens: `[batch]` int32.
          positions: `[batch]` int32, of those tokens.
          running: bool `[batch]`; False leaves a row as it is.
          row_tokens: `(row, count) -> [count]` int32, the first tokens of a row, this one among them: where it crosses
            the model's `border`, all before it are read again. A model without one needs none.

        Returns:
          `(hidden, cache)`: the state `[batch, d_model]` that predicts the next token, and the cache with this one.
        """
        inputs = {'tokens': tokens, 'positions': positions, 'segment_ids': running.astype(jnp.int32)}
        prefix = 'decoder_' if self.kind == 'encdec' else ''
        inputs = {prefix + name: value[:, None] for name, value in inputs.items()}
        outputs = self.apply(params, inputs, cache=cache, begins=False)
        assert outputs.cache is not None  # as one was given
        hidden, cache = outputs.hidden[:, 0], outputs.cache
        if self.border is None or kv_cache.slots(cache) <= self.border:
            return hidden, cache
        crossing = running & (positions + virtual_tokens(params) == self.border)
        return self._read_again(params, hidden, cache, crossing, row_tokens)

    def _read_again(
        self,
        params: Params,
        hidden: jax.Array,
        cache: kv_cache.Cache,
        rows: jax.Array,
        row_tokens: Callable[[jax.Array, int], jax.Array] | None,
    ) -> tuple[jax.Array, kv_cache.Cache]:
        """`hidden` and `cache` with what a pass over the whole of `rows` (bool `[batch]`) gives, one row at a time."""
        border = self.border
        assert border is not None  # or `step` would not read again
        assert row_tokens is not None  # a model with a border needs it
        count = border + 1 - virtual_tokens(params)

        def read(state: tuple[jax.Array, jax.Array, kv_cache.Cache]) -> tuple[jax.Array, jax.Array, kv_cache.Cache]:
            rows, hidden, cache = state
            row = jnp.argmax(rows)
            new = self.apply(params, {'tokens': row_tokens(row, count)[None]}, cache=self.init_cache(1, border + 1))
            assert new.cache is not None  # as one was given
            hidden = hidden.at[row].set(new.hidden[0, -1])
            cache = jax.tree.map(
                lambda all_rows, own: jax.lax.dynamic_update_slice(all_rows, own, (0, row, 0, 0, 0)),
                cache,
                kv_cache.divided(new.cache, 0),
            )
            return rows.at[row].set(False), hidden, cache

        _, hidden, cache = jax.lax.while_loop(lambda state: state[0].any(), read, (rows, hidden, cache))
        return hidden, cache

    def attended(self, length: int) -> float:
        """Share of attention's FLOPs in a row of `length` tokens that a causal mask needs; 1 of other models."""
        if self.kind != 'decoder':
            return 1.0
        seen = [min(length, window or length) for window in self.config.windows]
        # The first tokens of a window, or of the row, see fewer keys than it has.
        return sum(keys - keys * (keys - 1) / (2 * length) for keys in seen) / sum(seen)

    def pairs_seen(self, length: int, shards: int = 1) -> float:
        """Share of all pairs of tokens in a row that its layers' kernels visit; 1 of models that are no decoder.

        Args:
          length: tokens of a row.
          shards: devices that its queries are divided over, all of which count as the busiest one does.
        """
        if self.kind != 'decoder':
            return 1.0
        counted = collections.Counter(self.config.windows)
        # Windows that differ by layer are not known when a kernel is made.
        share = {w: zigzag.attended(length, shards, w, len(counted) > 1) for w in counted}
        return sum(n * share[window] for window, n in counted.items()) / counted.total()

    def flops_per_token(self, length: int, *target_length: int) -> float:
        """Training FLOPs a token.

        6 a parameter in a product and 12 x heads x head_dim x keys a layer (PaLM's appendix B, Chowdhery et al. 2022,
        arXiv:2204.02311).

        Args:
          length: tokens of a row.
          target_length: of an encoder-decoder's targets; the result is then that of a token of the source and of its
            share of the target.
        """
        return sum(self.count_flops(length, *target_length))
