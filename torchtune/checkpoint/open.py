"""Opening a checkpoint: everything but the weights is read, and what is wrong with it is said."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchtune.checkpoint.folder import open_weights
from torchtune.checkpoint.fp8 import FP8Weights
from torchtune.checkpoint.gguf import GGUFFile
from torchtune.checkpoint.gguf_config import hf_config, hf_generation_config, hf_tokenizer
from torchtune.checkpoint.gguf_layout import GGUFWeights
from torchtune.checkpoint.headers import TensorHeader, WeightSource, read_json
from torchtune.checkpoint.hub import resolve
from torchtune.checkpoint.layouts import in_hugging_face_layout
from torchtune.checkpoint.meta_params import config_from_params
from torchtune.checkpoint.mxfp4 import MXFP4Weights
from torchtune.checkpoint.quantized import QuantizedWeights, dense_dtype
from torchtune.distributed.part import Part, holding, parts
from torchtune.errors import CheckpointError, UnsupportedError, did_you_mean
from torchtune.modules.decoder import CausalLM
from torchtune.modules.stored import Piece, fit_layouts, stored_pieces, stored_shapes, stored_tensors
from torchtune.quantization.schemes import scheme_in
from torchtune.tokenizers.files import (
    TOKENIZER_FILES,
    has_vocabulary,
    is_vocabulary,
    open_tokenizer,
    with_tokenizer_json,
)
from torchtune.tokenizers.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TIED_HEADS = ("lm_head.weight", "embed_out.weight")
OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"\.(attention|attn)\.(bias|masked_bias)$")
TRAINABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TEMPLATE_FOLDER = "additional_chat_templates"


@dataclass
class Checkpoint:
    """A checkpoint whose headers have been read.

    Attributes:
        source: as the user named it.
        path: the folder or GGUF file.
        config: config.json, whole.
        generation_config: generation_config.json, whole, if there is one.
        files: text files of the tokenizer and template by their name in the folder; written again on save.
        weights: the tensors.
    """

    source: str
    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    files: dict[str, bytes]
    weights: WeightSource = field(repr=False)

    @property
    def tensors(self) -> Mapping[str, TensorHeader]:
        """Shape, type and place of each tensor."""
        return self.weights.headers

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(torch.Size(header.shape).numel() for header in self.tensors.values())

    @property
    def held_dtype(self) -> torch.dtype:
        """The type that most of its elements have."""
        sizes: dict[torch.dtype, int] = {}
        for header in self.tensors.values():
            if header.dtype.is_floating_point:
                sizes[header.dtype] = sizes.get(header.dtype, 0) + torch.Size(header.shape).numel()
        return max(sizes, key=lambda dtype: sizes[dtype])

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json, or nothing."""
        return dict(json.loads(self.files.get("tokenizer_config.json", b"{}")))

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            CheckpointError: it has none that can be read.
        """
        try:
            return open_tokenizer(self.files, self.config)
        except CheckpointError as error:
            raise CheckpointError(error.problem, path=self.path) from error

    @cached_property
    def chat_template(self) -> str | dict[str, str] | None:
        """The chat template, or several by name, or None."""
        named: dict[str, str] = {}
        in_config = self.tokenizer_config.get("chat_template")
        if isinstance(in_config, str):
            named["default"] = in_config
        elif isinstance(in_config, list):
            named.update({entry["name"]: entry["template"] for entry in in_config})
        # A file of its own wins over the key in tokenizer_config.json, as in transformers.
        if "chat_template.json" in self.files:
            named["default"] = json.loads(self.files["chat_template.json"])["chat_template"]
        if "chat_template.jinja" in self.files:
            named["default"] = self.files["chat_template.jinja"].decode("utf-8")
        for name, content in self.files.items():
            if name.startswith(TEMPLATE_FOLDER):
                named[Path(name).stem] = content.decode("utf-8")
        return named.get("default") if set(named) <= {"default"} else named

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a generation: generation_config's, else the config's, else the tokenizer's."""
        for place in (self.generation_config or {}, self.config):
            found = place.get("eos_token_id")
            if found is not None:
                return list(found) if isinstance(found, list) else [int(found)]
        eos = self.tokenizer().eos_id
        return [] if eos is None else [eos]

    def add_stop_ids(self, token_ids: Collection[int]) -> list[int]:
        """Let generation stop on these tokens too, in what is saved; returns those that are new."""
        stops = self.stop_ids
        new = sorted(set(token_ids) - set(stops))
        if new:
            self.generation_config = {**(self.generation_config or {}), "eos_token_id": [*stops, *new]}
        return new

    def check(self, model: CausalLM, tokenizer: Tokenizer | None = None) -> None:
        """Compare the headers with a model (on any device, meta included); no weight is read.

        Where the family's checkpoints are written in several ways, the model takes on the one of this checkpoint.

        Raises:
            CheckpointError: tensors missing, left over or of another shape; or tokens without an embedding.
        """
        fit_layouts(model, self.tensors)
        expected = stored_shapes(model)
        left_over = set(self.tensors) - set(expected) - self.carried(model)
        problems = [
            f"tensor '{name}' is missing{did_you_mean(name, left_over)}"
            for name in expected
            if name not in self.tensors
        ]
        problems += [
            f"tensor '{name}' belongs to no part of this model ({self.tensors[name].file.name})"
            for name in sorted(left_over)
        ]
        for name, shape in expected.items():
            if name in self.tensors and self.tensors[name].shape != shape:
                found = self.tensors[name]
                problems.append(
                    f"tensor '{name}' has the shape {found.shape}, the config says {shape} ({found.file.name})"
                )
            elif name in self.tensors and self.tensors[name].dtype not in TRAINABLE:
                found = self.tensors[name]
                problems.append(f"tensor '{name}' has the type {found.dtype}, not a float's ({found.file.name})")
        if problems:
            shown = "\n  ".join(problems[:10]) + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
            raise CheckpointError(f"does not fit its config.json:\n  {shown}", path=self.path)
        if tokenizer is not None:
            self._check_vocabulary(tokenizer, model.model.embed_tokens.num_embeddings)

    def load_into(
        self,
        model: CausalLM,
        *,
        device: torch.device | str = "cpu",
        param_dtype: torch.dtype = torch.float32,
        place: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        """Give a meta model its parameters, tensor by tensor; of those that ranks share, this rank's part alone.

        Args:
            param_dtype: the type of the parameters in memory; saved buffers stay float32.
            place: in its stead, makes of a parameter's name and stored value what the model is to hold. It is given
                what this rank holds, or the whole where its `needs_whole(name)` says so; what it makes is this rank's.
        Raises:
            CheckpointError: as `check`.
        """
        self.check(model)
        held, pieces = parts(model), stored_pieces(model)
        self._check_tied_head(model, held)
        needs_whole = getattr(place, "needs_whole", lambda name: False)
        # The largest first: what is read before it is cast lies beside it for a moment, and then there is room.
        in_order = sorted(stored_tensors(model).items(), key=lambda named: held[named[0]].numel, reverse=True)
        for name, tensor in in_order:
            part = held[name]
            if place is not None and isinstance(tensor, nn.Parameter):
                wanted = Part.all_of(part.whole) if needs_whole(name) else part
                stored = self.read_parameter(wanted, pieces[name]).to(device)
                try:
                    value = place(name, stored)
                except CheckpointError as error:
                    raise CheckpointError(f"tensor '{name}': {error.problem}", path=self.path) from error
            else:
                dtype = param_dtype if isinstance(tensor, nn.Parameter) else torch.float32
                value = self.read_parameter(part, pieces[name], dtype=dtype, device=device)
            _assign(model, name, holding(tensor, value) if isinstance(tensor, nn.Parameter) else value)
        self.weights.close()

    def read_parameter(
        self,
        part: Part,
        pieces: Sequence[Piece],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """A part of the parameter that has these pieces in the checkpoint.

        Args:
            dtype: the one that it is wanted in; by default the stored one.
        """
        first = self.tensors[pieces[0].name]
        if [piece.index for piece in pieces] == [()] and dtype in (None, first.dtype):
            read = self.weights.read_part(pieces[0].name, part)
            return read.to(device=device, dtype=dtype)  # a GGUF's blocks become float32, whatever they are saved as
        held = torch.empty(part.shape, dtype=dtype or first.dtype, device=device)
        for piece in pieces:
            common = part.meet(piece.region(part.whole))
            stored = piece.stored(common.inside(piece.region(part.whole)))
            places = [mine for mine, _ in part.overlaps(common)]
            # One copy of the weights in memory: what is one block here is read into its place.
            if len(places) == 1:
                self.weights.read_into(held[places[0]].view(stored.shape), piece.name, stored)
            elif places:
                read = self.weights.read_part(piece.name, stored).view(common.shape)
                for mine, theirs in part.overlaps(common):
                    held[mine].copy_(read[theirs])
        return held

    def reader(self, model: CausalLM) -> Callable[[str], Tensor]:
        """Reads a parameter of `model`, by its name there, whole and in its stored type."""
        held, pieces = parts(model), stored_pieces(model)
        return lambda name: self.read_parameter(Part.all_of(held[name].whole), pieces[name])

    def carried(self, model: CausalLM) -> set[str]:
        """The tensors that are not the model's and are written again as they were, where it can be saved so.

        They are a copy of a tied head, what old files keep of rotary frequencies and masks, and parts of a larger
        model.
        """
        patterns = (*OLD_BUFFERS, *model.carried)
        found = {name for name in self.tensors if any(re.search(pattern, name) for pattern in patterns)}
        if model.is_tied:
            found |= {name for name in self.tensors if name.endswith(TIED_HEADS)}
        return found - {piece.name for pieces in stored_pieces(model).values() for piece in pieces}

    def _check_tied_head(self, model: CausalLM, held: Mapping[str, Part]) -> None:
        """A head beside a tied embedding must be its copy: it is read as one, and saved as one. Each rank sees its part."""
        if not model.is_tied:
            return
        name = model.vocabulary_parameters[0]
        part, embedding = held[name], stored_pieces(model)[name][0].name
        for head in sorted(self.carried(model)):
            if head.endswith(TIED_HEADS) and not torch.equal(
                self.weights.read_part(head, part), self.weights.read_part(embedding, part)
            ):
                raise CheckpointError(
                    f"its config ties the head to the embedding, but '{head}' and '{embedding}' differ; where the "
                    "head is meant, set tie_word_embeddings to false in config.json, else remove it",
                    path=self.path,
                )

    def _check_vocabulary(self, tokenizer: Tokenizer, num_rows: int) -> None:
        beyond = {token: i for token, i in tokenizer.added_tokens.items() if i >= num_rows and i != tokenizer.pad_id}
        num_beyond = tokenizer.vocab_size - num_rows
        if beyond or (num_beyond > 0 and tokenizer.pad_id != tokenizer.vocab_size - 1):
            named = ", ".join(f"'{token}' ({i})" for token, i in list(beyond.items())[:8])
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the embedding {num_rows} rows: {named} have no row. "
                "Use the tokenizer that belongs to these weights",
                path=self.path,
            )


class NoWeights(WeightSource):
    """Stands where a checkpoint was opened without its weights."""

    def __init__(self) -> None:
        self.headers: dict[str, TensorHeader] = {}

    def read(self, name: str) -> torch.Tensor:
        """Refused."""
        raise CheckpointError(f"was opened without weights, so '{name}' can't be read")

    def close(self) -> None:
        """Nothing is open."""


def open_checkpoint(source: str | Path, *, tokenizer: str | Path | None = None, weights: bool = True) -> Checkpoint:
    """Open a folder, a file of weights or a hub id; headers alone are read.

    A folder is Hugging Face's, Meta's (`params.json` and `consolidated.*.pth`) or the first library's. A file is
    GGUF, or one of such a folder that has several.

    Args:
        tokenizer: a folder, or a tokenizer.json, whose tokenizer replaces the checkpoint's.
        weights: false for config, tokenizer and template alone; of a folder, no weight file needs to be there.
    Raises:
        CheckpointError, UnsupportedError: says which file is wrong and what to do.
    """
    path = resolve(str(source), weights=weights)
    is_gguf = path.suffix == ".gguf" and path.is_file()
    checkpoint = _open_gguf(str(source), path) if is_gguf else _open_folder(str(source), path, weights)
    if weights:
        _check_config(checkpoint)
    if tokenizer is not None:
        checkpoint.files = open_tokenizer_files(tokenizer)
    else:
        checkpoint.files = _with_tokenizer_json(checkpoint.files, checkpoint.config, path)
    return checkpoint


def open_tokenizer_files(source: str | Path) -> dict[str, bytes]:
    """The text files of a tokenizer and its template, by their names in a checkpoint's folder.

    Args:
        source: a folder or hub id, or a file: a tokenizer.json of any name, a .model or .tiktoken file. What else
            says something of the tokenizer lies beside it.
    Raises:
        CheckpointError: there is no such place, or no tokenizer in it.
    """
    path = resolve(str(source), weights=False)
    folder = path if path.is_dir() else path.parent
    files = text_files(folder)
    if path.is_file():
        files = {name: content for name, content in files.items() if not is_vocabulary(name)}
        name = {".model": "tokenizer.model", ".tiktoken": path.name}.get(path.suffix, "tokenizer.json")
        files[name] = path.read_bytes()
    if not has_vocabulary(files):
        raise CheckpointError("has no tokenizer.json, nor another file with a vocabulary", path=path)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    return _with_tokenizer_json(files, config, path)


def _with_tokenizer_json(files: dict[str, bytes], config: Mapping[str, Any], path: Path) -> dict[str, bytes]:
    try:
        return with_tokenizer_json(files, config)
    except CheckpointError as error:
        raise CheckpointError(error.problem, path=path) from error


def _open_gguf(source: str, path: Path) -> Checkpoint:
    file = GGUFFile(path)
    config = hf_config(file)
    return Checkpoint(source, path, config, hf_generation_config(file), hf_tokenizer(file), GGUFWeights(file, config))


def _open_folder(source: str, path: Path, with_weights: bool) -> Checkpoint:
    folder, named = (path, None) if path.is_dir() else (path.parent, path)
    config_json, params_json = folder / "config.json", folder / "params.json"
    if not config_json.exists() and (folder / "adapter_config.json").exists():
        raise UnsupportedError(f"{folder} is an adapter; name the checkpoint that it belongs to")
    if not config_json.exists() and not params_json.exists():
        raise CheckpointError("has no config.json, nor a params.json of Meta's, so it is no checkpoint", path=folder)
    stored: WeightSource = open_weights(folder, named) if with_weights else NoWeights()
    config = read_json(config_json) if config_json.exists() else config_from_params(params_json, stored)
    generation = folder / "generation_config.json"
    generation_config = read_json(generation) if generation.exists() else None
    weights = in_hugging_face_layout(stored, config)
    return Checkpoint(source, folder, config, generation_config, text_files(folder), weights)


def text_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder's tokenizer and chat template, by name."""
    names = [
        name for name in (*TOKENIZER_FILES, "chat_template.json", "chat_template.jinja") if (folder / name).exists()
    ]
    names += [file.name for file in sorted(folder.glob("*.tiktoken"))]
    names += [f"{TEMPLATE_FOLDER}/{file.name}" for file in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))]
    return {name: (folder / name).read_bytes() for name in names}


def _check_config(checkpoint: Checkpoint) -> None:
    """Unpack what can be, refuse what can't be read, and say where two spellings disagree."""
    config = checkpoint.config
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method", "unknown")
    if quantization and method == "mxfp4":
        checkpoint.weights = MXFP4Weights(checkpoint.weights)
    elif quantization and method == "fp8":
        checkpoint.weights = FP8Weights(checkpoint.weights, quantization)
    elif quantization and (scheme := scheme_in(quantization)) is not None:
        checkpoint.weights = QuantizedWeights(checkpoint.weights, scheme, dense_dtype(config))
    elif quantization:
        raise UnsupportedError(
            f"{checkpoint.path}: its weights are quantised by '{method}' in a way that is not read here; "
            "use the checkpoint that it was made from"
        )
    spellings = {key: config[key] for key in ("dtype", "torch_dtype") if config.get(key) not in (None, "auto")}
    for key, value in spellings.items():
        if not isinstance(getattr(torch, str(value).removeprefix("torch."), None), torch.dtype):
            raise CheckpointError(f"config.json: {key}: '{value}' is no dtype", path=checkpoint.path)
    if len(set(spellings.values())) > 1:
        logger.warning("%s: dtype is %s and torch_dtype %s; dtype wins", checkpoint.path, *spellings.values())


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module_name, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module_name), attribute, tensor)
