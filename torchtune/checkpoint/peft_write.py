"""Writing an adapter as PEFT does, so that PEFT, vLLM and llama.cpp read it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from torchtune.adapters.adapter import Adapter
from torchtune.adapters.lora import LoRALinear
from torchtune.adapters.targets import ends_with
from torchtune.checkpoint.held import Held
from torchtune.checkpoint.peft_names import CONFIG, PREFIX, WEIGHTS, PeftNames, most_common
from torchtune.checkpoint.tensor_writer import TensorWriter
from torchtune.distributed.peers import Attempt
from torchtune.modules.decoder import CausalLM
from torchtune.modules.linear import Conv1D


def save_adapter(folder: Path, adapter: Adapter, model: CausalLM, *, held: Held | None = None) -> None:
    """Write an adapter; `model` is what it belongs to, and tells how its layers are called.

    Args:
        held: where ranks hold parts of the model: all of them call it then, one writes, and what was trained whole
            (`trained_values` has it on the meta device) is put together there, a tensor at a time. An error is left in
            `held.attempt`.
    """
    writer = _Writer(model, adapter)
    tensors, sources = writer.tensors(), writer.sources()
    attempt, is_main = (Attempt(), True) if held is None else (held.attempt, held.peers.is_main)
    file = attempt(_begin, folder, writer.config(), tensors) if is_main else None
    for key, tensor in tensors.items():
        value = held.put_together(sources[key], 0) if held is not None and tensor.is_meta else tensor
        if file is not None:
            attempt(file.write, key, value)
    if file is not None:
        attempt(file.close)
        file.abandon()
    if held is None:
        attempt.finish()


def _begin(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TensorWriter:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return TensorWriter(folder / WEIGHTS[0], described, {"format": "pt"})


class _Writer(PeftNames):
    def __init__(self, model: CausalLM, adapter: Adapter) -> None:
        super().__init__(model)
        self.adapter = adapter

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, update in self.adapter.updates.items():
            path, _, kind = name.rpartition(".")
            if path in self.experts:
                # PEFT wraps one parameter after the other; the second is the outer one.
                inner = kind == "gate_up_proj" and f"{path}.down_proj" in self.adapter.updates
                place = f"{PREFIX}{self.theirs[path]}{'.base_layer' if inner else ''}"
                a, b = (update.b.mT, update.a.mT) if self.swaps_experts else (update.a, update.b)
                tensors[f"{place}.lora_A.weight"] = a.flatten(0, 1)  # [E r, in]
                tensors[f"{place}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1)  # [out, r E]
                continue
            place = PREFIX + self.theirs[name]
            is_embedding = name == self.embedding
            names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
            tensors[f"{place}.{names[0]}"], tensors[f"{place}.{names[1]}"] = update.a, update.b
            if update.magnitude is not None:
                tensors[f"{place}.lora_magnitude_vector"] = update.magnitude
        return tensors | {key: self.adapter.whole[name] for key, name in self.sources().items()}

    def sources(self) -> dict[str, str]:
        """Of tensors that were trained whole, the names in our model."""
        keys = {PREFIX + self.theirs[name]: name for name in self.adapter.whole}
        embedding = f"{self.embedding}.weight"
        if self.model.is_tied and embedding in self.adapter.whole:
            # PEFT trains and loads the two apart, and each must be what ours is.
            keys[f"{PREFIX}{self.head}.weight"] = embedding
        return keys

    def config(self) -> dict[str, Any]:
        config, updates = self.adapter.config, self.adapter.updates
        power = 0.5 if config.use_rslora else 1.0
        ranks = {self._key(name): update.rank for name, update in updates.items()}
        alphas = {self._key(name): _plain(update.scale * update.rank**power) for name, update in updates.items()}
        rank, alpha = most_common(ranks.values(), config.rank), most_common(alphas.values(), config.alpha)
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.adapter.base,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": config.dropout,
            "target_modules": self._target_modules(),
            "target_parameters": self._target_parameters() or None,
            "modules_to_save": self._modules_to_save(),
            "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
            "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
            "use_rslora": config.use_rslora,
            "use_dora": config.use_dora,
            "fan_in_fan_out": any(self._lies_transposed(name) for name in updates),
            "bias": "none",
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def _target_modules(self) -> list[str]:
        adapted = [self.theirs[n] for n in self.adapter.updates if n in self.modules and not self._is_by_weight(n)]
        return self._shortest(adapted, [self.theirs[name] for name in self.adaptable], ends_with)

    def _target_parameters(self) -> list[str]:
        stacks = [self.of_update(name) for name in self.adapter.updates if name not in self.modules]
        known = [f"{self.theirs[path]}.{kind}" for path in self.experts for kind in ("gate_up_proj", "down_proj")]
        last = {".".join(name.split(".")[-3:]) for name in stacks}  # mlp.experts.down_proj
        if {name for name in known if any(ends_with(name, end) for end in last)} == set(stacks):
            stacks = sorted(last)
        return [*stacks, *(self._key(name) for name in self.adapter.updates if self._is_by_weight(name))]

    def _key(self, name: str) -> str:
        """What PEFT looks an update up by: its layer's name, or its parameter's."""
        return f"{self.theirs[name]}.weight" if self._is_by_weight(name) else self.of_update(name)

    def _is_by_weight(self, name: str) -> bool:
        """Whether PEFT is told a layer by its weight's name, with no dropout and no DoRA then.

        Routers are no layers there; and a layer's name, however it is written, it takes for the experts' of the same
        last name.
        """
        config = self.adapter.config
        if name in self.routers:
            return True
        called_so = name in self.modules and name.rpartition(".")[2] in ("gate_proj", "up_proj", "down_proj")
        return bool(self.experts) and called_so and not config.dropout and not config.use_dora

    def _modules_to_save(self) -> list[str] | None:
        modules = {self.theirs[name.rpartition(".")[0]] for name in self.adapter.whole}
        if self.model.is_tied and self.theirs[self.embedding] in modules:
            modules.add(self.head)
        modules = {name for name in modules if not any(name.startswith(f"{other}.") for other in modules)}
        names = [name for name in self.theirs.values() if name not in self.stored]
        # PEFT compares without a dot here: `norm` would be `input_layernorm` too.
        return self._shortest(sorted(modules), [*names, self.head], str.endswith) or None

    def _shortest(self, chosen: Sequence[str], known: Sequence[str], fits: Callable[[str, str], bool]) -> list[str]:
        """The last parts of the chosen names where they name these and no others, else the whole names."""
        last = sorted({name.rpartition(".")[2] for name in chosen})
        # Beside the text part of a larger model stand other layers of the same last names; and where there are
        # experts PEFT takes `gate_proj` for theirs too.
        others = self.model.carried or self.experts
        if {name for name in known if any(fits(name, end) for end in last)} == set(chosen) and not others:
            return last
        return list(chosen)

    def _lies_transposed(self, name: str) -> bool:
        layer = self.modules.get(name)
        return layer.transposed if isinstance(layer, LoRALinear) else isinstance(layer, Conv1D)


def _plain(value: float) -> float | int:
    """A number as people write it, 32 and not 32.00000000000001; one that has no short form stays as it is."""
    rounded = round(value, 9)
    if not math.isclose(rounded, value, rel_tol=1e-14):
        return value
    return int(rounded) if rounded == math.floor(rounded) else rounded
