"""Every family against transformers: logits and gradients in fp32, packed and cached forms against the plain one."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from torchtune.models.build import build_model
from torchtune.modules.documents import Documents
from torchtune.modules.kv_cache import KVCache

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 16,
    "factor": 4.0,
    "rope_theta": 10000.0,
}
CASES = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "llama-mha-tied": LlamaConfig(**SIZES, num_attention_heads=4, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SIZES, **HEADS, attention_bias=True, mlp_bias=True),
    "llama-head-dim": LlamaConfig(**SIZES, **HEADS, head_dim=12),
    "llama-llama3": LlamaConfig(**SIZES, **HEADS, rope_parameters=LLAMA3, max_position_embeddings=128),
    "llama-yarn": LlamaConfig(**SIZES, **HEADS, rope_parameters=YARN, max_position_embeddings=64),
    "llama-linear": LlamaConfig(
        **SIZES, **HEADS, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    ),
    "llama-dynamic": LlamaConfig(
        **SIZES,
        **HEADS,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        max_position_embeddings=20,
    ),
    "llama-longrope": LlamaConfig(**SIZES, **HEADS, rope_parameters=LONGROPE, max_position_embeddings=64),
    "mistral": MistralConfig(**SIZES, **HEADS, sliding_window=None),
    "mistral-window": MistralConfig(**SIZES, **HEADS, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(**SIZES, **HEADS, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, **HEADS, head_dim=16),
    "qwen3-window": Qwen3Config(
        **SIZES,
        **HEADS,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
        attention_bias=True,
    ),
}

REPORTED = Path(__file__).parent.parent / "cases"
CASES |= {
    f"c069-{name}": Qwen2Config(**config)
    for name, config in json.loads((REPORTED / "C069_configs.json").read_text()).items()
}
CASES["c070"] = LlamaConfig(**json.loads((REPORTED / "C070_config.json").read_text()))


def pair(config, dtype=torch.float32):
    """transformers' model with random weights everywhere, and ours with the same ones."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    for parameter in theirs.parameters():
        # Fresh norms are ones and fresh biases zeros, which would hide a dropped one.
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    with torch.device("meta"):
        ours = build_model(theirs.config.to_dict())
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    ours.load_state_dict(state, strict=True, assign=True)
    for parameter in ours.parameters():
        parameter.requires_grad_(True)
    return ours, theirs


def assert_close(actual, expected, share):
    """Within `share` of the tensor's largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=share * expected.abs().max().item())


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(name):
    """Logits within 1e-5 of their maximum, and each parameter's gradient within 1e-5 of its own."""
    ours, theirs = pair(CASES[name])
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    assert_close(ours(ids), theirs(ids).logits, 1e-5)
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = torch.where(torch.rand(2, 29) < 0.6, ids[:, 1:], -100)
    ours(ids, labels=labels).backward()
    torch.nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    expected = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        assert_close(parameter.grad, expected[parameter_name].grad, 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_packed_documents_equal_separate_rows(name):
    """A document's logits do not depend on its neighbours (float64: no rounding to hide behind)."""
    if name in ("llama-dynamic", "llama-longrope"):
        pytest.skip("these kinds choose their frequencies by the longest document of a batch, as their spec says")
    ours, _ = pair(CASES[name], torch.float64)
    documents = [torch.randint(0, 97, (length,)) for length in (9, 1, 14)]
    packed = ours(torch.cat(documents), Documents.from_lengths([9, 1, 14]))
    alone = torch.cat([ours(document[None])[0] for document in documents])
    torch.testing.assert_close(packed, alone)


@pytest.mark.parametrize("name", CASES)
def test_cached_decoding_equals_the_full_forward(name):
    """Two documents of different lengths, fed in pieces, give the logits of the whole."""
    if name in ("llama-dynamic", "llama-longrope"):
        pytest.skip("their frequencies change as a document grows; cached keys keep those of their time")
    ours, _ = pair(CASES[name], torch.float64)
    one, two = torch.randint(0, 97, (12,)), torch.randint(0, 97, (9,))
    cache = KVCache.empty(len(ours.model.layers), 2)
    got_one, got_two, seen = [], [], [0, 0]
    for new in ([5, 2], [1, 1], [3, 4], [1, 1], [2, 1]):
        ids = torch.cat([one[seen[0] : seen[0] + new[0]], two[seen[1] : seen[1] + new[1]]])
        logits = ours(ids, Documents.from_lengths(new, starts=seen), cache=cache)
        got_one.append(logits[: new[0]])
        got_two.append(logits[new[0] :])
        seen = [seen[0] + new[0], seen[1] + new[1]]
    torch.testing.assert_close(torch.cat(got_one), ours(one[None])[0])
    torch.testing.assert_close(torch.cat(got_two), ours(two[None])[0])
