"""GGUF files as files: kinds of quantisation, sets, damage, tokenizers; what is computed: test_gguf_architectures.py."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig
from transformers.integrations.gguf import dequant as theirs_dequant
from transformers.models.auto import AutoModelForCausalLM

from tests.checkpoint.made_gguf import F32, as_in_file, metadata_of, write
from tests.models.oracle import random_model
from tests.tiny_checkpoint import tiny_tokenizer
from torchtune.checkpoint.gguf import GGUFFile
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import open_checkpoint
from torchtune.checkpoint.save import save_model
from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.recipes.quickstart import packaged_model

KINDS = gguf.GGMLQuantizationType
QUANTISED = [
    "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS",
    "TQ1_0 TQ2_0 MXFP4",
]
NEWER = [name for name in ["NVFP4"] if name in KINDS.__members__]
READ = ["F32", "F16", "BF16", *" ".join(QUANTISED).split(), *NEWER]
REFUSED = ["Q8_1", "Q8_K", "F64", "I8", "I16", "I32", "I64"]
TEXTS = [
    "Hello, world! 12345 times",
    "naïve café – 日本語 🙂🙃 e\u0301",
    "def f(x):\n\treturn x  # two  spaces\n\n\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "don't I'LL we've   \u00a0 end ",
]


def tiny_parts(**options):
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        **options,
    )
    tensors = {name: tensor.numpy() for name, tensor in random_model(config).state_dict().items()}
    return as_in_file("llama", config, tensors), metadata_of(config)


def tiny_file(path, *, kind=F32, tokenizer=True, change=lambda tensors: None, **metadata):
    """A llama; `change` edits its tensors, `metadata` its keys (None leaves one out)."""
    tensors, values = tiny_parts()
    change(tensors)
    values |= {key.replace("__", "."): value for key, value in metadata.items()}
    values = {key: value for key, value in values.items() if value is not None}
    return write(path, "llama", tensors, values, kind=kind, tokenizer=tokenizer)


def one_tensor_file(path, kind, raw, shape):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("some.weight", raw, raw_shape=shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # bits at random are infinities, too
@pytest.mark.parametrize("name", READ)
def test_dequantised_as_the_libraries_do(tmp_path, name):
    """Random blocks of each kind, read whole and one index alone: gguf's values and transformers'."""
    kind = KINDS[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    row_elements = 512
    raw = np.random.default_rng(0).integers(0, 256, (3, 5, row_elements // block * size), np.uint8)
    if name in ("F32", "F16"):
        raw = raw.view({"F32": np.float32, "F16": np.float16}[name])
    expected = dequantize(raw, kind).reshape(3, 5, row_elements)
    path = one_tensor_file(tmp_path / "tiny.gguf", kind, raw, raw.shape)
    assert np.array_equal(GGUFFile(path).read("some.weight"), expected, equal_nan=True)
    assert np.array_equal(GGUFFile(path).read("some.weight", 1), expected[1], equal_nan=True)
    if int(kind) in theirs_dequant.GGML_BLOCK:
        theirs = theirs_dequant.dequantize(torch.from_numpy(raw.copy()).flatten(), int(kind))
        found = torch.from_numpy(GGUFFile(path).read("some.weight")).flatten()
        # Bits at random hold scales of 60,000 too: products are rounded in another order.
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("name", REFUSED)
def test_a_kind_that_cannot_be_read_is_refused(tmp_path, name):
    """Before any weight is read, with the tensor and the kind."""
    kind = KINDS[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.zeros((2, 512 // block * size), np.uint8)
    path = one_tensor_file(tmp_path / "tiny.gguf", kind, raw, raw.shape)
    with pytest.raises(UnsupportedError, match=f"'some.weight' is of kind {name}"):
        GGUFFile(path)


def test_a_kind_of_tomorrow_is_refused(tmp_path):
    """By its number, since there is no name for it."""
    path = one_tensor_file(tmp_path / "tiny.gguf", KINDS.F32, np.zeros((2, 512), np.float32), None)
    content = path.read_bytes()
    place = content.index(b"some.weight") + len(b"some.weight") + 4 + 2 * 8
    path.write_bytes(content[:place] + (999).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(UnsupportedError, match="'some.weight' has the quantisation 999"):
        GGUFFile(path)


def test_quantised_logits_equal_transformers(tmp_path):
    """A whole model of 8-bit matrices."""
    path = tiny_file(tmp_path / "tiny.gguf", kind=KINDS.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    found = load_model(path, dtype=torch.float32)(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_saved_as_bf16_unless_it_was_float32(tmp_path):
    """A quantised file becomes a bf16 folder, a float32 one stays float32; transformers loads both."""
    for kind, dtype in ((KINDS.Q8_0, torch.bfloat16), (F32, torch.float32)):
        path = tiny_file(tmp_path / f"{kind}.gguf", kind=kind)
        out = tmp_path / f"out-{kind}"
        save_model(out, load_model(path), open_checkpoint(path))
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}
        theirs, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
        assert theirs.dtype == dtype
        assert not info["missing_keys"]
        assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"


@pytest.mark.parametrize("kind", [KINDS.Q8_0, F32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_held_in_the_type_that_is_asked_for(tmp_path, kind, dtype):
    """Also where it is the one that a quantised file is saved in: its blocks become float32 first."""
    model = load_model(tiny_file(tmp_path / "tiny.gguf", kind=kind), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def split_file(folder):
    """A llama in three files, and the same in one."""
    tensors, metadata = tiny_parts()
    whole = write(folder / "whole.gguf", "llama", tensors, metadata)
    writer = gguf.GGUFWriter(folder / "parts.gguf", "llama", split_max_tensors=8)
    for key, value in metadata.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(folder.glob("parts-*.gguf"))
    assert [part.name for part in parts] == [f"parts-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return whole, parts


def test_a_set_is_read_when_one_of_it_is_named(tmp_path):
    """Whichever, with the tensors of all; saved as shards."""
    whole, parts = split_file(tmp_path)
    expected = load_model(whole).state_dict()
    for part in parts:
        found = load_model(part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    save_model(tmp_path / "out", load_model(parts[0]), open_checkpoint(parts[0]))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_an_incomplete_set_is_refused(tmp_path):
    """A missing part is named; so is a part that has lost its name, and one of another set."""
    whole, (first, second, third) = split_file(tmp_path)
    moved = second.rename(tmp_path / "moved.gguf")
    with pytest.raises(CheckpointError, match=r"one of 3 files, of which parts-00002-of-00003.gguf is missing"):
        open_checkpoint(third)
    alone = first.rename(tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match=r"is one of 3 files"):
        open_checkpoint(alone)
    alone.rename(first)
    whole.rename(second)
    with pytest.raises(CheckpointError, match=r"is there twice"):
        open_checkpoint(first)
    tiny_file(second, change=lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]])
    with pytest.raises(CheckpointError, match=r"is there twice|tensors in all its parts"):
        open_checkpoint(first)
    moved.rename(second)
    assert load_model(first)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_a_file_cut_short_is_refused(tmp_path, share):
    """In the header or in the weights: named, with what is wrong."""
    path = tiny_file(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"tiny.gguf"):
        open_checkpoint(path)


def test_a_damaged_header_never_ends_in_anything_else(tmp_path):
    """A byte of the header changed at a hundred places: read as it is, or refused as a checkpoint."""
    path = tiny_file(tmp_path / "tiny.gguf", tokenizer=False)
    content = path.read_bytes()
    random = np.random.default_rng(0)
    for place in random.integers(4, content.index(b"blk.1.ffn_norm"), 100):
        path.write_bytes(content[:place] + bytes([random.integers(256)]) + content[place + 1 :])
        try:
            open_checkpoint(path)
        except (CheckpointError, UnsupportedError) as error:
            assert "tiny.gguf" in str(error)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda tensors: tensors.update({"blk.0.attn_sub_norm.weight": np.zeros(64, np.float32)}),
            UnsupportedError,
            "1 tensors have no place in a model of architecture 'llama': blk.0.attn_sub_norm.weight",
        ),
        (lambda tensors: tensors.pop("token_embd.weight"), CheckpointError, "has no tensor 'token_embd.weight'"),
        (
            lambda tensors: tensors.update({"blk.1.attn_q.weight": np.zeros((63, 64), np.float32)}),
            CheckpointError,
            r"'blk.1.attn_q.weight' \(63, 64\) does not fit",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, error, message):
    """As the file calls them."""
    path = tiny_file(tmp_path / "tiny.gguf", change=change)
    with pytest.raises(error, match=message):
        open_checkpoint(path)


def test_a_missing_tensor_is_named(tmp_path):
    """As the model calls it."""
    path = tiny_file(tmp_path / "tiny.gguf", change=lambda tensors: tensors.pop("blk.1.attn_v.weight"))
    with pytest.raises(CheckpointError, match=r"'model.layers.1.self_attn.v_proj.weight' is missing"):
        load_model(path)


def test_a_missing_key_is_named(tmp_path):
    """Of those without a default."""
    path = tiny_file(tmp_path / "tiny.gguf", block_count=None)
    with pytest.raises(CheckpointError, match=r"metadata has no 'llama.block_count'"):
        open_checkpoint(path)


@pytest.mark.parametrize("arch", ["qwen4", "falcon"])
def test_an_unknown_architecture_is_named(tmp_path, arch):
    """With the nearest one if there is any."""
    tensors, metadata = tiny_parts()
    path = write(tmp_path / "tiny.gguf", arch, tensors, metadata)
    with pytest.raises(UnsupportedError, match=f"'{arch}' is not supported"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention.clamp_kqv", 8.0), ("logit_scale", 0.5), ("rope.dimension_count", 8), ("expert_gating_func", 2)],
)
def test_keys_that_would_change_the_numbers_are_refused(tmp_path, key, value):
    """Where the family has no such option; values that change nothing are fine."""
    path = tiny_file(tmp_path / "tiny.gguf", **{key: value})
    with pytest.raises(UnsupportedError, match=f"llama.{key}: {value} is not supported for llama"):
        open_checkpoint(path)
    assert open_checkpoint(tiny_file(tmp_path / "fine.gguf", logit_scale=1.0, rope__dimension_count=16))


def test_frequencies_of_no_known_scaling_are_refused(tmp_path):
    """Rather than a model with other positions."""
    path = tiny_file(
        tmp_path / "tiny.gguf",
        change=lambda tensors: tensors.update({"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}),
    )
    with pytest.raises(UnsupportedError, match=r"rope_freqs are not Llama 3.1's"):
        open_checkpoint(path)


def test_weights_without_a_tokenizer_load(tmp_path):
    """It is only said when the tokenizer is asked for."""
    path = tiny_file(tmp_path / "tiny.gguf", tokenizer=False)
    assert load_model(path)
    with pytest.raises(CheckpointError, match=r"tiny.gguf"):
        open_checkpoint(path).tokenizer()


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
