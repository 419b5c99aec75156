"""Hiding tokens for a masked language model: each row's mask is a pure function of a seed and the row's number."""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.packing import Row
from jaxtune.errors import UserError

# Of the chosen tokens: those that become the mask token, and from there on those that become a random one; the rest
# stay (Devlin et al. 2018, arXiv:1810.04805, appendix A.1).
_MASKED, _RANDOM = 0.8, 0.9


class Masking:
    """`(number, row) -> row`: tokens of a row chosen to be predicted, and hidden.

    Chosen tokens become the mask token (80 %), a random ordinary token (10 %) or stay (10 %). Padding and the
    tokenizer's special tokens are never chosen. Loaders count a row's number through all passes over the data, so that
    each pass hides other tokens.

    Args:
      tokenizer: whose mask token, special tokens and words these are.
      probability: that a token is chosen; each by itself, or each word.
      whole_word: a word's tokens are chosen together.
      seed: what the choice depends on beside the row's number; several numbers are one seed.
      vocab_size: rows of the model, of which those put in place of a token are; 0 = all tokens have one.

    Raises:
      UserError: the tokenizer has no mask token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        probability: float,
        whole_word: bool = False,
        seed: int | tuple[int, ...] = 0,
        vocab_size: int = 0,
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise UserError(
                'objective=masked_lm: the tokenizer has no mask token; expected tokenizer.path to name one that has '
                "(BERT's, one that a prepare stage trains, or bytes)"
            )
        mask_id: Any = tokenizer.mask_token_id
        self.mask_id: int = mask_id
        self.probability = probability
        self.seed = seed if isinstance(seed, tuple) else (seed,)
        size = tokenizers.vocab_size(tokenizer, below=vocab_size or None)
        if self.mask_id >= size:
            raise UserError(f'objective=masked_lm: it {tokenizers.no_row(tokenizer, self.mask_id, vocab_size)}')
        self.special = np.zeros(size, bool)
        self.special[[i for i in tokenizer.all_special_ids if i < size]] = True
        known = np.array(sorted(i for i in tokenizer.get_vocab().values() if i < size), np.int32)
        self.ordinary = known[~self.special[known]]
        self.joins = word_joins(tokenizer, size) if whole_word else None

    def __call__(self, number: int, row: Row) -> Row:
        """A row with some of its tokens hidden.

        Args:
          number: of the row, counted through all passes.
          row: `tokens` and `segment_ids` `[length]` int32, and whatever else it holds.

        Returns:
          The row with `tokens` as the model sees them, `targets` as they were, and `loss_mask` 1 where one was chosen.
        """
        rng = np.random.default_rng((*self.seed, int(number)))
        tokens = row['tokens']
        draws = rng.random((2, len(tokens)))
        others = self.ordinary[rng.integers(len(self.ordinary), size=len(tokens))]
        may = (row['segment_ids'] > 0) & ~self.special[tokens]
        chosen = may & (draws[0][self._words(row, may)] < self.probability)
        hidden = np.where(draws[1] < _MASKED, self.mask_id, np.where(draws[1] < _RANDOM, others, tokens))
        return row | {
            'tokens': np.where(chosen, hidden, tokens).astype(np.int32),
            'targets': tokens,
            'loss_mask': chosen.astype(np.float32),
        }

    def _words(self, row: Row, may: np.ndarray) -> np.ndarray:
        """Which draw decides on each token: its own, or that of its word's first token."""
        places = np.arange(len(may))
        if self.joins is None:
            return places
        after, before = self.joins
        tokens, segment_ids = row['tokens'], row['segment_ids']
        inside = np.zeros(len(may), bool)
        inside[1:] = (
            after[tokens[1:]] & before[tokens[:-1]] & (segment_ids[1:] == segment_ids[:-1]) & may[1:] & may[:-1]
        )
        return np.maximum.accumulate(np.where(inside, 0, places))


def word_joins(tokenizer: PreTrainedTokenizerBase, size: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens belong to one word: token i continues token j's if `after[i] & before[j]`.

    WordPiece marks what continues a word. Elsewhere (byte-level and SentencePiece) two tokens are of one word if a
    letter or digit meets one where they touch; a byte beyond ASCII counts as a letter.

    Args:
      tokenizer: whose tokens these are.
      size: only the first so many ids; 0 = all.

    Returns:
      `(after, before)`, bool `[vocab]`.
    """
    size = size or tokenizers.vocab_size(tokenizer)
    vocab = {piece: token for piece, token in tokenizer.get_vocab().items() if token < size}
    after, before = np.zeros(size, bool), np.zeros(size, bool)
    byte_level = 'Ġ' in vocab
    if not byte_level and any(len(piece) > 2 and piece.startswith('##') for piece in vocab):
        before[:] = True
        after[[token for piece, token in vocab.items() if piece.startswith('##')]] = True
        return after, before
    byte_of = {piece: byte for piece, byte in tokenizers.load('bytes').get_vocab().items() if byte < 256}

    def letter(character: str) -> bool:
        byte = byte_of.get(character) if byte_level else None
        return character.isalnum() if byte is None else byte >= 128 or chr(byte).isalnum()

    for piece, token in vocab.items():
        if piece:
            after[token], before[token] = letter(piece[0]), letter(piece[-1])
    return after, before
