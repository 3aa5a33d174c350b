"""A model and the same one split over ranks: what each gives, and how gradients are put together again.

Functions for ranks stand here and not beside their tests, which import transformers: each rank would wait for it.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist

from tests.traced import apply_traced
from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.lora import LoRALinear, apply_lora
from torchtune.distributed.mesh import Axis
from torchtune.distributed.part import parts
from torchtune.models.build import build_model
from torchtune.modules.documents import Documents
from torchtune.modules.losses import LinearCrossEntropy
from torchtune.modules.vocabulary import VocabularyShare
from torchtune.parallel.splits import unsplit_parameters
from torchtune.parallel.tensor_parallel import apply_tensor_parallel
from torchtune.training.activation_checkpointing import apply_activation_checkpointing

LENGTHS = (9, 1, 14)


def whole_axis():
    """An axis of all ranks."""
    return Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


def on_meta(config, lora=None):
    """The model of a config, with an adapter of these options if there are any."""
    with torch.device("meta"):
        model = build_model(config)
    if lora is not None:
        apply_lora(model, LoRAConfig(**{"rank": 3, "alpha": 5.0} | lora))
    return model


def random_model(config, lora=None):
    """A float64 model, random everywhere; the same on each rank."""
    model = on_meta(config, lora)
    fill(model, {})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, tensor in sorted(tensors_of(model).items()):
            tensor.normal_(mean=1.0 if tensor.dim() == 1 else 0.0, std=0.2, generator=generator)
    return model


def fill(model, whole):
    """Give a model on the meta device memory, and of the whole tensors its parts."""
    held = parts(model)
    model.to_empty(device="cpu").double()
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            if name in whole:
                tensor.copy_(held[name].of(whole[name]))


def tensors_of(model):
    """Parameters and buffers by name."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def batch(vocab_size):
    """Ids, labels of which some are untrained, and documents."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab_size, (sum(LENGTHS),), generator=generator)
    is_trained = torch.rand(sum(LENGTHS), generator=generator) < 0.6
    return ids, torch.where(is_trained, ids.roll(-1), -100), Documents.from_lengths(LENGTHS)


def assert_same(actual, expected, what, share=1e-10):
    """Within `share` of the expected tensor's largest value, or of 1e-3 where all are smaller."""
    bound = share * max(expected.abs().max().item(), 1e-3)
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} and {tuple(expected.shape)}"
    worst = (actual - expected).abs().max().item()
    assert worst <= bound, f"{what}: differs by {worst:.3g}, allowed {bound:.3g}"


def tensor_parallel_model(whole, config, lora=None):
    """`whole` over all ranks: made on the meta device, split, and only then given values."""
    model = on_meta(config, lora)
    apply_tensor_parallel(model, whole_axis())
    fill(model, tensors_of(whole))
    return model


def check_tensor_parallel_model(config, lora=None, checkpointed=False, compiled=False):
    """Loss, logits and gradients are the whole model's. Returns the number of trained parameters that are split."""
    axis = whole_axis()
    whole = random_model(config, lora)
    split = tensor_parallel_model(whole, config, lora)
    ids, labels, documents = batch(whole.model.embed_tokens.num_embeddings)
    with torch.no_grad():
        assert_same(split(ids, documents), whole(ids, documents), "logits")
    if compiled:
        torch._dynamo.reset()
        apply_traced(split.model.layers)
    if checkpointed:
        apply_activation_checkpointing(split.model.layers)
    # Layers that are alike share what is compiled; with a forward wrapped on each, each would be compiled.
    with torch._dynamo.config.patch(error_on_recompile=True) if compiled else nullcontext():
        losses = [m(ids, documents, labels=labels, loss=LinearCrossEntropy(chunk_size=5)) for m in (whole, split)]
        assert_same(losses[1], losses[0], "loss")
        for loss in losses:
            loss.backward()
    expected, held, unsplit = dict(whole.named_parameters()), parts(split), unsplit_parameters(split)
    trained = {name: parameter for name, parameter in split.named_parameters() if parameter.requires_grad}
    assert trained.keys() == {name for name, parameter in expected.items() if parameter.requires_grad}
    for name, parameter in trained.items():
        gradient = torch.zeros(held[name].whole, dtype=torch.float64)
        held[name].put(parameter.grad, gradient)  # all of it where it is not split
        assert_same(axis.sum(gradient), expected[name].grad, f"gradient of {name}")
        assert held[name].is_whole == (name in unsplit), name
    return sum(name not in unsplit for name in trained)


def check_loaded_is_cut_alike(config, lora):
    """What is cut out of weights that are there is what would have been read; what was measured of them is forgotten."""
    whole, loaded = random_model(config, lora), random_model(config, lora)
    norms = {name: module.row_norms() for name, module in loaded.named_modules() if isinstance(module, LoRALinear)}
    apply_tensor_parallel(loaded, whole_axis())
    held = tensors_of(tensor_parallel_model(whole, config, lora))
    assert all(torch.equal(tensor, held[name]) for name, tensor in tensors_of(loaded).items())
    magnitudes = parts(loaded)
    for name, expected in norms.items():
        part = magnitudes[f"{name}.lora_magnitude_vector"]
        assert_same(loaded.get_submodule(name).row_norms(), part.of(expected), f"lengths of the rows of {name}")


def refusal_of(config, num_tokens):
    """What a split model says to a batch of so many tokens."""
    model = on_meta(config)
    apply_tensor_parallel(model, whole_axis())
    fill(model, {})
    try:
        model(torch.zeros(num_tokens, dtype=torch.int64))
    except ValueError as error:
        return str(error)


def held_places(size, ids):
    """Of ids, where this rank looks each up."""
    places, is_held = VocabularyShare(whole_axis(), size).places(torch.tensor(ids))
    return places.tolist(), is_held.tolist()
