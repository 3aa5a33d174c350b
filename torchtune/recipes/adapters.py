"""The adapters of a run: found, compared with the base, and given their names."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from torchtune.adapters.adapter import Adapter
from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.lora import apply_lora
from torchtune.checkpoint.hub import HUB_ID
from torchtune.checkpoint.open import Checkpoint
from torchtune.checkpoint.peft_read import read_adapter
from torchtune.errors import CheckpointError, ConfigError
from torchtune.modules.decoder import CausalLM
from torchtune.recipes.lora_params import LoRAParams, lora_config
from torchtune.training.progress import say

SMALL = 100_000  # elements; the tensors that tell a base from another are norms and biases


@dataclass(frozen=True)
class Adapters:
    """What is trained and what stands below it.

    Attributes:
        config: of the adapter that is trained.
        start: the adapter that is gone on from, if any.
        frozen: adapters that are part of the base.
    """

    config: LoRAConfig
    start: Adapter | None
    frozen: tuple[Adapter, ...]


def open_adapters(params: LoRAParams, model: CausalLM) -> Adapters:
    """Read what the params name, for a model as it was built.

    Raises:
        CheckpointError: an adapter that is damaged, or for another base.
        ConfigError: keys that say otherwise than the adapter that is gone on from.
    """
    frozen = tuple(read_adapter(source, model) for source in params.frozen_adapters)
    config = _with_vocabulary(lora_config(params), params, model)
    if params.adapter is None:
        return Adapters(config, None, frozen)
    start = read_adapter(params.adapter, model)
    _refuse_other_values(params, start.config)
    return Adapters(replace(start.config, dropout=params.lora_dropout or start.config.dropout), start, frozen)


def check_adapters(params: LoRAParams, checkpoint: Checkpoint, model: CausalLM) -> None:
    """Everything that can be known to be wrong with the params' adapters; the model on the meta device is changed.

    Raises:
        ConfigError, CheckpointError: as `open_adapters` and `apply_lora`.
    """
    adapters = open_adapters(params, model)
    for source, adapter in zip(
        [*params.frozen_adapters, params.adapter], [*adapters.frozen, adapters.start], strict=True
    ):
        if adapter is not None and source is not None:
            warn_of_other_base(source, adapter, params.model_checkpoint)
    apply_lora(model, adapters.config)


def warn_of_other_base(source: str, adapter: Adapter, base: str) -> None:
    """Say so where an adapter that fits names another base."""
    named = adapter.base
    if named and Path(named).name != Path(base.partition("@")[0]).name:
        say(f"{source}: it says that its base is {named}; it fits {base}, which is used")


def base_name(checkpoint: Checkpoint) -> str:
    """What an adapter says its base is: the hub id where it is known, else the path as the user named it."""
    source = checkpoint.source.partition("@")[0]
    if not Path(source).exists() and HUB_ID.fullmatch(source):
        return source
    # A snapshot in huggingface_hub's cache lies in models--ORG--NAME/snapshots/REVISION.
    cached = next((part for part in checkpoint.path.resolve().parts if part.startswith("models--")), None)
    if cached is not None:
        return cached.removeprefix("models--").replace("--", "/", 1)
    named = checkpoint.config.get("_name_or_path")
    return named if isinstance(named, str) and HUB_ID.fullmatch(named) and not Path(named).exists() else source


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells whether two checkpoints are the same: all names and shapes, and the values of small tensors."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        header = checkpoint.tensors[name]
        digest.update(f"{name} {header.shape} {header.dtype}\n".encode())
        num_elements = 1
        for size in header.shape:
            num_elements *= size
        if num_elements <= SMALL:
            digest.update(checkpoint.weights.read(name).float().numpy().tobytes())
    return digest.hexdigest()


def check_same_base(checkpoint: Checkpoint, before: str, folder: Path) -> None:
    """Refuse to resume on another base than the run began with.

    Raises:
        CheckpointError: its weights are others.
    """
    if fingerprint(checkpoint) != before:
        raise CheckpointError(
            f"was trained on other weights than {checkpoint.source} has now; resume on the base that the run began "
            "with, or begin a run with adapter= this folder",
            path=folder,
        )


def _with_vocabulary(config: LoRAConfig, params: LoRAParams, model: CausalLM) -> LoRAConfig:
    """Rows that the base has not are of use only where they are trained, and saved with the adapter."""
    if not params.new_tokens and params.pad_vocab_to_multiple_of is None:
        return config
    names = {name.rpartition(".")[0] for name in model.vocabulary_parameters}
    missing = sorted(name for name in names if not any(name.endswith(given) for given in config.modules_to_save))
    if missing:
        say(f"the vocabulary grows, so {' and '.join(missing)} are trained whole and saved with the adapter")
    return replace(config, modules_to_save=(*config.modules_to_save, *missing))


def _refuse_other_values(params: LoRAParams, own: LoRAConfig) -> None:
    """Keys given beside an adapter to go on from must say what it says."""
    defaults = {field.name: field.default for field in dataclasses.fields(LoRAParams)}
    problems = []
    pairs = {"lora_rank": own.rank, "lora_alpha": own.alpha, "use_rslora": own.use_rslora, "use_dora": own.use_dora}
    for key, value in pairs.items():
        given, default = getattr(params, key), getattr(defaults[key], "default", defaults[key])
        if given not in (default, value):
            problems.append(f"{key}: {given}, and the adapter has {value}; leave it out to go on with the adapter's")
    for key in ("lora_layers", "lora_rank_pattern", "lora_alpha_pattern", "modules_to_save"):
        if getattr(params, key):
            problems.append(f"{key}: the adapter that is gone on from has its own; leave it out")
    if params.lora_targets != "all-linear":
        problems.append("lora_targets: the adapter that is gone on from has its own; leave it out")
    if problems:
        raise ConfigError("\n".join(problems), key="adapter")
