"""GGUF files as a source, against transformers' own reading of the same files and against the gguf library."""

import json

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.models.auto import AutoModelForCausalLM

from tests.tiny_checkpoint import tiny_tokenizer
from torchtune.checkpoint.gguf import GGUFFile
from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.save import save_model
from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.models.build import build_model
from torchtune.recipes.quickstart import packaged_model

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, HEAD_DIM = 64, 96, 4, 2, 2, 16
TEXTS = [
    "Hello, world! 12345 times",
    "naïve café – 日本語 🙂🙃 e\u0301",
    "def f(x):\n\treturn x  # two  spaces\n\n\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "don't I'LL we've   \u00a0 end ",
]


def write_gguf(
    path, arch="llama", kind=gguf.GGMLQuantizationType.F32, bias=False, tied=True, head_dim=HEAD_DIM, **metadata
):
    """A tiny file with q and k rows permuted as converters do for architecture `llama`."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head_dim)
    for key, value in metadata.items():
        writer.add_float32(key, value) if isinstance(value, float) else writer.add_uint32(key, value)
    tokenizer = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocab = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    tokens = sorted(vocab, key=vocab.get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(3)
    writer.add_chat_template("{{ messages }}")

    def add(name, *shape):
        value = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.1, shape).astype(np.float32)
        if len(shape) == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", len(tokens), HIDDEN)
    for i in range(LAYERS):
        for name, shape in {
            "attn_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
            "attn_q": (HEADS * head_dim, HIDDEN),
            "attn_k": (KV_HEADS * head_dim, HIDDEN),
            "attn_v": (KV_HEADS * head_dim, HIDDEN),
            "attn_output": (HIDDEN, HEADS * head_dim),
            "ffn_gate": (INNER, HIDDEN),
            "ffn_up": (INNER, HIDDEN),
            "ffn_down": (HIDDEN, INNER),
        }.items():
            add(f"blk.{i}.{name}.weight", *shape)
            if bias and name in ("attn_q", "attn_k", "attn_v"):
                add(f"blk.{i}.{name}.bias", shape[0])
        if arch == "qwen3":
            add(f"blk.{i}.attn_q_norm.weight", head_dim)
            add(f"blk.{i}.attn_k_norm.weight", head_dim)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded(path):
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    checkpoint.load_into(model)
    return checkpoint, model


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {}),
        ("llama", {"tied": False, "kind": gguf.GGMLQuantizationType.Q8_0}),
        ("qwen2", {"bias": True}),
        # transformers takes 128 for this family whatever the file says.
        ("qwen3", {"head_dim": 128, "qwen3.attention.key_length": 128}),
    ],
)
def test_logits_equal_transformers(tmp_path, arch, options):
    """Rows un-permuted for llama only, grouped heads, biases, head norms, tied or not."""
    path = write_gguf(tmp_path / "tiny.gguf", arch, **options)
    _, model = loaded(path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_dequantised_as_the_gguf_library_does(tmp_path, kind):
    """A matrix that is not permuted, read back to the bit."""
    quantised = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "tiny.gguf", kind=quantised)
    ours = GGUFFile(path).read("model.layers.1.mlp.up_proj.weight")
    (tensor,) = [t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight"]
    assert torch.equal(ours, torch.from_numpy(dequantize(tensor.data, quantised).reshape(INNER, HIDDEN).copy()))


def test_saved_as_bf16_unless_it_was_float32(tmp_path):
    """A quantised file becomes a bf16 folder, a float32 one stays float32; transformers loads both."""
    for kind, dtype in (
        (gguf.GGMLQuantizationType.Q8_0, torch.bfloat16),
        (gguf.GGMLQuantizationType.F32, torch.float32),
    ):
        checkpoint, model = loaded(write_gguf(tmp_path / f"{kind}.gguf", kind=kind))
        out = tmp_path / f"out-{kind}"
        save_model(out, model, checkpoint)
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}
        theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
        assert theirs.dtype == dtype
        assert not info["missing_keys"]
        assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"


def test_the_packaged_tokenizer_equals_transformers(tmp_path):
    """Ids and character spans on varied text, special tokens included."""
    path = packaged_model()
    tokenizer = open_checkpoint(path).tokenizer()
    folder, _, name = path.rpartition("/")
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        encoding = tokenizer.encode(text)
        assert encoding.ids == expected
        covered = [place for start, end in encoding.offsets for place in range(start, end)]
        assert sorted(set(covered)) == list(range(len(text)))
        assert covered == sorted(covered)
        assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_file_cut_short_is_refused(tmp_path, share):
    """In the header or in the weights: named, with what is wrong."""
    path = write_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="tiny.gguf"):
        open_checkpoint(path)


def test_an_unknown_architecture_is_named(tmp_path):
    """With the nearest one."""
    path = write_gguf(tmp_path / "tiny.gguf", arch="qwen2moe")
    with pytest.raises(UnsupportedError, match="'qwen2moe' is not supported; did you mean 'qwen2'"):
        open_checkpoint(path)
