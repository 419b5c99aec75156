"""Denoising for encoder-decoders: T5's span corruption, prefix language modelling, UL2's mixture.

The input of a whole chunk fills `data.seq_len` exactly (`spans`), and how long targets are follows from the same
numbers. Each pass over the data cuts other spans, a pure function of the seed and the row's number counted through all
passes; held-out rows always have the same.

Sentinel i is the tokenizer's `<extra_id_i>` where it has them (the first is the highest id). Any other tokenizer has
none, and needs none: a model made for it gets rows for them at the end of its vocabulary, where sentinel i is
`vocab_size - 1 - i`. Rows of data know no model, so in them it is `-1 - i`, which the loss counts from the end.
"""

import functools
import pathlib
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.data import open_tokens
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.denoising import MODES, Denoiser, denoisers
from jaxtune.data.documents import TEXTS
from jaxtune.data.packing import Bins, Row, cut_documents
from jaxtune.data.spec import DataSpec
from jaxtune.data.tokens import Tokens
from jaxtune.errors import UserError
from jaxtune.models import Model
from jaxtune.objectives import Batch, Objective, Sums, seq2seq_batch
from jaxtune.objectives.cross_entropy import cross_entropy

SENTINELS = 100  # as many as T5's tokenizer has
_WHOLE = 8  # targets are padded to a multiple, so that a mesh can divide them


class Plan:
    """The sizes that a recipe's denoisers have: `raw` tokens a row, and `target_len` places in its target."""

    def __init__(self, settings: Settings, data: DataSpec) -> None:
        self.seq_len = data.seq_len
        self.denoisers = denoisers(settings.mode, settings.density, settings.mean_length)
        self.raw = min(denoiser.raw_length(self.seq_len) for denoiser in self.denoisers)
        longest = max(denoiser.lengths(self.raw)[1] for denoiser in self.denoisers)
        self.target_len = -(-longest // _WHOLE) * _WHOLE
        self.sentinels = max(denoiser.counts(self.raw)[1] for denoiser in self.denoisers)
        self.sentinels += len(MODES) if any(denoiser.mode for denoiser in self.denoisers) else 0

    def sizes(self) -> np.ndarray:
        """How much of a row chunks of 0 to `raw` tokens take at most, whichever denoiser cuts them."""
        lengths = [[denoiser.lengths(size) for denoiser in self.denoisers] for size in range(self.raw + 1)]
        longest = np.asarray(lengths).max(axis=1)
        return seq2seq_batch.pair_sizes(longest[:, 0], longest[:, 1], self.seq_len, self.target_len)


def batch_spec(settings: Settings, data: DataSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds."""
    return seq2seq_batch.make_row(data.seq_len, Plan(settings, data).target_len)


def extra_vocab(settings: Settings, data: DataSpec, tokenizer: Any) -> int:
    """How many ids the model must have beyond the tokenizer's: the sentinels that the tokenizer lacks."""
    return 0 if _own_sentinels(tokenizer) else max(SENTINELS, Plan(settings, data).sentinels)


def _own_sentinels(tokenizer: Any) -> list[int]:
    vocab, ids = tokenizer.get_vocab(), []
    while (name := f'<extra_id_{len(ids)}>') in vocab:
        ids.append(vocab[name])
    return ids


def _sentinels(seq_len: int, tokenizer: Any, needed: int) -> list[int]:
    """The sentinels' ids in a row of data.

    Raises:
      UserError: the tokenizer has some, but too few.
    """
    own = _own_sentinels(tokenizer)
    if own and len(own) < needed:
        raise UserError(
            f'data.seq_len={seq_len}: makes up to {needed} sentinels, and the tokenizer has {len(own)}; '
            'expected shorter rows, or fewer or longer spans (span_corruption.density, .mean_length)'
        )
    return own or [-1 - i for i in range(max(SENTINELS, needed))]


def dataset(settings: Settings, data: DataSpec, split: str, tokenizer: Any, cache: pathlib.Path) -> grain.MapDataset:
    """Rows of `data.train` or `data.eval`.

    Each document is cut into chunks of as many tokens as fill a row; with `data.packing` shorter ones share rows, as
    segments that do not see each other.

    Raises:
      UserError: the tokenizer has no EOS, or too few sentinels.
    """
    plan = Plan(settings, data)
    if tokenizer.eos_token_id is None:
        raise UserError('objective=span_corruption: the tokenizer has no EOS token; expected one that has')
    sentinels = _sentinels(data.seq_len, tokenizer, plan.sentinels)
    if data.vocab_size and max(sentinels) >= data.vocab_size:
        raise UserError(
            f'objective=span_corruption: it {tokenizers.no_row(tokenizer, max(sentinels), data.vocab_size)}'
        )
    tokens = open_tokens(data, split, tokenizer, cache)
    # Held-out rows are cut alike whatever the run's seed is.
    seed = (data.seed, 0) if split == 'train' else (0, 1)
    cut = functools.partial(_cut, plan=plan, sentinels=sentinels, eos=tokenizer.eos_token_id, seed=seed)
    return grain.MapDataset.source(Chunks(tokens, plan, data.packing)).map_with_index(cut)


class Chunks:
    """Pieces of documents by row, a list of `[tokens]`."""

    def __init__(self, tokens: Tokens, plan: Plan, packing: bool) -> None:
        self.tokens = tokens
        self.starts, self.sizes = cut_documents(tokens, plan.raw)
        self.bins = Bins(plan.sizes()[self.sizes], plan.seq_len, packing)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> list[np.ndarray]:
        chunks = self.bins[int(index)]
        bounds = zip(self.starts[chunks], self.sizes[chunks], strict=True)
        return [self.tokens.tokens[start : start + size].astype(np.int32) for start, size in bounds]


def _cut(
    number: int, chunks: list[np.ndarray], *, plan: Plan, sentinels: list[int], eos: int, seed: tuple[int, int]
) -> Row:
    """The row with a number, counted through all passes, of its chunks."""
    rng = np.random.default_rng((*seed, int(number)))

    def pair(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        denoiser: Denoiser = plan.denoisers[rng.integers(len(plan.denoisers))]
        return denoiser.cut(tokens, rng, sentinels, eos)

    return seq2seq_batch.fill_row(map(pair, chunks), plan.seq_len, plan.target_len)


def loss(settings: Settings, model: Model, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
    """Summed negative log-likelihood of the targets (sentinels and EOS too), their number, and the accuracy's sum."""
    vocab_size = model.config.vocab_size
    name_ids = lambda ids: jnp.where(ids < 0, vocab_size + ids, ids)  # noqa: E731
    hidden, targets, weights = seq2seq_batch.decode(model, params, batch, rng, name_ids)
    nll, correct = cross_entropy(hidden, model.head(params), targets, weights)
    return nll, weights.sum(), {'accuracy': correct}


OBJECTIVE = Objective(
    name='span_corruption',
    batch_spec=batch_spec,
    dataset=dataset,
    loss=loss,
    records=TEXTS,
    kinds=('encdec',),
    extra_vocab=extra_vocab,
    auto_class='Seq2SeqLM',
)
