"""What the model is shown: token ids, and which of them it is trained to produce."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Sample:
    """One document: a conversation, a completion or a text, as tokens.

    Attributes:
        input_ids: int32, [n].
        trained: bool, [n]; `trained[i]` says that token i is a target: its loss counts when it is
            predicted from the tokens before it. Never true for token 0, which nothing predicts.
        source: `chats.jsonl:12`, where the row stands.
        row: index of the row in its data set; a row can give several samples.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    source: str = ""
    row: int = 0

    def __post_init__(self) -> None:
        assert self.input_ids.dtype == np.int32
        assert self.trained.dtype == np.bool_
        assert self.input_ids.ndim == 1
        assert self.input_ids.shape == self.trained.shape
        assert not (len(self.trained) and self.trained[0]), "nothing predicts the first token"

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_trained(self) -> int:
        """Tokens whose loss is counted."""
        return int(np.count_nonzero(self.trained))
