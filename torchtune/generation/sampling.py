"""Which token comes next: from the logits, by the options, with a generator of each text's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The order is that of the fields, as in transformers and vLLM.

    Attributes:
        repetition_penalty: logits of tokens that the text has already are divided by it where positive, else
            multiplied (CTRL, arXiv:1909.05858); 1 is none.
        temperature: logits are divided by it; 0 takes the most likely token, whatever the rest says.
        top_k: only so many of the most likely tokens; 0 is all.
        top_p: only the most likely tokens that together have this probability (arXiv:1904.09751); 1 is all.
        min_p: only tokens at least this times as likely as the most likely one (arXiv:2407.01082); 0 is all.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        bounds = {
            "repetition_penalty": self.repetition_penalty > 0,
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 <= self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
        }
        for name, holds in bounds.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} is out of its bounds: {_BOUNDS[name]}")


_BOUNDS = {
    "repetition_penalty": "above 0; 1 is none",
    "temperature": "0 or more; 0 takes the most likely token",
    "top_k": "0 or more; 0 is all tokens",
    "top_p": "0, which is the most likely token, to 1, which is all",
    "min_p": "0, which is all tokens, to 1",
}
GREEDY = Sampling()


def generator_of(seed: int, text: int) -> np.random.Generator:
    """The random numbers of a text: its own, so that it comes out the same whatever it is batched with."""
    return np.random.default_rng([seed, text])


def choose(
    logits: Tensor, sampling: Sampling, generators: Sequence[np.random.Generator], seen: Tensor | None = None
) -> Tensor:
    """A token for each text.

    Args:
        logits: [B, V].
        generators: of each text; greedy choices don't draw from them.
        seen: [B, V] bool, tokens that each text has already, where there is a repetition penalty.
    Returns:
        [B] int64, on the logits' device.
    """
    if sampling.repetition_penalty != 1.0:
        assert seen is not None, "a repetition penalty needs to know what is there"
        logits = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.float().argmax(-1)  # in half precision the CPU takes five times as long
    kept, tokens = candidates(logits, sampling)
    # By the inverse of the distribution function: a number a token is drawn, however the batch is made up.
    drawn = torch.tensor([[generator.random()] for generator in generators], dtype=torch.float64, device=logits.device)
    reached = kept.double().cumsum(-1)
    place = torch.searchsorted(reached, drawn * reached[:, -1:], right=True).clamp_(max=kept.shape[-1] - 1)
    return tokens.gather(-1, place).squeeze(-1)


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The probabilities of what may come, and its tokens, the most likely first: [B, n] float32 and int64.

    Of what is left out the probability is zero; they do not sum to one.
    """
    logits = logits.float()
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # nothing becomes infinite
    top_k = min(sampling.top_k, logits.shape[-1])
    values, tokens = scaled.topk(top_k) if top_k else scaled.sort(dim=-1, descending=True)
    probabilities = values.softmax(-1)
    if sampling.top_p < 1.0:
        enough = probabilities.cumsum(-1) - probabilities >= sampling.top_p  # before the token
        enough[:, 0] = False
        probabilities = probabilities.masked_fill(enough, 0.0)
    if sampling.min_p > 0.0:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities[:, :1], 0.0)
    return probabilities, tokens


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits [B, V] with those of `seen` tokens made less likely."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
