"""GGUF files that are written: each architecture's is the checkpoint again, for us, transformers and gguf's own reader."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from gguf.quants import dequantize
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto import AutoModelForCausalLM

from tests.checkpoint.test_gguf import TEXTS
from tests.checkpoint.test_gguf_architectures import CASES, LLAMA, NOT_IN_FILES, some_ids
from tests.models.oracle import assert_close, save_random
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_config
from tests.trained_vocabularies import TEXTS as SENTENCEPIECE_TEXTS
from tests.trained_vocabularies import python_lines, random_texts, sentencepiece_model
from torchtune.checkpoint.gguf_architectures import MODEL_TYPES
from torchtune.checkpoint.gguf_write import plan_gguf
from torchtune.checkpoint.gguf_write_keys import WRITTEN
from torchtune.checkpoint.gguf_write_types import TYPES
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.open import open_checkpoint
from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.models.build import build_model
from torchtune.recipes.quickstart import packaged_model
from torchtune.tokenizers.gguf_write import PREFERRED, PROBES
from torchtune.tokenizers.splits import LAYOUTS, byte_level_tokenizer

# The largest error of a rounding: a share of the value, or steps of a block's scale and of how many its range has.
# Blocks of kind 0 reach less far on the side that has not the largest value; scales are float16 themselves.
OF_VALUE = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}
OF_STEP = {"q8_0": (127, 0.6), "q5_0": (16, 1.02), "q4_0": (8, 1.02), "q5_1": (31, 0.6), "q4_1": (15, 0.6)}


# llama.cpp tells these by their number of layers.
BY_LAYERS = {"command-r, norms of heads": 64, "deepseek2, V2": 27}
# It computes what this one does otherwise, so it is read and not written.
READ_ALONE = "deepseek2, V2, groups"
WRITABLE = {name: case for name, case in CASES.items() if name != READ_ALONE} | {
    name: dataclasses.replace(CASES[name], options={**CASES[name].options, "num_hidden_layers": layers})
    for name, layers in BY_LAYERS.items()
}


def write(source, path, kind: str | None = "f32") -> Any:
    """The file of a folder; the plan."""
    checkpoint = open_checkpoint(source)
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    checkpoint.check(model)
    plan = plan_gguf(checkpoint, model, kind=kind, name="tiny")
    read = checkpoint.reader(model)
    plan.write(path, model, lambda name, held: read(name))
    return plan


def test_what_is_read_is_written():
    """And Mistral, whose files call themselves llama."""
    assert set(WRITTEN) == MODEL_TYPES | {"mistral"}


@pytest.mark.parametrize("name", WRITABLE)
def test_a_file_is_its_checkpoint(tmp_path, name):
    """Each tensor bit for bit, each field of the config, the logits: ours, and transformers' where it reads the kind."""
    case = WRITABLE[name]
    theirs = save_random(tmp_path / "hf", case.config(**case.options))
    path = tmp_path / "tiny.gguf"
    write(tmp_path / "hf", path)
    stored, found = load_model(tmp_path / "hf"), load_model(path)
    for (parameter, expected), (other, tensor) in zip(
        sorted(stored.state_dict().items()), sorted(found.state_dict().items()), strict=True
    ):
        assert parameter == other
        if case.arch.startswith("gemma") and parameter.endswith("norm.weight"):
            # The file has 1 + weight in float32.
            torch.testing.assert_close(tensor, expected, rtol=0, atol=2.0**-23)
        else:
            assert torch.equal(tensor, expected), parameter
    ids = some_ids()
    expected = theirs(ids).logits
    # So many random layers lose digits.
    assert_close(found(ids), expected, 1e-4 if name in BY_LAYERS else 1e-5, "logits")
    if case.both:
        reading = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
        assert_close(reading(ids).logits, expected, 1e-5, "transformers' logits")
    read, said = open_checkpoint(path).config, open_checkpoint(tmp_path / "hf").config
    config = type(theirs.config)(**read).to_dict()
    different = {key: (config.get(key), value) for key, value in said.items() if config.get(key) != value}
    for key in (*NOT_IN_FILES, "dtype", "transformers_version", "head_dim"):
        different.pop(key, None)
    assert not different
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert set(open_checkpoint(path).weights._file.tensors) == names


@pytest.mark.parametrize("kind", TYPES)
def test_each_type_rounds_as_it_may(tmp_path, kind):
    """Read by gguf's own reader: within half a step of each block; norms whole; the head of few bits in eight."""
    folder = save_tiny_checkpoint(tmp_path / "hf", tiny_config(tie_word_embeddings=False))
    path = tmp_path / "tiny.gguf"
    write(folder, path, kind)
    reader, stored = gguf.GGUFReader(path), load_file(folder / "model.safetensors")
    places = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    }
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, in_folder in places.items():
        tensor, expected = found[name], stored[in_folder].numpy()
        values = dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        written = tensor.tensor_type.name.lower()
        few = kind in ("q4_0", "q4_1", "q5_0", "q5_1")
        assert written == ("f32" if "norm" in name else "q8_0" if few and name == "output.weight" else kind)
        if written in OF_VALUE:
            # The smallest steps of float16 are 2**-24.
            allowed = OF_VALUE[written] * np.abs(expected) + (2.0**-25 if written == "f16" else 0)
        else:
            steps, share = OF_STEP[written]
            blocks = expected.reshape(-1, 32)
            span = np.ptp(blocks, axis=1) if written.endswith("_1") else np.abs(blocks).max(axis=1)
            allowed = np.repeat(span / steps * share, 32).reshape(expected.shape)
        assert (np.abs(values - expected) <= allowed).all()
    keys = {key: field.contents() for key, field in reader.fields.items() if key.startswith("general.")}
    assert keys["general.file_type"] == gguf.LlamaFileType[f"{'ALL' if kind == 'f32' else 'MOSTLY'}_{kind.upper()}"]
    assert keys["general.architecture"] == "llama"
    assert keys["general.name"] == "tiny"
    assert ("general.quantization_version" in keys) == (kind[0] == "q")
    load_model(path)


def test_a_tied_head_of_few_bits_is_in_eight(tmp_path):
    """The embedding is the projection then."""
    folder = save_tiny_checkpoint(tmp_path / "hf")
    write(folder, tmp_path / "tiny.gguf", "q4_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    assert "output.weight" not in types


def test_rows_that_blocks_do_not_divide_are_f16_and_said(tmp_path):
    """With their length and the block's."""
    folder = save_tiny_checkpoint(tmp_path / "hf", tiny_config(intermediate_size=100))
    plan = write(folder, tmp_path / "tiny.gguf", "q8_0")
    (note,) = plan.notes
    assert "2 of 20 tensors are written as f16: their rows of 100 are no multiple of the 32" in note
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "f32"), (torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_by_default_the_type_is_the_checkpoints(tmp_path, dtype, kind):
    """So nothing is rounded: the matrices have the same bits."""
    folder = save_tiny_checkpoint(tmp_path / "hf", dtype=dtype)
    assert write(folder, tmp_path / "tiny.gguf", None).kind.name == kind
    stored, found = load_model(folder), load_model(tmp_path / "tiny.gguf", dtype=torch.float32)
    for name, tensor in stored.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.float())


def trained(tokenizer: Tokenizer, size: int = 380) -> Tokenizer:
    """With merges learnt from this file and the probes."""
    byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    special = ["<unk>", "<s>", "</s>", *([] if byte_level else [f"<0x{byte:02X}>" for byte in range(256)])]
    trainer = trainers.BpeTrainer(
        vocab_size=size if byte_level else size + 256,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*PROBES, *TEXTS, Path(__file__).read_text(encoding="utf-8")] * 2, trainer)
    return tokenizer


def with_tokenizer(folder, tokenizer: Tokenizer, **names: str):
    """A tiny llama with this tokenizer, an added token beside it, and rows to spare."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | names
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<|turn|>", special=True, normalized=False)])
    save_tiny_checkpoint(folder, tiny_config(vocab_size=len(fast) + 5, bos_token_id=1, eos_token_id=2))
    fast.save_pretrained(folder)
    return folder


def assert_same_ids(folder, path):
    """Of varied texts, with added tokens between and without."""
    ours, theirs = open_checkpoint(path).tokenizer(), open_checkpoint(folder).tokenizer()
    for text in (*TEXTS, *PROBES, "a<tool>b <|turn|>c", "<s>x</s>"):
        assert ours.encode(text).ids == theirs.encode(text).ids, text
        assert ours.encode_plain_text(text) == theirs.encode_plain_text(text)
    assert ours.special == {name: text for name, text in theirs.special.items() if name in ours.special}


@pytest.mark.parametrize("layout", PREFERRED)
def test_each_way_to_cut_text_is_found_and_gives_the_same_ids(tmp_path, layout):
    """By the name that llama.cpp has for it, or one that cuts alike."""
    tokenizer = trained(byte_level_tokenizer({}, [], LAYOUTS[layout]))
    folder = with_tokenizer(tmp_path / "hf", tokenizer)
    plan = write(folder, tmp_path / "tiny.gguf")
    assert plan.metadata["tokenizer.ggml.pre"] == PREFERRED[layout]
    assert not plan.notes
    assert_same_ids(folder, tmp_path / "tiny.gguf")


def test_whole_pieces_do_not_matter_where_merges_reach_every_token(tmp_path):
    """tiktoken's way has no name of its own for some cuts; another's is taken only where it gives the same ids."""
    tokenizer = trained(byte_level_tokenizer({}, [], LAYOUTS["qwen"]))
    folder = with_tokenizer(tmp_path / "hf", tokenizer)
    assert write(folder, tmp_path / "tiny.gguf").metadata["tokenizer.ggml.pre"] == "deepseek-r1-qwen"
    assert_same_ids(folder, tmp_path / "tiny.gguf")
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"] = content["model"]["merges"][:-40]
    folder = with_tokenizer(tmp_path / "cut", Tokenizer.from_str(json.dumps(content)))
    with pytest.raises(UnsupportedError, match="in a way that llama.cpp has no name for"):
        write(folder, tmp_path / "other.gguf")


def test_one_parameter_is_in_memory_at_a_time(tmp_path):
    """Each is read once, after the one before it was let go of."""
    folder = save_tiny_checkpoint(tmp_path / "hf")
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    checkpoint.check(model)
    read, given, names = checkpoint.reader(model), [], []

    def values(name, held):
        assert not any(reference() is not None for reference in given)
        tensor = read(name)
        given.append(weakref.ref(tensor))
        names.append(name)
        return tensor

    plan_gguf(checkpoint, model, kind="q8_0", name="tiny").write(tmp_path / "tiny.gguf", model, values)
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_pieces_of_sentencepiece(tmp_path):
    """As Llama 2 has them: scores from merges, bytes, a space before the first word; transformers reads the same ids."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=[^▁])(?=▁)"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trained(tokenizer)
    tokenizer.pre_tokenizer = None
    folder = with_tokenizer(tmp_path / "hf", tokenizer)
    plan = write(folder, tmp_path / "tiny.gguf")
    assert plan.metadata["tokenizer.ggml.model"] == "llama"
    assert plan.metadata["tokenizer.ggml.add_space_prefix"]
    ours, theirs = open_checkpoint(tmp_path / "tiny.gguf").tokenizer(), open_checkpoint(folder).tokenizer()
    for text in (*TEXTS, *PROBES):
        assert ours.encode(text).ids == theirs.encode(text).ids, text


SENTENCEPIECE = {"llama": "LlamaTokenizer", "gemma": "GemmaTokenizer"}


def sentencepiece_folder(folder, kind):
    """A checkpoint with a `tokenizer.model` alone, and SentencePiece's reader of that."""
    content = sentencepiece_model(kind)
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    ends = {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id(), "pad_token_id": None}
    sizes = {"vocab_size": model.vocab_size() + 3, "hidden_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    config = transformers.LlamaConfig if kind == "llama" else transformers.Gemma3TextConfig
    scale = {} if kind == "llama" else {"query_pre_attn_scalar": 16}
    save_tiny_checkpoint(folder, config(**sizes, **ends, **scale))
    for file in [*folder.glob("token*"), *folder.glob("special*")]:
        file.unlink()
    (folder / "tokenizer.model").write_bytes(content)
    options = {"tokenizer_class": SENTENCEPIECE[kind], "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder, model


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_a_sentencepiece_model_keeps_its_scores(tmp_path, kind):
    """Its own; ids of the folder, and of SentencePiece for text without special tokens. What the format does otherwise is told."""
    folder, model = sentencepiece_folder(tmp_path / "hf", kind)
    plan = write(folder, tmp_path / "tiny.gguf")
    scores = plan.metadata["tokenizer.ggml.scores"]
    assert scores[: model.vocab_size()] == [model.get_score(token_id) for token_id in range(model.vocab_size())]
    told = ("a text that begins with a space", "around added tokens") if kind == "llama" else ()
    assert len(plan.notes) == len(told)
    assert all(map(str.startswith, plan.notes, told))
    ours, theirs = open_checkpoint(tmp_path / "tiny.gguf").tokenizer(), open_checkpoint(folder).tokenizer()
    assert ours.adds_bos
    for text in (*SENTENCEPIECE_TEXTS, *TEXTS, *PROBES, *random_texts(200), *python_lines()[:200]):
        if kind == "gemma" or not text.startswith((" ", "▁")):
            assert ours.encode(text).ids == theirs.encode(text).ids, text
        if kind == "llama":
            assert ours.encode(text).ids == model.encode(text), text


def test_what_ends_a_generation_is_kept(tmp_path):
    """The tokenizer's own first, then the others; more than three are told."""
    folder = save_tiny_checkpoint(tmp_path / "hf")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3, 2]}))
    plan = write(folder, tmp_path / "tiny.gguf")
    assert [plan.metadata[f"tokenizer.ggml.{end}_token_id"] for end in ("eos", "eot", "eom")] == [3, 1, 2]
    assert set(open_checkpoint(tmp_path / "tiny.gguf").stop_ids) == {1, 2, 3}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3, 2, 4]}))
    assert "not named: <pad>" in write(folder, tmp_path / "tiny.gguf").notes[0]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    write(folder, tmp_path / "tiny.gguf")
    assert open_checkpoint(tmp_path / "tiny.gguf").stop_ids == [1]


def test_templates_by_name(tmp_path):
    """The default one and those for tools, whole."""
    folder = save_tiny_checkpoint(tmp_path / "hf")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    named = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    config["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
    path.write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    plan = write(folder, tmp_path / "tiny.gguf")
    assert open_checkpoint(tmp_path / "tiny.gguf").chat_template == "{{ messages }}"
    assert plan.metadata["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert plan.metadata["tokenizer.chat_templates"] == ["tool_use"]


QWEN3_MOE = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
REFUSED = {
    "a family": (
        transformers.MinistralConfig,
        {**LLAMA, "head_dim": 8, "sliding_window": 6},
        "model_type 'ministral' can't be written to a GGUF file",
    ),
    "a window": (transformers.MistralConfig, {**LLAMA, "sliding_window": 8}, "window"),
    "a scale": (
        transformers.Gemma2Config,
        {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 32},
        "query_pre_attn_scalar: 32 would be read as 8",
    ),
    "a router": (transformers.Qwen3MoeConfig, QWEN3_MOE, "norm_topk_prob: False would be read as True"),
    "an activation": (transformers.LlamaConfig, {**LLAMA, "hidden_act": "gelu"}, "hidden_act: 'gelu' would be read as"),
    "a scaling": (transformers.LlamaConfig, {**LLAMA, "rope_parameters": DYNAMIC}, "rope_type 'dynamic' can't be"),
    "scaling by another length": (
        transformers.LlamaConfig,
        {**LLAMA, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 4096}},
        "original_max_position_embeddings: 4096",
    ),
    "norms that llama.cpp does not look for": (
        transformers.CohereConfig,
        {**LLAMA, "use_qk_norm": True},
        "use_qk_norm: True with 3 layers can't be written to a GGUF file: llama.cpp expects norms of queries and keys from 64",
    ),
    "queries that llama.cpp takes for others": (
        transformers.DeepseekV2Config,
        CASES["deepseek2, V2"].options,
        "q_lora_rank: None with 3 layers can't be written to a GGUF file: llama.cpp expects none with 26 or 27 layers",
    ),
    "groups that llama.cpp ranks otherwise": (
        transformers.DeepseekV2Config,
        CASES[READ_ALONE].options,
        "topk_method: group_limited_greedy can't be written to a GGUF file: llama.cpp ranks groups of experts by their two",
    ),
    "a head of its own": (
        transformers.GemmaConfig,
        {**LLAMA, "head_dim": 8, "tie_word_embeddings": False},
        "has no tensor 'lm_head.weight'",
    ),
}


def test_what_llama_cpp_computes_otherwise_for_some_lengths_is_said(tmp_path):
    """Windows that it does not know, and rotary factors that it chooses by its own context."""
    save_random(tmp_path / "hf", transformers.Starcoder2Config(**LLAMA, sliding_window=8))
    assert "beyond 8 tokens it sees more" in write(tmp_path / "hf", tmp_path / "tiny.gguf").notes[0]
    case = CASES["phi3, long"]
    save_random(tmp_path / "long", case.config(**{**case.options, "sliding_window": 8}))
    window, factors = write(tmp_path / "long", tmp_path / "long.gguf").notes[:2]
    assert "beyond 8 tokens" in window
    assert "longer than 24 tokens" in factors


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_can_not_say_is_refused(tmp_path, name):
    """By the key and its value, before anything is written."""
    config, options, message = REFUSED[name]
    save_random(tmp_path / "hf", config(**options))
    with pytest.raises(UnsupportedError, match=message.replace("(", r"\(")):
        write(tmp_path / "hf", tmp_path / "tiny.gguf")
    assert not (tmp_path / "tiny.gguf").exists()


def test_tokenizers_that_can_not_be_written_are_refused(tmp_path):
    """A unigram model, and a cut that llama.cpp has no name for."""
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    cases = {"of kind 'Unigram' can't be written": unigram}
    spaced = trained(byte_level_tokenizer({}, [], LAYOUTS["gpt2"], prefix_space=True))
    cases["in a way that llama.cpp has no name for"] = spaced
    for number, (message, tokenizer) in enumerate(cases.items()):
        folder = with_tokenizer(tmp_path / f"hf{number}", tokenizer)
        with pytest.raises(UnsupportedError, match=message):
            write(folder, tmp_path / "tiny.gguf")


@pytest.mark.parametrize(("value", "kind"), [(1e6, "f16"), (float("nan"), "q8_0"), (1e6, "q4_0")])
def test_values_beyond_a_type_are_named(tmp_path, value, kind):
    """Rather than written as infinities."""
    folder = save_tiny_checkpoint(tmp_path / "hf")
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    checkpoint.check(model)
    plan, read = plan_gguf(checkpoint, model, kind=kind, name="tiny"), checkpoint.reader(model)

    def values(name, held):
        tensor = read(name)
        return tensor.index_fill(0, torch.tensor([0]), value) if name.endswith("up_proj.weight") else tensor

    with pytest.raises(CheckpointError, match=rf"'model.layers.0.mlp.up_proj.weight' has a value of .* {kind} holds"):
        plan.write(tmp_path / "tiny.gguf", model, values)


@pytest.mark.parametrize("kind", ["q8_0", "f16"])
def test_the_packaged_model_keeps_its_metadata(tmp_path, kind):
    """Written anew from the GGUF file that it is in: every key of its model and tokenizer that is read."""
    source, path = packaged_model(), tmp_path / "again.gguf"
    write(source, path, kind)
    before, after = (
        {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()} for file in (source, path)
    )
    told_elsewhere = ("general.", "GGUF.", "quantize.", "tokenizer.ggml.scores")
    changed = {
        key: (value if not isinstance(value, list) else "a list", after.get(key) if key in after else None)
        for key, value in before.items()
        if not key.startswith(told_elsewhere) and after.get(key) != value
    }
    assert not changed
    one, two = open_checkpoint(source).tokenizer(), open_checkpoint(path).tokenizer()
    assert all(one.encode(text).ids == two.encode(text).ids for text in (*TEXTS, *PROBES))
