"""What every family is held to: transformers' model of the same random checkpoint, loaded from disk by both.

A family's test makes configs and calls the checks here. Checkpoints go through `save_pretrained`, so that names
and layouts are those of the hub's files, whatever either side has in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.auto import AutoModelForCausalLM, AutoModelForImageTextToText

from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import Checkpoint, open_checkpoint
from torchtune.checkpoint.save import save_model
from torchtune.modules.decoder import CausalLM
from torchtune.modules.decoding import ready_to_decode
from torchtune.modules.documents import Documents
from torchtune.modules.stored import as_stored

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LENGTHS = (9, 1, 14)


def auto_class(config: Any) -> Any:
    """transformers' loader of the config's models: of those that see, some have one of their own."""
    known = AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if type(config) in known else AutoModelForImageTextToText


def random_model(config: Any, *, seed: int = 0, std: float = 0.2) -> Any:
    """transformers' model of a config, random everywhere: fresh norms and biases would hide a dropped one."""
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and (isinstance(tensor, torch.nn.Parameter) or "correction_bias" in name):
                tensor.normal_(mean=1.0 if tensor.dim() == 1 else 0.0, std=std)
    return model


def save_random(folder: Path, config: Any, **save: Any) -> Any:
    """Write a random checkpoint and return transformers' model of it."""
    model = random_model(config)
    model.save_pretrained(folder, **save)
    return model


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_close(actual: Tensor, expected: Tensor, share: float, what: str) -> None:
    """Within `share` of the expected tensor's largest value."""
    bound = share * expected.abs().max().item()
    worst = (actual - expected).abs().max().item()
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} and {tuple(expected.shape)}"
    assert worst <= bound, f"{what}: differs by {worst:.3g}, allowed {bound:.3g}"


def check_against_transformers(folder: Path, config: Any, *, length: int = 30) -> CausalLM:
    """Logits within 1e-5 and every parameter's gradient within 1e-4, each of its tensor's maximum, in float32."""
    theirs = save_random(folder / "model", config)
    ours = load_model(folder / "model", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.get_text_config().vocab_size, (2, length), generator=generator)
    expected = theirs(ids).logits
    assert_close(ours(ids), expected, 1e-5, "logits")
    chosen = torch.rand(2, length - 1, generator=generator) < 0.6
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = torch.where(chosen, ids[:, 1:], -100)
    ours(ids, labels=labels).backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    check_gradients(folder, ours, theirs)
    return ours


def check_gradients(folder: Path, ours: CausalLM, theirs: Any) -> None:
    """Compare gradients under the checkpoint's names: theirs are written as if they were a model's weights."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(folder / "gradients")
    expected = stored_tensors(folder / "gradients")
    missing = [name for name, parameter in ours.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient: {missing}"
    found = dict(as_stored(ours, {name: parameter.grad for name, parameter in ours.named_parameters()}))
    assert found.keys() <= expected.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected[name], 1e-4, f"gradient of {name}")


def check_packed(model: CausalLM) -> None:
    """A document's logits do not depend on its neighbours (float64: no rounding to hide behind)."""
    model = model.double()
    documents = [torch.randint(0, 97, (length,)) for length in LENGTHS]
    alone = torch.cat([model(document[None])[0] for document in documents])
    packed = model(torch.cat(documents), Documents.from_lengths(LENGTHS))
    torch.testing.assert_close(packed, alone)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    torch.testing.assert_close(model(torch.cat(documents), positions=positions), alone)


def check_cached(model: CausalLM) -> None:
    """Two documents of different lengths, fed in pieces, give the logits of the whole; joined projections too."""
    model = model.double()
    one, two = torch.randint(0, 97, (18,)), torch.randint(0, 97, (15,))
    expected = model(one[None])[0], model(two[None])[0]
    _check_pieces(model, one, two, expected)
    ready_to_decode(model)
    with torch.no_grad():
        _check_pieces(model, one, two, expected)


def _check_pieces(model: CausalLM, one: Tensor, two: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    cache = model.empty_cache(2)
    got_one, got_two, seen = [], [], [0, 0]
    for new in ([5, 2], [1, 1], [3, 4], [1, 1], [2, 1], [6, 6]):
        ids = torch.cat([one[seen[0] : seen[0] + new[0]], two[seen[1] : seen[1] + new[1]]])
        logits = model(ids, Documents.from_lengths(new, starts=seen), cache=cache)
        got_one.append(logits[: new[0]])
        got_two.append(logits[new[0] :])
        seen = [seen[0] + new[0], seen[1] + new[1]]
    torch.testing.assert_close(torch.cat(got_one), expected[0])
    torch.testing.assert_close(torch.cat(got_two), expected[1])


def check_round_trip(folder: Path, config: Any, *, dtype: torch.dtype = torch.float32) -> None:
    """Load then save changes no byte of any tensor, no name, no field of the config; sharded in, sharded out."""
    source, target = folder / "source", folder / "target"
    model = random_model(config).to(dtype)
    model.save_pretrained(source, max_shard_size="60KB")
    checkpoint = open_checkpoint(source)
    model = load_model(source)
    save_model(target, model, checkpoint)
    before, after = stored_tensors(source), stored_tensors(target)
    assert before.keys() == after.keys()
    changed = [
        name for name in before if before[name].dtype != after[name].dtype or not before[name].equal(after[name])
    ]
    assert not changed, f"changed: {changed}"
    assert json.loads((source / "config.json").read_text()) == json.loads((target / "config.json").read_text())
    assert len(list(target.glob("model-*.safetensors"))) > 1
    assert before.keys() >= model.state_dict().keys()
    check_changes_arrive(folder / "trained", model, checkpoint)
    _, info = auto_class(config).from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def check_changes_arrive(folder: Path, model: CausalLM, checkpoint: Checkpoint) -> None:
    """Every parameter that training changes is saved as it is, and once: the folder opens again."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    save_model(folder, model, checkpoint)
    saved = dict(load_model(folder).named_parameters())
    lost = [name for name, parameter in model.named_parameters() if not parameter.equal(saved[name])]
    assert not lost, f"lost on save: {lost}"


def check_family(folder: Path, config: Any, *, length: int = 30) -> None:
    """All of the above for one config."""
    model = check_against_transformers(folder, config, length=length)
    check_packed(model)
    check_cached(model)
    check_round_trip(folder, config)


def check_other_spelling(folder: Path, config: Any, changes: dict[str, Any], *, without: Collection[str] = ()) -> None:
    """A config.json as another version wrote it: both sides load the same folder and give the same logits.

    Args:
        config: what the checkpoint is made from.
        changes: keys of the config.json, added or replaced; a dict is merged into a dict.
        without: keys that it leaves out; `text_config.head_dim` is a key within another.
    """
    save_random(folder, config)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for key in without:
        *outer, last = key.split(".")
        inner = values
        for name in outer:
            inner = inner[name]
        inner.pop(last)
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    path.write_text(json.dumps(values))
    theirs = auto_class(config).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ids = torch.randint(0, config.get_text_config().vocab_size, (1, 30), generator=torch.Generator().manual_seed(1))
    assert_close(load_model(folder, dtype=torch.float32)(ids), theirs(ids).logits, 1e-5, "logits")


def all_under_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model that sees, as transformers 4.52 and later wrote it: all but the head stands under `model.`."""
    prefixes = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
    prefixes |= {name: f"model.{name}" for name in ("vision_tower.", "multi_modal_projector.")}
    return {
        new + name.removeprefix(old): tensor
        for name, tensor in tensors.items()
        for old, new in prefixes.items()
        if name.startswith(old)
    }


def check_rewritten(folder: Path, config: Any, rewrite: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """A checkpoint whose tensors were written otherwise: the same logits, and load then save changes none of them.

    Args:
        rewrite: from the tensors that transformers writes to those that the folder shall have.
    """
    source, target = folder / "source", folder / "target"
    expected = save_random(source, config)
    tensors = rewrite(stored_tensors(source))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = load_model(source)
    ids = torch.randint(0, config.get_text_config().vocab_size, (1, 30), generator=torch.Generator().manual_seed(1))
    assert_close(model(ids), expected(ids).logits, 1e-5, "logits")
    save_model(target, model, open_checkpoint(source))
    saved = stored_tensors(target)
    assert saved.keys() == tensors.keys()
    assert all(tensor.equal(tensors[name]) for name, tensor in saved.items())
    theirs, info = auto_class(config).from_pretrained(target, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"]
    assert_close(theirs(ids).logits, expected(ids).logits, 1e-5, "logits of what was saved")


def check_router_loss(folder: Path, config: Any) -> None:
    """With `output_router_logits` the training loss has the load-balancing loss in it, gradients too."""
    theirs = save_random(folder / "model", config)
    ours = load_model(folder / "model", dtype=torch.float32)
    ids = torch.randint(0, 97, (2, 30))
    labels = torch.where(torch.rand(2, 30) < 0.6, ids, -100)
    expected = theirs(ids, labels=labels)
    assert expected.aux_loss is not None
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = labels[:, 1:]  # theirs shifts labels itself
    num_trained = int((targets != -100).sum())
    loss = ours(ids, labels=targets)
    torch.testing.assert_close(loss / num_trained, expected.loss)
    loss.backward()
    (expected.loss * num_trained).backward()
    check_gradients(folder, ours, theirs)
