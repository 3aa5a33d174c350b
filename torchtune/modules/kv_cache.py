"""Keys and values of tokens already seen, for decoding one token after the other.

    slot 0   k k k k k . .      a slot for each text; buffers are shared, and double when the longest is full,
    slot 1   k k . . . . .      so that n tokens cost n copies in all and not n squared
    slot 2   k k k k . . .

A forward continues some of the slots, by default all: a text that begins is read into its slot alone, one that has
ended gives its slot to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class _Buffer:
    """Of one layer; what is beyond a slot's tokens is finite, and hidden by a mask.

    Attributes:
        keys, values: [slots, K, M, H], M places; None before the first token.
    """

    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass
class LayerCache:
    """One layer's keys and values, of the slots that a forward continues."""

    _buffer: _Buffer
    _cache: KVCache

    @property
    def is_new(self) -> bool:
        """Whether nothing has been seen of any text."""
        return not any(self._cache.lengths)

    def extend(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new keys and values [n, K, H] of text `index`; returns all of its own so far, [m, K, H]."""
        slot, old = self._cache.slots[index], self._cache.lengths[index]
        keys, values = self._with_room(old + len(k), k)
        keys[slot, :, old : old + len(k)] = k.transpose(0, 1)
        values[slot, :, old : old + len(k)] = v.transpose(0, 1)
        seen = slice(old + len(k))
        return keys[slot, :, seen].transpose(0, 1), values[slot, :, seen].transpose(0, 1)

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Append a token to each text, k and v [B, K, H]; returns [B, K, M, H], M the longest's tokens.

        Args:
            positions: [B], where those tokens stand.
        """
        slots, lengths = self._cache.slots, self._cache.lengths
        longest = max(lengths) + 1
        keys, values = self._with_room(longest, k)
        are_all = slots == tuple(range(len(keys)))
        if are_all and min(lengths) + 1 == longest:
            keys.select(2, longest - 1).copy_(k)
            values.select(2, longest - 1).copy_(v)
        else:
            index = torch.tensor(slots, device=k.device)
            keys[index, :, positions], values[index, :, positions] = k, v
            if not are_all:
                return keys[index, :, :longest], values[index, :, :longest]
        return keys.narrow(2, 0, longest), values.narrow(2, 0, longest)

    def _with_room(self, needed: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers, grown if they hold fewer tokens than needed. like: [n, K, H]."""
        keys, values = self._buffer.keys, self._buffer.values
        used = 0 if keys is None else keys.shape[2]
        if keys is None or values is None or used < needed:
            _, num_heads, size = like.shape
            shape = (self._cache.num_slots, num_heads, max(needed, 2 * used, 64), size)
            grown = like.new_zeros(shape), like.new_zeros(shape)
            for new, old in zip(grown, (keys, values), strict=True):
                if old is not None:
                    new[:, :, :used] = old
            keys, values = self._buffer.keys, self._buffer.values = grown
        return keys, values


@dataclass
class KVCache:
    """The caches of all layers for a batch of texts.

    Attributes:
        slots: those that the next forward continues, one for each of its documents.
        max_positions: the model's context; more tokens than that are refused.
    """

    _buffers: list[_Buffer]
    _seen: list[int]  # tokens of each slot, shared by all views
    slots: tuple[int, ...]
    max_positions: int | None = None
    layers: list[LayerCache] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = [LayerCache(buffer, self) for buffer in self._buffers]

    @classmethod
    def empty(cls, num_layers: int, num_slots: int, *, max_positions: int | None = None) -> KVCache:
        """A cache that has seen nothing."""
        buffers = [_Buffer() for _ in range(num_layers)]
        return cls(buffers, [0] * num_slots, tuple(range(num_slots)), max_positions)

    @property
    def num_slots(self) -> int:
        """How many texts there is room for."""
        return len(self._seen)

    @property
    def lengths(self) -> list[int]:
        """Tokens seen of each of its texts."""
        return [self._seen[slot] for slot in self.slots]

    def of(self, *slots: int) -> KVCache:
        """The same cache for a forward that continues these slots alone."""
        return KVCache(self._buffers, self._seen, slots, self.max_positions)

    def forget(self, lengths: Sequence[int]) -> None:
        """Go back to the first `lengths` tokens of each of its texts."""
        for slot, length in zip(self.slots, lengths, strict=True):
            assert length <= self._seen[slot], (slot, length, self._seen[slot])
            self._seen[slot] = length

    def begin(self, slot: int, other: KVCache, length: int) -> None:
        """Let a slot begin with the first `length` tokens of another cache's first text."""
        self._seen[slot] = length
        for layer, its in zip(self.layers, other._buffers, strict=True):
            if length and its.keys is not None and its.values is not None:
                keys, values = layer._with_room(length, its.keys[0].transpose(0, 1))
                keys[slot, :, :length] = its.keys[other.slots[0], :, :length]
                values[slot, :, :length] = its.values[other.slots[0], :, :length]

    def arranged(self, slots: Sequence[int | None]) -> KVCache:
        """A cache of these slots in this order, the same one several times if it is there; None is an empty one."""
        kept = torch.tensor([slot for slot in slots if slot is not None], dtype=torch.int64)
        places = torch.tensor([place for place, slot in enumerate(slots) if slot is not None], dtype=torch.int64)
        seen = [0 if slot is None else self._seen[slot] for slot in slots]
        used = max(seen, default=0)

        def copied(old: Tensor | None) -> Tensor | None:
            if old is None or not used:
                return None
            new = old.new_zeros(len(slots), old.shape[1], old.shape[2], old.shape[3])
            new[places.to(old.device), :, :used] = old[kept.to(old.device), :, :used]
            return new

        buffers = [_Buffer(copied(buffer.keys), copied(buffer.values)) for buffer in self._buffers]
        return KVCache(buffers, seen, tuple(range(len(slots))), self.max_positions)

    def advance(self, lengths: Sequence[int]) -> None:
        """Count the tokens of a finished forward."""
        for slot, new in zip(self.slots, lengths, strict=True):
            self._seen[slot] += new

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
