"""The adapters of a run: found, compared with the base, and given their names."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtune.adapters.adapter import Adapter
from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.lora import apply_lora
from torchtune.checkpoint.headers import read_json, read_safetensors_places
from torchtune.checkpoint.hub import HUB_ID, resolve
from torchtune.checkpoint.open import Checkpoint
from torchtune.checkpoint.peft_read import read_adapter, weights_file
from torchtune.checkpoint.training_state import run_params
from torchtune.errors import CheckpointError, ConfigError, Problems
from torchtune.modules.decoder import CausalLM
from torchtune.recipes.lora_params import LoRAParams, lora_config
from torchtune.training.progress import say

# What of a tensor is looked at to tell a base from another.
SMALL = 100_000  # elements: up to here all of it
SAMPLE_BYTES = 4096


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
    if params.adapter is None:
        return Adapters(_with_vocabulary(lora_config(params), params, model), None, frozen)
    start = read_adapter(params.adapter, model)
    return Adapters(_going_on(params, start, model), start, frozen)


def check_adapters(params: LoRAParams, checkpoint: Checkpoint, model: CausalLM) -> None:
    """Everything that can be known to be wrong with the params' adapters; the model on the meta device is changed.

    Raises:
        ConfigError: all of it.
    """
    problems = Problems()

    def read(key: str, source: str) -> Adapter | None:
        with problems.caught(key):
            adapter = read_adapter(source, model)
            compare_bases(source, adapter, params.model_checkpoint, checkpoint.config)
            return adapter
        return None

    for source in params.frozen_adapters:
        read("frozen_adapters", source)
    if params.adapter is not None:
        _tell_of_other_ground(params)
    config = lora_config(params)
    with problems.caught():
        if params.adapter is None:
            config = _with_vocabulary(config, params, model)
            if grown := config.modules_to_save[len(params.modules_to_save) :]:
                say(f"the vocabulary grows, so {' and '.join(grown)} are trained whole and saved with the adapter")
            apply_lora(model, config)
        elif start := read("adapter", params.adapter):
            apply_lora(model, _going_on(params, start, model), is_given=True)
    problems.raise_all()


def compare_bases(source: str, adapter: Adapter, base: str, config: Mapping[str, Any]) -> None:
    """Look at the base that an adapter names, where another one is given that it fits.

    Args:
        base, config: the one that is given.
    Raises:
        CheckpointError: the other lies here and is of another model_type: that it fits is chance.
    """
    named = adapter.base
    if not named:
        return
    others = Path(named) / "config.json"
    other_type = read_json(others).get("model_type") if others.is_file() else None
    if other_type not in (None, config["model_type"]):
        raise CheckpointError(
            f"is an adapter for {named}, a {other_type}, and {base} is a {config['model_type']} with layers of the same "
            f"names and sizes; give model_checkpoint={named}",
            path=source,
        )
    if Path(named).name != Path(base.partition("@")[0]).name:
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


def tell_local_base(checkpoint: Checkpoint) -> None:
    """Say so where an adapter will name its base by a path, which nobody else has."""
    name = base_name(checkpoint)
    if not HUB_ID.fullmatch(name) or Path(name).exists():
        say(
            f"the adapter will name its base by its path here, {name}; before others load it, write the base's hub id "
            "as base_model_name_or_path into its adapter_config.json"
        )


def tell_carried_path(checkpoint: Checkpoint) -> None:
    """Say so where the config of a merged model, which is the base's, holds a path."""
    named = checkpoint.config.get("_name_or_path")
    if isinstance(named, str) and Path(named).is_absolute():
        say(f"config.json keeps the base's _name_or_path, {named}: a path of the machine that the base was saved on")


def tell_kept_whole(names: Sequence[str], num_packed: int) -> None:
    """Say so where quantised weights are on every rank, of which each was to have a share."""
    if names:
        say(
            f"{len(names)} of {num_packed} quantised weights can't be shared out among the ranks of data_parallel_shard, "
            f"by rows or experts and between blocks, and are whole on each ('{names[0]}'); a number of ranks that "
            "divides them would save that memory"
        )


def fingerprint(checkpoint: Checkpoint, frozen_adapters: Sequence[str] = ()) -> str:
    """Tells whether a run stands on the same weights: all names and shapes, small tensors whole, adapters whole.

    Of a large tensor, some of the bytes in its middle: a base with an adapter merged has the same norms. That is
    looked at in safetensors files alone, of which a part can be read.
    """
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        header = checkpoint.tensors[name]
        digest.update(f"{name} {header.shape} {header.dtype}\n".encode())
        if math.prod(header.shape) <= SMALL:
            digest.update(checkpoint.weights.read(name).float().numpy().tobytes())
    files = {header.file for header in checkpoint.tensors.values() if header.file.suffix == ".safetensors"}
    places = {name: place for file in files for name, place in read_safetensors_places(file).items()}
    for _, (header, start) in sorted(places.items()):
        num_bytes = math.prod(header.shape) * header.dtype.itemsize
        with header.file.open("rb") as file:
            file.seek(start + num_bytes // 2)
            digest.update(file.read(min(num_bytes - num_bytes // 2, SAMPLE_BYTES)))
    for source in frozen_adapters:
        digest.update(weights_file(resolve(source)).read_bytes())
    return digest.hexdigest()


def check_same_base(now: str, before: str, checkpoint: Checkpoint, folder: Path) -> None:
    """Refuse to resume on another base than the run began with.

    Args:
        now, before: their fingerprints.
    Raises:
        CheckpointError: its weights are others.
    """
    if now != before:
        raise CheckpointError(
            f"was trained on other weights than {checkpoint.source} has now, or over other frozen_adapters; resume on "
            "those that the run began with, or begin a run with adapter= this folder",
            path=folder,
        )


def _with_vocabulary(config: LoRAConfig, params: LoRAParams, model: CausalLM) -> LoRAConfig:
    """Rows that the base has not are of use only where they are trained, and saved with the adapter."""
    if not params.new_tokens and params.pad_vocab_to_multiple_of is None:
        return config
    names = {name.rpartition(".")[0] for name in model.vocabulary_parameters}
    missing = sorted(name for name in names if not any(name.endswith(given) for given in config.modules_to_save))
    return replace(config, modules_to_save=(*config.modules_to_save, *missing))


def _going_on(params: LoRAParams, start: Adapter, model: CausalLM) -> LoRAConfig:
    """The config of a run that goes on from an adapter: the adapter's own."""
    _refuse_other_values(params, start.config)
    if missing := set(_with_vocabulary(start.config, params, model).modules_to_save) - set(
        start.config.modules_to_save
    ):
        raise ConfigError(
            f"the vocabulary grows, and the adapter that is gone on from does not train '{min(missing)}'; grow it where "
            "the adapter begins",
            key="new_tokens",
        )
    return replace(start.config, dropout=params.lora_dropout)  # of training, so the run's and not the adapter's


def _tell_of_other_ground(params: LoRAParams) -> None:
    """Say so where the adapter that is gone on from was trained over another base than it gets here."""
    source = str(params.adapter)
    try:
        run = run_params(resolve(source))
    except CheckpointError:  # `read` has told of it
        return
    before, now = run.get("base_quantization", params.base_quantization), params.base_quantization
    if before != now:
        say(f"{source}: it was trained over a base in base_quantization={before}, and goes on over {now}")
    elif now != "none" and run.get("lora_init") == "pissa":
        say(f"{source}: its base had lost PiSSA's part before it was quantised to {now}; here it is quantised whole")
    if (below := run.get("frozen_adapters", [])) != params.frozen_adapters and run:
        say(f"{source}: it was trained over frozen_adapters={below}, and goes on over {params.frozen_adapters}")
    if (dropped := run.get("lora_dropout", params.lora_dropout)) != params.lora_dropout:
        say(f"{source}: it was trained with lora_dropout={dropped}, and goes on with {params.lora_dropout}")


def refuse_other_start(before: Mapping[str, object], params: LoRAParams) -> None:
    """A run that is resumed can't begin otherwise than it did: what PiSSA trains is of another shape in the files.

    Raises:
        ConfigError: lora_init was pissa and is not, or the other way round.
    """
    was = before.get("lora_init", params.lora_init)
    if was != params.lora_init and "pissa" in (was, params.lora_init):
        raise ConfigError(f"'{params.lora_init}', and the run began with '{was}'; resume with that", key="lora_init")


def _refuse_other_values(params: LoRAParams, own: LoRAConfig) -> None:
    """Keys given beside an adapter to go on from must say what it says."""
    defaults = {field.name: field.default for field in dataclasses.fields(LoRAParams)}
    problems = Problems()
    pairs = {"lora_rank": own.rank, "lora_alpha": own.alpha, "use_rslora": own.use_rslora, "use_dora": own.use_dora}
    for key, value in pairs.items():
        given, default = getattr(params, key), getattr(defaults[key], "default", defaults[key])
        if given not in (default, value):
            problems.add(key, f"{given}, and the adapter has {value}; leave it out to go on with the adapter's")
    given_anew = [
        k for k in ("lora_layers", "lora_rank_pattern", "lora_alpha_pattern", "modules_to_save") if getattr(params, k)
    ]
    if params.lora_targets != "all-linear":
        given_anew.append("lora_targets")
    for key in given_anew:
        problems.add(key, "the adapter that is gone on from has its own; leave it out")
    problems.raise_all()
