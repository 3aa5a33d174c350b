"""How the parts of a model are called in PEFT's adapter files: as in transformers' memory, after `base_model.model.`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from torchtune.modules.decoder import CausalLM
from torchtune.modules.moe import Experts, Router
from torchtune.modules.stored import stored_tensors

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."

Value = TypeVar("Value")


class PeftNames:
    """Names of `model` in transformers, where they are not the checkpoint's (`names_in_transformers`).

    Attributes:
        theirs: by our names, those of modules and of stored tensors.
        ours: the inverse.
        experts: our names of stacks of experts.
        routers: our names of routers.
        embedding: our name of the embedding.
        head: the head's name, also where it is tied.
        swaps_experts: PEFT takes the experts' in for out, so that its A is our B the other way round.
        adaptable: our names of linear layers, routers and the embedding.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.stored = stored_tensors(model)
        self.theirs = {name: self._rename(name) for name in [*self.modules, *self.stored] if name}
        self.ours = {theirs: name for name, theirs in self.theirs.items()}
        self.experts = {name for name, module in self.modules.items() if isinstance(module, Experts)}
        self.routers = {name for name, module in self.modules.items() if isinstance(module, Router)}
        self.embedding = next(n for n, module in self.modules.items() if module is model.model.embed_tokens)
        self.head = next((n for n, m in self.modules.items() if not model.is_tied and m is model.lm_head), "lm_head")
        self.swaps_experts = model.peft_swaps_experts
        linears = [name for name, module in self.modules.items() if getattr(module, "is_linear", False)]
        self.adaptable = [*linears, *self.routers, self.embedding]

    def of_update(self, name: str) -> str:
        """Their name of what has an update: a layer, or a stacked parameter of experts."""
        path, _, kind = name.rpartition(".")
        return f"{self.theirs[path]}.{kind}" if path in self.experts else self.theirs[name]

    def _rename(self, name: str) -> str:
        for ours, theirs in self.model.names_in_transformers.items():
            name = name.replace(ours, theirs, 1)
        return name


def most_common(values: Iterable[Value], otherwise: Value) -> Value:
    """The value that occurs most often, or `otherwise` where there is none."""
    return next((value for value, _ in Counter(values).most_common(1)), otherwise)
