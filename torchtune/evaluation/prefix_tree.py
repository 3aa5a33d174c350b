"""Texts that begin alike, with each common beginning computed once.

A B C D          sorted, a text's tokens are fed from where it parts from the text before it:
A B C E F        A B C D | E F | X Y  in one forward, in which E sees A B C E, wherever these lie
X Y
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtune.distributed.mesh import Axis
from torchtune.generation.beginnings import num_shared
from torchtune.modules.documents import Documents, Split, Stretch

MIN_SHARED = 8  # tokens; what is shorter costs more to find again than to compute


@dataclass(frozen=True)
class PrefixTree:
    """A batch of texts as the model is fed them.

    Attributes:
        input_ids: [T], of every beginning once.
        documents: T's stretches, each of which sees its text's beginning.
        places: for each text, in the order in which they were given, where its tokens lie on T: [n] each.
    """

    input_ids: Tensor
    documents: Documents
    places: list[Tensor]


def prefix_tree(texts: Sequence[Sequence[int]], *, alike: Callable[[int, int], bool] | None = None) -> PrefixTree:
    """Lay texts out, none of them empty; in lexicographic order the most is shared.

    Args:
        alike: whether texts of these lengths may share a beginning; by default all do (`Decoder.turns_alike`).
    """
    ids: list[int] = []
    positions: list[int] = []
    stretches: list[Stretch] = []
    places: list[Tensor] = []
    begin = 0  # of the text, on an axis on which all whole texts lie
    before: Sequence[int] = ()
    for number, text in enumerate(texts):
        shared = min(num_shared(before, text), len(text) - 1)  # of each text, something is its own
        if shared < MIN_SHARED or (alike is not None and not alike(len(before), len(text))):
            shared = 0
        own = torch.arange(len(ids), len(ids) + len(text) - shared)
        places.append(torch.cat((places[-1][:shared], own)) if shared else own)
        ids += text[shared:]
        positions += range(shared, len(text))
        stretches.append(Stretch(number, begin, begin + shared, begin + len(text)))
        begin += len(text)
        before = text
    lengths = [stretch.end - stretch.start for stretch in stretches]
    laid = Documents.from_lengths(lengths)
    split = Split(Axis(), tuple(map(len, texts)), tuple(stretches), torch.cat(places))
    documents = Documents(laid.lengths, torch.tensor(positions), laid.cu_seqlens, split=split)
    return PrefixTree(torch.tensor(ids), documents, places)
