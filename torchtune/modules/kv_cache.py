"""Keys and values of tokens already seen, for decoding one token after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class LayerCache:
    """One layer's keys and values, a growing buffer a document.

    Buffers double when they are full, so that n tokens cost n copies in all and not n squared.
    """

    keys: list[Tensor | None]
    values: list[Tensor | None]
    lengths: list[int]

    def extend(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new keys and values [n, K, H] of document `index`; returns all of its own so far."""
        old, new = self.lengths[index], self.lengths[index] + len(k)
        self.keys[index] = _with_room(self.keys[index], old, new, k)
        self.values[index] = _with_room(self.values[index], old, new, v)
        self.lengths[index] = new
        keys, values = self.keys[index], self.values[index]
        assert keys is not None
        assert values is not None
        keys[old:new], values[old:new] = k, v
        return keys[:new], values[:new]


def _with_room(buffer: Tensor | None, used: int, needed: int, like: Tensor) -> Tensor:
    if buffer is not None and len(buffer) >= needed:
        return buffer
    room = max(needed, 2 * used, 64)
    grown = like.new_empty(room, *like.shape[1:])
    if buffer is not None:
        grown[:used] = buffer[:used]
    return grown


@dataclass
class KVCache:
    """The caches of all layers for a batch of documents.

    Attributes:
        lengths: tokens seen of each document.
        max_positions: the model's context; more tokens than that are refused.
    """

    layers: list[LayerCache]
    max_positions: int | None = None
    lengths: list[int] = field(default_factory=list)

    @classmethod
    def empty(cls, num_layers: int, num_documents: int, *, max_positions: int | None = None) -> KVCache:
        """A cache that has seen nothing."""
        layers = [
            LayerCache([None] * num_documents, [None] * num_documents, [0] * num_documents) for _ in range(num_layers)
        ]
        return cls(layers, max_positions, [0] * num_documents)

    def advance(self, lengths: Sequence[int]) -> None:
        """Count the tokens of a finished forward."""
        self.lengths = [seen + new for seen, new in zip(self.lengths, lengths, strict=True)]

    def check(self, lengths: Sequence[int]) -> None:
        """Refuse tokens beyond the model's context.

        Raises:
            ValueError: names the document, its tokens and the limit.
        """
        for index, (seen, new) in enumerate(zip(self.lengths, lengths, strict=True)):
            if self.max_positions is not None and seen + new > self.max_positions:
                raise ValueError(
                    f"document {index}: {seen} tokens and {new} new ones are more than the model's "
                    f"{self.max_positions} positions"
                )
