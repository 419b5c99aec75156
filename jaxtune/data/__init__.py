"""From text to batches: documents, tokenizers, memory-mapped tokens, rows, and the loader that orders them."""

from jaxtune.data.cache import open_tokens
from jaxtune.data.loader import Loader, Prefetch
from jaxtune.data.tokens import Tokens

__all__ = ['Loader', 'Prefetch', 'Tokens', 'open_tokens']
