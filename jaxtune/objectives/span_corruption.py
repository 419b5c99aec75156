"""Denoising for encoder-decoders: T5's span corruption, prefix language modelling, UL2's mixture.

A row's input fills `data.seq_len` exactly (`spans`), and how long targets are follows from the same numbers. Each pass
over the data cuts other spans, a pure function of the seed and the row's number counted through all passes; held-out
rows always have the same.

Sentinel i is the tokenizer's `<extra_id_i>` where it has them (the first is the highest id). Any other tokenizer has
none, and needs none: a model made for it gets rows for them at the end of its vocabulary, where sentinel i is
`vocab_size - 1 - i`. Rows of data know no model, so in them it is `-1 - i`, which the loss counts from the end.
"""

import functools
import pathlib

import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxtune.data import open_tokens
from jaxtune.data.denoising import MODES, Denoiser, denoisers
from jaxtune.data.packing import Row
from jaxtune.data.tokens import Tokens
from jaxtune.errors import UserError
from jaxtune.objectives import shifted
from jaxtune.objectives.shifted import KINDS

__all__ = ['KINDS', 'dataset', 'loss', 'row', 'spare_tokens']

SENTINELS = 100  # as many as T5's tokenizer has
_WHOLE = 8  # targets are padded to a multiple, so that a mesh can divide them


class Plan:
    """The sizes that a recipe's denoisers have: `raw` tokens a row, and `target_len` places in its target."""

    def __init__(self, config: ConfigDict):
        settings, self.seq_len = config.span_corruption, config.data.seq_len
        self.denoisers = denoisers(settings.mode, settings.density, settings.mean_length)
        self.raw = min(denoiser.raw_length(self.seq_len) for denoiser in self.denoisers)
        longest = max(denoiser.lengths(self.raw)[1] for denoiser in self.denoisers)
        self.target_len = -(-longest // _WHOLE) * _WHOLE
        self.sentinels = max(denoiser.counts(self.raw)[1] for denoiser in self.denoisers)
        self.sentinels += len(MODES) if any(denoiser.mode for denoiser in self.denoisers) else 0


def row(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds."""
    return shifted.make_row(config.data.seq_len, Plan(config).target_len)


def spare_tokens(config: ConfigDict, tokenizer) -> int:
    """How many ids the model must have beyond the tokenizer's: the sentinels that the tokenizer lacks."""
    return 0 if _own_sentinels(tokenizer) else max(SENTINELS, Plan(config).sentinels)


def _own_sentinels(tokenizer) -> list[int]:
    vocab, ids = tokenizer.get_vocab(), []
    while (name := f'<extra_id_{len(ids)}>') in vocab:
        ids.append(vocab[name])
    return ids


def _sentinels(config: ConfigDict, tokenizer, needed: int) -> list[int]:
    """The sentinels' ids in a row of data.

    Raises:
      UserError: the tokenizer has some, but too few.
    """
    own = _own_sentinels(tokenizer)
    if own and len(own) < needed:
        raise UserError(
            f'data.seq_len={config.data.seq_len}: makes up to {needed} sentinels, and the tokenizer has {len(own)}; '
            'expected shorter rows, or fewer or longer spans (span_corruption.density, .mean_length)'
        )
    return own or [-1 - i for i in range(max(SENTINELS, needed))]


def dataset(config: ConfigDict, split: str, tokenizer, cache: pathlib.Path) -> grain.MapDataset:
    """Rows of `data.train` or `data.eval`.

    With `data.packing` the stream of all documents is cut into rows of equal length, as T5's own preprocessing does:
    documents that share a row are parted by EOS only. Without, each row is (part of) one document.

    Raises:
      UserError: the tokenizer has no EOS, or too few sentinels.
    """
    plan = Plan(config)
    if tokenizer.eos_token_id is None:
        raise UserError('objective=span_corruption: the tokenizer has no EOS token; expected one that has')
    sentinels = _sentinels(config, tokenizer, plan.sentinels)
    tokens = open_tokens(config.data[split], split, tokenizer, config, cache)
    # Held-out rows are cut alike whatever the run's seed is.
    seed = (config.seed, 0) if split == 'train' else (0, 1)
    cut = functools.partial(_cut, plan=plan, sentinels=sentinels, eos=tokenizer.eos_token_id, seed=seed)
    return grain.MapDataset.source(Chunks(tokens, plan.raw, config.data.packing)).map_with_index(cut)


class Chunks:
    """Pieces of at most `size` tokens by number, `[tokens]` each: of the stream of documents, or of each by itself."""

    def __init__(self, tokens: Tokens, size: int, packing: bool):
        self.tokens = tokens
        offsets = np.array([0, len(tokens)]) if packing else tokens.offsets
        counts = -(-np.diff(offsets) // size)
        inner = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self.starts = np.repeat(offsets[:-1], counts) + inner * size
        self.ends = np.minimum(self.starts + size, np.repeat(offsets[1:], counts))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> np.ndarray:
        index = int(index)
        return self.tokens.tokens[self.starts[index] : self.ends[index]].astype(np.int32)


def _cut(number: int, tokens: np.ndarray, *, plan: Plan, sentinels: list[int], eos: int, seed: tuple[int, int]) -> Row:
    """A row of the chunk with a number, counted through all passes."""
    rng = np.random.default_rng((*seed, int(number)))
    denoiser: Denoiser = plan.denoisers[rng.integers(len(plan.denoisers))]
    source, target = denoiser.cut(tokens, rng, sentinels, eos)
    return shifted.fill_row(source, target, plan.seq_len, plan.target_len)


def loss(model, params, batch, rng):
    """Summed negative log-likelihood of the targets (sentinels and EOS too), their number, and the accuracy's sum."""
    vocab_size = model.config.vocab_size
    return shifted.loss(model, params, batch, rng, lambda ids: jnp.where(ids < 0, vocab_size + ids, ids))
