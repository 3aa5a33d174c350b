"""Reading protocol buffers' wire format: enough of it for SentencePiece's model files.

The generated classes in the `sentencepiece` package refuse to load beside most versions of `protobuf`.
Format: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Number and value of each field, in file order: an int, a float (32 bits) or bytes (text, a message).

    Raises:
        ValueError: this is no such message.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            # A negative number is written as its two's complement of 64 bits.
            yield key >> 3, value - (1 << 64) if value >= 1 << 63 else value
            continue
        length = {FIXED64: 8, FIXED32: 4}.get(kind)
        if kind == BYTES:
            length, at = _varint(message, at)
        if length is None or at + length > len(message):
            raise ValueError(f"no protocol buffer: wire type {kind} at byte {at}")
        content, at = message[at : at + length], at + length
        yield key >> 3, struct.unpack("<f", content)[0] if kind == FIXED32 else content


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte, at = message[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"no protocol buffer: a number does not end at byte {at}")
