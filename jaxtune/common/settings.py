"""The type of a recipe and its subtrees where they are read."""

from typing import Any, Protocol


class Settings(Protocol):
    """Values by name, as attributes: an `ml_collections.ConfigDict`, or anything else that has them."""

    def __getattr__(self, name: str, /) -> Any:
        """The value of a key, or the subtree under it."""
        ...
