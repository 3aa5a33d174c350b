"""Which parts of a model an adapter is for.

A target is a group (`all-linear`: the linear layers of all blocks; `attention`; `mlp`; `experts`), the end of a
module's name (`q_proj`, `layers.0.self_attn.q_proj`), or a regular expression for the whole of it. Names are the
checkpoint's. Groups leave out the head, embeddings and routers; stacks of experts are adapted where they are
named (`experts`, `experts.down_proj`), since an adapter a matrix of each expert is large, and so are routers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torchtune.errors import ConfigError, Problems, did_you_mean, nearest
from torchtune.modules.attention import Attention
from torchtune.modules.decoder import CausalLM
from torchtune.modules.mla import LatentAttention
from torchtune.modules.moe import Experts, Router

GROUPS = ("all-linear", "attention", "mlp", "experts")
PLAIN_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Targets:
    """What is adapted, by its names in the model.

    Attributes:
        linears: linear layers.
        embeddings: embeddings.
        experts: stacked parameters of experts, `PATH.down_proj`.
        routers: those that choose the experts.
    """

    linears: tuple[str, ...]
    embeddings: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.linears, *self.embeddings, *self.experts, *self.routers)


def find_targets(
    model: CausalLM,
    targets: Sequence[str],
    *,
    layers: Iterable[int] | None = None,
    key: str = "lora_targets",
    problems: Problems | None = None,
) -> Targets:
    """The parts of `model` that `targets` name.

    Args:
        layers: numbers of the decoder layers to stay within.
        problems: takes what would be raised; returned is then what was found in spite of it.
    Raises:
        ConfigError: targets that name nothing, something that can't be adapted, or no layer of `layers`.
    """
    places = _Places(model)
    found: set[str] = set()
    gathered = Problems() if problems is None else problems
    for target in targets:
        with gathered.caught():
            found |= places.matching(target, key)
    if layers is not None and found:
        with gathered.caught():
            found = _within(found, model, list(layers))
    if model.is_tied and (tied := found & set(places.embeddings)):
        both = f"'{min(tied)}' is the head too (tie_word_embeddings), and an update of one of them would untie them"
        gathered.add(key, f"{both}; train it whole by modules_to_save")
    if problems is None:
        gathered.raise_all()
    kinds = (places.linears, places.embeddings, places.experts, places.routers)
    return Targets(*(tuple(name for name in kind if name in found) for kind in kinds))


class _Places:
    """All that can be adapted in a model."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        modules = dict(model.named_modules())
        self.linears = [name for name, module in modules.items() if getattr(module, "is_linear", False)]
        self.embeddings = [name for name, module in modules.items() if module is model.model.embed_tokens]
        stacks = [name for name, module in modules.items() if isinstance(module, Experts)]
        self.experts = [f"{name}.{kind}" for name in stacks for kind in ("gate_up_proj", "down_proj")]
        self.routers = [name for name, module in modules.items() if isinstance(module, Router)]
        self.all = (*self.linears, *self.embeddings, *self.experts, *self.routers)
        prefix = next(name for name, module in modules.items() if module is model.model.layers)
        # A gate with one output (Qwen2-MoE's shared expert) is no layer that a group means.
        self.in_layers = [n for n in self.linears if n.startswith(f"{prefix}.") and modules[n].out_features > 1]
        attention = tuple(n for n, m in modules.items() if isinstance(m, Attention | LatentAttention))
        self.in_attention = [name for name in self.in_layers if _is_inside(name, attention)]

        in_mlp = [name for name in self.in_layers if name not in set(self.in_attention)]
        kinds = (self.in_layers, self.in_attention, in_mlp, self.experts)
        self.groups = {group: names for group, names in zip(GROUPS, kinds, strict=True) if names}

    def matching(self, target: str, key: str) -> set[str]:
        """The names that one target means; at least one."""
        if target in self.groups:
            return set(self.groups[target])
        if PLAIN_NAME.fullmatch(target):
            # Experts' parameters have the names of other models' layers, so their own last name is not enough.
            found = {name for name in self.all if ends_with(name, target)}
            found -= set() if "." in target else set(self.experts)
        else:
            try:
                pattern = re.compile(target)
            except re.error as error:
                raise ConfigError(f"'{target}' is no regular expression: {error}", key=key) from error
            found = {name for name in self.all if pattern.fullmatch(name)}
        if not found:
            raise ConfigError(self._why_not(target), key=key)
        return found

    def _why_not(self, target: str) -> str:
        if not target:
            return "an empty name names no layer"
        if "," in target and PLAIN_NAME.fullmatch(target.replace(",", "").replace(" ", "")):
            return f"'{target}' is read as one name; write a list: [{target}]"
        if target in GROUPS:
            return f"this model has nothing that '{target}' names{self._known(target)}"
        if self.model.is_tied and target in ("lm_head", "embed_out"):
            return (
                f"'{target}' is tied to the embedding and owns no weight, so it takes no adapter; "
                "modules_to_save=[lm_head] trains both as one"
            )
        if any(ends_with(name, target) for name, _ in self.model.named_modules()):
            return f"'{target}' is no linear layer; modules_to_save trains it whole"
        return f"no layer of this model is called '{target}'{self._known(target)}"

    def _known(self, target: str) -> str:
        """The nearest name: one of as many parts, where it has several, or the last part of one, or a group."""
        target = target.removesuffix(".weight")
        num_parts, last = target.count(".") + 1, target.rpartition(".")[2]
        alike = sorted({".".join(name.split(".")[-num_parts:]) for name in self.all if num_parts > 1})
        alike = [name for name in alike if not name[0].isdigit()]
        same = [name for name in alike if ends_with(name, last)]
        if near := nearest(target, same) or nearest(target, alike) or next(iter(same), None):
            return f"; did you mean '{near}'?"
        in_stacks = {".".join(name.split(".")[-2:]) for name in self.experts}
        if stack := next((name for name in sorted(in_stacks) if ends_with(name, last)), None):
            return f"; did you mean '{stack}'?"
        known = {name.rpartition(".")[2] for name in self.all if name not in self.experts}
        return did_you_mean(last, known | in_stacks | set(self.groups))


def find_whole(model: CausalLM, names: Sequence[str], *, key: str = "modules_to_save") -> list[str]:
    """The modules of `model` whose names end with one of `names`; a tied head's is the embedding's.

    Raises:
        ConfigError: names that no module with parameters has.
    """
    modules = {
        name: module for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    }
    embedding = next(name for name, module in modules.items() if module is model.model.embed_tokens)
    found: list[str] = []
    problems = Problems()
    for wanted in names:
        matching = [name for name in modules if ends_with(name, wanted)]
        if not matching and model.is_tied and wanted in ("lm_head", "embed_out"):
            matching = [embedding]
        if not matching:
            last = {name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()}
            last |= {"lm_head"} if model.is_tied else set()
            problems.add(key, f"no module of this model is called '{wanted}'{did_you_mean(wanted, last)}")
        found += [name for name in matching if name not in found]
    problems.raise_all()
    return found


def ends_with(name: str, end: str) -> bool:
    """Whether a dotted name is `end` or ends with it, by whole parts."""
    return name == end or name.endswith(f".{end}")


def _is_inside(name: str, parents: Sequence[str]) -> bool:
    return any(name.startswith(f"{parent}.") for parent in parents)


def _within(names: set[str], model: CausalLM, layers: list[int]) -> set[str]:
    num_layers = len(model.model.layers)
    if beyond := [index for index in layers if not -num_layers <= index < num_layers]:
        raise ConfigError(
            f"{beyond[0]} is no layer of this model: they are 0 to {num_layers - 1}, or -1 to -{num_layers} from the end",
            key="lora_layers",
        )
    paths = {name for name, module in model.named_modules() if module in [model.model.layers[i] for i in layers]}
    inside = {name for name in names if _is_inside(name, tuple(paths))}
    if not inside:
        raise ConfigError(f"no target lies in the layers {layers}", key="lora_layers")
    return inside
