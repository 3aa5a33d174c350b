"""Merges from ranks: for vocabularies that say which piece comes first, but not of which two it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def merges_in_order(pieces: Iterable[str], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """All pairs that make one of `pieces`, in the order of the pieces.

    SentencePiece and tiktoken join whichever neighbours make the best piece, however that piece was made in
    training. The library joins listed pairs, so every way to cut a piece in two has to be listed.

    Args:
        pieces: the best one first.
        ids: the pieces that may be joined, with their ids; those are also the order among cuts of one piece.
    """
    merges: list[tuple[str, str]] = []
    for piece in pieces:
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        pairs = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]])) if len(pairs) > 1 else pairs
    return merges
