"""What is kept between the passes, and that nothing else changes."""

import ctypes
import gc
import sys
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchtune.adapters.config import LoRAConfig
from torchtune.adapters.lora import apply_lora
from torchtune.distributed.collectives import gather, scatter_sum
from torchtune.distributed.mesh import Axis
from torchtune.errors import ConfigError, UnsupportedError
from torchtune.models.build import build_model
from torchtune.modules.documents import Documents
from torchtune.training import offloading
from torchtune.training.activation_checkpointing import apply_activation_checkpointing, check_activation_checkpointing

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 1e4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_activation": "gelu_pytorch_tanh",
}
LENGTHS = (40, 3, 21)
FULL, SECOND, BY_OPERATOR = {}, {"mode": "selective", "option": 2}, {"mode": "selective", "option": "op"}


def random_model(model_type="llama", *, lora=None, **sizes):
    torch.manual_seed(0)
    model = build_model({**SIZES, "model_type": model_type, **sizes})
    if lora is not None:
        apply_lora(model, LoRAConfig(rank=2, targets=("all-linear",), **lora))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def loss_of(model, lengths=LENGTHS):
    torch.manual_seed(1)
    ids = torch.randint(0, 31, (sum(lengths),))
    return model(ids, Documents.from_lengths(lengths), labels=ids)


def gradients(model, lengths=LENGTHS):
    loss_of(model, lengths).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("how", [FULL, SECOND, BY_OPERATOR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "lora"),
    [
        ("llama", None),
        ("gemma2", None),  # norms behind the last product, scores that are capped
        ("gpt_oss", None),  # sinks, experts with biases
        ("mixtral", None),
        ("gpt2", None),  # plain feed-forward, biases
        ("llama", {}),  # updates added in place to what is kept
        ("llama", {"use_dora": True, "dropout": 0.3}),  # the same values dropped again
    ],
)
def test_changes_no_bit(how, dtype, model_type, lora):
    """The same operators on the same numbers, whatever is computed again: packed documents, short and long."""
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64} if model_type == "gpt2" else {}
    plain, model = (random_model(model_type, lora=lora, **sizes) for _ in range(2))
    plain.compute_dtype = model.compute_dtype = dtype
    apply_activation_checkpointing(model.model.layers, **how)
    expected, found = gradients(plain), gradients(model)
    assert all(found[name].equal(expected[name]) for name in expected)


def test_a_batch_without_tokens_is_no_error():
    """Empty tensors have no memory to tell them apart by."""
    model = random_model(lora={})
    apply_activation_checkpointing(model.model.layers, **BY_OPERATOR)
    assert all(gradient.count_nonzero() == 0 for gradient in gradients(model, ()).values())


class Allocated(ctypes.Structure):
    """glibc's struct mallinfo2."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def allocated_bytes():
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Allocated
    state = mallinfo()
    return state.uordblks + state.hblkhd


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
@pytest.mark.parametrize("lora", [None, {}])
def test_keeps_less(lora):
    """Bytes that live on after the forward pass: least of all layers in full, and by operator less than half."""
    kept = {}
    for name, how in {"none": None, "full": FULL, "second": SECOND, "op": BY_OPERATOR}.items():
        model = random_model(hidden_size=128, head_dim=32, intermediate_size=512, num_hidden_layers=4, lora=lora)
        if how is not None:
            apply_activation_checkpointing(model.model.layers, **how)
        gradients(model)  # what is made once is there
        gc.collect()
        before = allocated_bytes()
        loss = loss_of(model, (1000,))
        kept[name] = allocated_bytes() - before
        del loss
    assert kept["full"] < kept["op"] < kept["second"] < kept["none"]
    assert kept["full"] < 0.2 * kept["none"]
    assert kept["op"] < 0.5 * kept["none"]


class Counts(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func] += 1
        return func(*args, **(kwargs or {}))


def operators_of_backward(loss):
    with Counts() as counts:
        loss.backward()
    return counts.of


def test_by_operator_attention_and_narrow_products_run_once():
    """Of a layer's forward only the products of gate and up run again in the backward pass."""
    counts = {}
    for name, how in {"none": None, "full": FULL, "op": BY_OPERATOR}.items():
        model = random_model()
        if how is not None:
            apply_activation_checkpointing(model.model.layers, **how)
        counts[name] = operators_of_backward(loss_of(model))
    product, attention = torch.ops.aten.mm.default, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    # In full: queries, keys, values, output, gate, up and down.
    assert counts["full"][product] - counts["none"][product] == 3 * 7
    assert counts["op"][product] - counts["none"][product] == 3 * 2
    assert [counts[name][attention] for name in counts] == [0, 3 * len(LENGTHS), 0]


def test_by_operator_what_would_read_another_value_is_refused():
    """A product that is squared, and only then written into: squared again it would be another."""

    class Layer(nn.Linear):
        def forward(self, x):
            made = super().forward(x)
            squared = made.square()
            with torch.no_grad():
                made.mul_(2.0)
            return squared

    layers = nn.ModuleList([Layer(4, 4, bias=False)])
    apply_activation_checkpointing(layers, **BY_OPERATOR)
    with pytest.raises(UnsupportedError, match="ac_option"):
        layers[0](torch.randn(3, 4, requires_grad=True))


def _sums_run_once():
    axis = Axis(2, dist.get_rank(), dist.group.WORLD)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(scatter_sum(self.first(gather(x, axis)), axis).tanh())

    torch.manual_seed(axis.rank)
    x = torch.randn(3, 4)
    found = []
    for how in (None, FULL, BY_OPERATOR):
        layers = nn.ModuleList([Layer()])
        if how is not None:
            apply_activation_checkpointing(layers, **how)
        counts = operators_of_backward(layers[0](x).sum())
        collective = torch.ops._c10d_functional.reduce_scatter_tensor.default
        found.append((counts[collective], [parameter.grad for parameter in layers.parameters()]))
    (none, expected), *others = found
    assert [count - none for count, _ in others] == [1, 0]
    assert all(one.equal(other) for _, grads in others for one, other in zip(grads, expected, strict=True))


def test_by_operator_sums_over_ranks_run_once(two_ranks):
    two_ranks.run(_sums_run_once)


class KeptHere:
    """In place of a copy on the host, for a machine without a GPU: notes what is asked of it."""

    def __init__(self, tensor, before):
        self.tensor = tensor.detach().clone()
        self.before = None if before is None else lambda: before
        self.index = 0 if before is None else before.index + 1
        self.log.append(("put", self.index))

    def start(self):
        self.log.append(("start", self.index))

    def arrived(self):
        self.log.append(("take", self.index))
        return self.tensor


@pytest.mark.parametrize("how", [FULL, BY_OPERATOR])
def test_offloading_moves_the_inputs_alone_and_fetches_ahead(monkeypatch, how):
    """One tensor a layer; in the backward pass the copy before the one that is needed is under way."""
    monkeypatch.setattr(offloading, "_Kept", KeptHere)
    monkeypatch.setattr(KeptHere, "log", [], raising=False)
    plain, model = random_model(), random_model()
    apply_activation_checkpointing(model.model.layers, offload=True, **how)
    expected, found = gradients(plain), gradients(model)
    assert all(found[name].equal(expected[name]) for name in expected)
    backward = [("start", 2), ("start", 1), ("take", 2), ("start", 1), ("start", 0), ("take", 1)]
    assert KeptHere.log == [("put", 0), ("put", 1), ("put", 2), *backward, ("start", 0), ("take", 0)]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"mode": "selective", "compiled": True}, "ac_option"),
        ({"enabled": False, "offload": True, "device": torch.device("cuda")}, "enable_activation_offloading"),
        ({"offload": True}, "enable_activation_offloading"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, key):
    plain = {"enabled": True, "mode": "full", "option": "op", "offload": False, "compiled": False}
    plain["device"] = torch.device("cpu")
    check_activation_checkpointing(**plain)
    with pytest.raises(ConfigError) as error:
        check_activation_checkpointing(**plain | changes)
    assert [problem.key for problem in error.value.problems] == [key]
