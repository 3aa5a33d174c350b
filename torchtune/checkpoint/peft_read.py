"""Reading an adapter folder as PEFT and others write it: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtune.adapters.adapter import Adapter, LowRankUpdate
from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.targets import ends_with
from torchtune.checkpoint.folder import open_files
from torchtune.checkpoint.headers import WeightSource, read_json
from torchtune.checkpoint.hub import resolve
from torchtune.checkpoint.peft_config import lora_config, target_parameters
from torchtune.checkpoint.peft_names import CONFIG, PREFIX, WEIGHTS, PeftNames, most_common
from torchtune.errors import CheckpointError, UnsupportedError, did_you_mean
from torchtune.modules.decoder import CausalLM
from torchtune.modules.moe import Experts

# Keys of adapter_config.json with which the adapter computes otherwise than here, and the values that are no such.
UNSUPPORTED = {
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None,),
    "use_qalora": (None, False),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}
UNTIED = (
    ", and this model's embedding and head are one; set tie_word_embeddings to false in the base's config.json, with a "
    "head of its own"
)
# Beginnings that take something out of the base's weights, anew each time that PEFT loads the adapter.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PART = re.compile(
    r"\.(lora_A|lora_B)(\.\w+)?\.weight$|\.(lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.\w+)?$"
)


def read_adapter(source: str | Path, model: CausalLM) -> Adapter:
    """A PEFT adapter for `model`, which may be on the meta device.

    Args:
        source: the folder, or a hub id.
    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is not for this model; names what does not fit.
        UnsupportedError: a kind of adapter that is not LoRA, or an option that changes what it computes.
    """
    folder = resolve(str(source))
    config = read_adapter_config(folder)
    tensors = _read_tensors(folder)
    try:
        return _Reader(model, config).adapter(tensors)
    except CheckpointError as error:
        raise CheckpointError(error.problem, path=folder) from error


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, once it is known that the adapter can be read.

    Raises:
        CheckpointError, UnsupportedError: as `read_adapter`.
    """
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"has no {CONFIG}, so it is no adapter", path=folder)
    config = read_json(folder / CONFIG)
    if (kind := config.get("peft_type")) not in ("LORA", None):
        raise UnsupportedError(f"{folder}: an adapter of the kind '{kind}'; LoRA and DoRA can be read")
    for key, harmless in UNSUPPORTED.items():
        if config.get(key) not in harmless:
            raise UnsupportedError(f"{folder / CONFIG}: {key}={config[key]} is not supported")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise UnsupportedError(
            f"{folder / CONFIG}: init_lora_weights={init}: PEFT changes the base before it adds such an adapter; save it "
            "as one for the plain base, by save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return config


def weights_file(folder: Path) -> Path:
    """The file of an adapter's tensors.

    Raises:
        CheckpointError: there is none.
    """
    found = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if found is None:
        raise CheckpointError(f"has neither {WEIGHTS[0]} nor {WEIGHTS[1]}", path=folder)
    return found


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    source: WeightSource = open_files([weights_file(folder)])
    try:
        return {name: source.read(name) for name in source.headers}
    finally:
        source.close()


class _Reader(PeftNames):
    def __init__(self, model: CausalLM, config: Mapping[str, Any]) -> None:
        super().__init__(model)
        self.given = config
        self.config, self.parameters = lora_config(config), target_parameters(config)

    def adapter(self, tensors: Mapping[str, Tensor]) -> Adapter:
        parts: dict[str, dict[str, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name = key.removeprefix(PREFIX)
            if not tensor.isfinite().all():
                raise CheckpointError(f"'{key}' has values that are not finite: its training went wrong")
            if match := PART.search(name):
                parts.setdefault(name[: match.start()], {})[match[1] or match[3]] = tensor
            elif ".base_layer." not in f".{name}":  # PEFT's copies of an adapted embedding or head
                whole[name.replace(".modules_to_save", "")] = tensor
        updates = {}
        for theirs, found in parts.items():
            name = self._layer(theirs, found)
            updates[name] = self._update(name, theirs, found)
        if not updates and not whole:
            raise CheckpointError("holds no tensor of an adapter")
        adapter = Adapter(self.config, updates, self._whole(whole), self.given.get("base_model_name_or_path"))
        return self._with_exact_names(adapter)

    def _layer(self, theirs: str, found: Mapping[str, Tensor]) -> str:
        """The name in our model of the layer that these tensors belong to."""
        path = theirs.removesuffix(".base_layer")
        name = self.ours.get(path)
        pair = ("lora_embedding_A", "lora_embedding_B") if name == self.embedding else ("lora_A", "lora_B")
        if name in self.adaptable or name in self.experts:
            for part in pair:
                if part not in found:
                    raise CheckpointError(f"'{theirs}.{part}' is missing")
                if found[part].dim() != 2 or not found[part].is_floating_point():
                    kind = f"{tuple(found[part].shape)} of {found[part].dtype}"
                    raise CheckpointError(f"'{theirs}.{part}' is {kind}, which is no matrix of floats")
        if self.model.is_tied and (name == self.embedding or path == self.head):
            raise CheckpointError(f"has an update of '{path}', which unties it from what it is tied to{UNTIED}")
        if name is None or name not in {*self.adaptable, *self.experts}:
            raise CheckpointError(self._why_not(path))
        return f"{name}.{self._kind_of_experts(name, found)}" if name in self.experts else name

    def _why_not(self, path: str) -> str:
        """Of a name that is none of a layer that can have an update."""
        if any(re.search(pattern, f"{path}.") for pattern in self.model.carried):
            return f"has an update of '{path}', a part of the base that is carried over and is not trained here"
        if path in self.ours:
            kind = type(self.modules.get(self.ours[path])).__name__
            return f"has an update of '{path}', which takes none here ({kind}); train it whole by modules_to_save"
        return (
            f"is an adapter for another base: it has an update of '{path}', and this model no such layer"
            f"{did_you_mean(path, [self.theirs[name] for name in self.adaptable])}"
        )

    def _kind_of_experts(self, name: str, found: Mapping[str, Tensor]) -> str:
        experts = self.modules[name]
        assert isinstance(experts, Experts)
        # PEFT wraps one parameter in another; which is which is seen by their shapes.
        for kind in ("gate_up_proj", "down_proj"):
            in_features, out_features = experts.sizes_of(kind)
            if self.swaps_experts:
                in_features, out_features = out_features, in_features
            if (found["lora_A"].shape[1], found["lora_B"].shape[0]) == (in_features, out_features):
                return kind
        raise CheckpointError(f"has an update of '{name}' of other sizes than this model's experts: another base")

    def _update(self, name: str, theirs: str, found: Mapping[str, Tensor]) -> LowRankUpdate:
        pair = ("lora_embedding_A", "lora_embedding_B") if name == self.embedding else ("lora_A", "lora_B")
        a, b = (found[part] for part in pair)
        path, _, kind = name.rpartition(".")
        if path in self.experts:
            experts = self.modules[path]
            assert isinstance(experts, Experts)
            in_features, out_features = experts.sizes_of(kind)
            rank = a.shape[0] // experts.num_experts
            if a.shape[0] % experts.num_experts or b.shape[1] != a.shape[0]:
                raise CheckpointError(f"has an update of '{name}' for another number of experts: another base")
            a = a.unflatten(0, (experts.num_experts, rank))  # [E, r, in]
            b = b.unflatten(1, (rank, experts.num_experts)).permute(2, 0, 1).contiguous()  # [E, out, r]
            if self.swaps_experts:
                a, b = b.mT.contiguous(), a.mT.contiguous()
        elif name == self.embedding:
            in_features, out_features = self.model.model.embed_tokens.weight.shape
        elif name in self.routers:
            out_features, in_features = self.modules[name].weight.shape
        else:
            in_features, out_features = self.modules[name].in_features, self.modules[name].out_features
        if (a.shape[-1], b.shape[-2]) != (in_features, out_features) or a.shape[-2] != b.shape[-1]:
            raise CheckpointError(
                f"is an adapter for another base: its '{theirs}' is {b.shape[-2]} x {a.shape[-1]} of rank "
                f"{a.shape[-2]}, this model's {out_features} x {in_features}"
            )
        key, config = self._key(name), self.config
        if config.rank_of(key) != a.shape[-2]:
            raise CheckpointError(
                f"'{theirs}' has rank {a.shape[-2]} in {WEIGHTS[0]}, and {CONFIG} says {config.rank_of(key)}"
            )
        magnitude = found.get("lora_magnitude_vector")
        if config.use_dora != (magnitude is not None) or (magnitude is not None and magnitude.shape != (out_features,)):
            has = "no magnitude" if magnitude is None else f"a magnitude of {tuple(magnitude.shape)}"
            raise CheckpointError(f"'{theirs}' has {has}, and {CONFIG} says use_dora={config.use_dora}")
        return LowRankUpdate(a, b, config.scale_of(key), magnitude)

    def _key(self, name: str) -> str:
        """What patterns of ranks and alphas mean: a layer's name, or that of a parameter that was named as such."""
        weight = f"{self.of_update(name)}.weight"
        return weight if any(ends_with(weight, end) for end in self.parameters) else self.of_update(name)

    def _whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        embedding, head = f"{self.theirs[self.embedding]}.weight", f"{self.head}.weight"
        if self.model.is_tied and (embedding in tensors) != (head in tensors):
            self._check_kept_one(embedding if embedding in tensors else head)
        for theirs, tensor in tensors.items():
            is_tied_head = self.model.is_tied and theirs == head
            name = f"{self.embedding}.weight" if is_tied_head else self.ours.get(theirs)
            if name is None or name not in self.stored:
                raise CheckpointError(
                    f"is an adapter for another base: it has '{theirs}', and this model no such tensor"
                    f"{did_you_mean(theirs, [self.theirs[n] for n in self.stored])}"
                )
            if self.stored[name].shape != tensor.shape:
                rows = name.removesuffix(".weight") in (self.embedding, self.head)
                grown = " (with a vocabulary that new_tokens made larger, it needs the same new_tokens here)"
                raise CheckpointError(
                    f"is an adapter for another base{grown if rows else ''}: its '{theirs}' is {tuple(tensor.shape)}, "
                    f"this model's {tuple(self.stored[name].shape)}"
                )
            if name in whole and not torch.equal(whole[name], tensor):
                raise CheckpointError(f"has an embedding and a head that differ ('{theirs}'){UNTIED}")
            whole[name] = tensor
        return whole

    def _check_kept_one(self, theirs: str) -> None:
        """PEFT trains one of a tied pair apart from the other, which stays the base's, unless it is told to tie them."""
        if not self.given.get("ensure_weight_tying"):
            raise CheckpointError(f"has '{theirs}' trained apart from what it is tied to{UNTIED}")

    def _with_exact_names(self, adapter: Adapter) -> Adapter:
        """The config by our names: one pattern a layer that is not as most are."""
        alphas = {name: adapter.config.alpha_of(self._key(name)) for name in adapter.updates}
        ranks = {name: update.rank for name, update in adapter.updates.items()}
        rank, alpha = (
            most_common(ranks.values(), adapter.config.rank),
            most_common(alphas.values(), adapter.config.alpha),
        )
        modules = {name.rpartition(".")[0] for name in adapter.whole}
        adapter.config = LoRAConfig(
            rank=rank,
            alpha=alpha,
            dropout=adapter.config.dropout,
            targets=tuple(adapter.updates),
            use_rslora=adapter.config.use_rslora,
            use_dora=adapter.config.use_dora,
            rank_pattern={re.escape(name): value for name, value in ranks.items() if value != rank},
            alpha_pattern={re.escape(name): value for name, value in alphas.items() if value != alpha},
            modules_to_save=tuple(sorted(modules)),
        )
        return adapter
