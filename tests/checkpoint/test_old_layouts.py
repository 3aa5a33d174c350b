"""C076: Meta's releases and the first library's checkpoints: names, rows in pairs, shares of ranks, params.json.

The files are made from transformers' models by what stands here alone, row by row, and go back to the same bits.
"""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM
from transformers.models.gemma2 import Gemma2Config

from tests.models.oracle import HEADS, SIZES, assert_close, random_model, save_random, stored_tensors
from tests.tiny_checkpoint import tiny_tokenizer
from tests.trained_vocabularies import sentencepiece_model
from torchtune.checkpoint.load import load_model
from torchtune.checkpoint.meta_params import config_from_params
from torchtune.checkpoint.open import NoWeights, open_checkpoint
from torchtune.checkpoint.save import save_model
from torchtune.errors import CheckpointError, UnsupportedError

IDS = torch.arange(30)[None]
HEAD_DIM = 8
# intermediate_size as Meta's code makes it of these: 2 * 4 * 32 / 3 = 85, rounded up.
SIZES_OF_META = {**SIZES, "intermediate_size": 96}
PARAMS = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-5}
META = [
    (r"model\.embed_tokens", "tok_embeddings"),
    (r"model\.norm", "norm"),
    (r"lm_head", "output"),
    (r"model\.layers\.", "layers."),
    (r"self_attn\.([qkvo])_proj", r"attention.w\1"),
    (r"mlp\.gate_proj", "feed_forward.w1"),
    (r"mlp\.down_proj", "feed_forward.w2"),
    (r"mlp\.up_proj", "feed_forward.w3"),
    (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"),
]
FIRST_LIBRARY = [
    (r"model\.embed_tokens", "tok_embeddings"),
    (r"model\.norm\.weight", "norm.scale"),
    (r"lm_head", "output"),
    (r"model\.layers\.", "layers."),
    (r"self_attn\.o_proj", "attn.output_proj"),
    (r"self_attn\.([qk])_norm\.weight", r"attn.\1_norm.scale"),
    (r"self_attn", "attn"),
    (r"mlp\.gate_proj", "mlp.w1"),
    (r"mlp\.down_proj", "mlp.w2"),
    (r"mlp\.up_proj", "mlp.w3"),
    (r"input_layernorm\.weight", "sa_norm.scale"),
    (r"post_attention_layernorm\.weight", "mlp_norm.scale"),
]
# The layer applies mlp_norm before the feed-forward and mlp_scale after it, sa_scale after the attention.
GEMMA2 = [
    (r"pre_feedforward_layernorm\.weight", "mlp_norm.scale"),
    (r"post_feedforward_layernorm\.weight", "mlp_scale.scale"),
    (r"post_attention_layernorm\.weight", "sa_scale.scale"),
    *FIRST_LIBRARY,
]


def renamed(name, rules):
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def in_pairs(weight, head_dim=HEAD_DIM):
    """Row i of a head's first half and row i of its second become neighbours."""
    rows = []
    for head in range(len(weight) // head_dim):
        for i in range(head_dim // 2):
            rows += [weight[head * head_dim + i], weight[head * head_dim + head_dim // 2 + i]]
    return torch.stack(rows)


def old_tensors(folder, rules, *, pairs=True, head_dim=HEAD_DIM):
    """A saved Hugging Face checkpoint's tensors under other names, queries and keys in pairs."""
    found = {}
    for name, tensor in stored_tensors(folder).items():
        turns = pairs and re.search(r"self_attn\.[qk]_proj", name)
        found[renamed(name, rules)] = in_pairs(tensor, head_dim) if turns else tensor
    return found


def split_fused(tensors, config):
    """Phi-3's two fused matrices apart, as the first library has them."""
    rows = [config.num_attention_heads * HEAD_DIM, *[config.num_key_value_heads * HEAD_DIM] * 2]
    found = {}
    for name, tensor in tensors.items():
        if "qkv_proj" in name:
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.split(rows), strict=True)
            found |= {name.replace("qkv_proj", part): weight for part, weight in parts}
        elif "gate_up_proj" in name:
            gate, up = tensor.chunk(2)
            found |= {name.replace("gate_up_proj", "w1"): gate, name.replace("gate_up_proj", "w3"): up}
        else:
            found[name] = tensor
    return found


def ranks_share(name, tensor, num_ranks, *, embedding_dim):
    """A tensor as the ranks of a tensor-parallel model hold it."""
    by_column = name.endswith(("wo.weight", "w2.weight")) or (name.startswith("tok_") and embedding_dim == 1)
    if tensor.dim() == 1:
        return [tensor] * num_ranks
    return [part.clone() for part in tensor.chunk(num_ranks, dim=1 if by_column else 0)]


def write_meta(folder, tensors, params=PARAMS, *, num_ranks=1, embedding_dim=0):
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    shares = {
        name: ranks_share(name, tensor, num_ranks, embedding_dim=embedding_dim) for name, tensor in tensors.items()
    }
    for rank in range(num_ranks):
        share = {name: parts[rank] for name, parts in shares.items()}
        torch.save(share | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{rank:02}.pth")
    return folder


def check_as_original(tmp_path, source, theirs):
    """transformers' logits; and what is saved is the Hugging Face checkpoint that the files were made from."""
    model = load_model(source)
    assert_close(model(IDS), theirs(IDS).logits, 1e-5, "logits")
    save_model(tmp_path / "out", model, open_checkpoint(source))
    before, after = stored_tensors(tmp_path / "hf"), stored_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) and before[name].dtype == after[name].dtype for name in before)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_close(again(IDS).logits, theirs(IDS).logits, 1e-5, "logits of what was saved")
    assert not [file.name for file in (tmp_path / "out").iterdir() if file.suffix in (".pth", ".pt", ".bin")]


def meta_model(tmp_path, **changes):
    config = LlamaConfig(**{**SIZES_OF_META, **HEADS, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, **changes})
    return save_random(tmp_path / "hf", config)


@pytest.mark.parametrize(("num_ranks", "embedding_dim"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_a_release_of_meta(tmp_path, num_ranks, embedding_dim, num_kv_heads):
    """One file or a share for each of two ranks, the embedding's by rows or by columns; grouped heads or not."""
    theirs = meta_model(tmp_path, num_key_value_heads=num_kv_heads)
    params = {**PARAMS, "n_kv_heads": num_kv_heads, "vocab_size": -1}
    tensors = old_tensors(tmp_path / "hf", META)
    source = write_meta(tmp_path / "meta", tensors, params, num_ranks=num_ranks, embedding_dim=embedding_dim)
    check_as_original(tmp_path, source, theirs)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["torch_dtype"]) == ("llama", 97, "float32")


def test_scaled_rope_and_a_copied_head(tmp_path):
    """Llama 3.2 writes its tied head out; its frequencies are scaled by 32."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    theirs = meta_model(tmp_path, rope_parameters=rope, tie_word_embeddings=True, max_position_embeddings=131072)
    tensors = old_tensors(tmp_path / "hf", META)
    params = {**PARAMS, "rope_theta": 500000.0, "use_scaled_rope": True}
    source = write_meta(tmp_path / "meta", {**tensors, "output.weight": tensors["tok_embeddings.weight"]}, params)
    assert_close(load_model(source)(IDS), theirs(IDS).logits, 1e-5, "logits")
    config = open_checkpoint(source).config
    assert config["tie_word_embeddings"]
    assert config["rope_scaling"]["factor"] == 32
    assert config["max_position_embeddings"] == 131072
    other = write_meta(tmp_path / "other", {**tensors, "output.weight": tensors["tok_embeddings.weight"] + 1}, params)
    assert open_checkpoint(other).config["rope_scaling"]["factor"] == 8
    assert not open_checkpoint(other).config["tie_word_embeddings"]


def logits_by_turning_pairs(tensors, ids, *, num_heads, num_kv_heads, eps=1e-5, theta=10000.0):
    """Llama under Meta's names, each pair of neighbours a complex number: an oracle that permutes nothing."""

    def normed(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    t = {name: tensor.double() for name, tensor in tensors.items()}
    angles = torch.arange(len(ids)).double()[:, None] / theta ** (torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # [S, 1, HEAD_DIM / 2]
    x = t["tok_embeddings.weight"][ids]
    for i in range(PARAMS["n_layers"]):
        layer = {name.removeprefix(f"layers.{i}."): tensor for name, tensor in t.items()}
        y = normed(x, layer["attention_norm.weight"])
        q, k, v = ((y @ layer[f"attention.w{which}.weight"].T).unflatten(-1, (-1, HEAD_DIM)) for which in "qkv")
        q, k = (
            torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)
            for z in (q, k)
        )
        k, v = (z.repeat_interleave(num_heads // num_kv_heads, dim=1) for z in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
        future = torch.ones(len(ids), len(ids)).triu(1).bool()
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        x = x + mixed.flatten(-2) @ layer["attention.wo.weight"].T
        y = normed(x, layer["ffn_norm.weight"])
        gate, up = (y @ layer[f"feed_forward.w{which}.weight"].T for which in (1, 3))
        x = x + (F.silu(gate) * up) @ layer["feed_forward.w2.weight"].T
    return normed(x, t["norm.weight"]) @ t["output.weight"].T


def test_pairs_turn_as_complex_numbers_do(tmp_path):
    """Random weights under Meta's names mean what Meta's model makes of them."""
    meta_model(tmp_path)
    tensors = {renamed(name, META): tensor for name, tensor in stored_tensors(tmp_path / "hf").items()}
    expected = logits_by_turning_pairs(tensors, IDS[0], num_heads=4, num_kv_heads=2)
    model = load_model(write_meta(tmp_path / "meta", tensors), dtype=torch.float64)
    assert_close(model(IDS)[0], expected, 1e-5, "logits")


def test_bfloat16_shares_of_the_pickle_before_zip_files(tmp_path):
    """The type of the file is kept, and old files are read whole."""
    config = LlamaConfig(**SIZES_OF_META, **HEADS, rms_norm_eps=1e-5)
    model = random_model(config).bfloat16()
    model.save_pretrained(tmp_path / "hf")
    source = write_meta(tmp_path / "meta", old_tensors(tmp_path / "hf", META), num_ranks=2)
    for file in source.glob("*.pth"):
        torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    save_model(tmp_path / "out", load_model(source, dtype=torch.float32), open_checkpoint(source))
    before, after = stored_tensors(tmp_path / "hf"), stored_tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(before[name].equal(after[name]) for name in before)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        # What the same releases have in their Hugging Face config.json. Llama 7B, 2 70B, Code Llama 7B, 3 8B, 3.1 8B.
        (
            {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6, "vocab_size": 32000},
            {"intermediate_size": 11008, "num_key_value_heads": 32, "max_position_embeddings": 2048, "eos_token_id": 2},
        ),
        (
            {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8}
            | {"n_layers": 80, "norm_eps": 1e-5, "vocab_size": -1},
            {"intermediate_size": 28672, "num_key_value_heads": 8, "max_position_embeddings": 4096},
        ),
        (
            {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.0}
            | {"norm_eps": 1e-5, "rope_theta": 1000000},
            {"intermediate_size": 11008, "rope_theta": 1000000, "max_position_embeddings": 16384},
        ),
        (
            {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256}
            | {"multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0},
            {"intermediate_size": 14336, "rope_theta": 500000.0, "max_position_embeddings": 8192}
            | {"bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 128},
        ),
        (
            {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5}
            | {"multiple_of": 1024, "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0, "use_scaled_rope": True},
            {"max_position_embeddings": 131072, "intermediate_size": 14336, "vocab_size": 128256},
        ),
        (
            {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8}
            | {"norm_eps": 1e-5, "sliding_window": 4096, "vocab_size": 32000},
            {"model_type": "mistral", "intermediate_size": 14336, "sliding_window": 4096},
        ),
    ],
)
def test_params_of_real_releases(tmp_path, params, expected):
    """A params.json gives the values that the release's config.json has."""
    (tmp_path / "params.json").write_text(json.dumps(params))
    config = config_from_params(tmp_path / "params.json", NoWeights())
    assert {key: config[key] for key in expected} == expected


def test_mistrals_first_release(tmp_path):
    """The same names and pairs, its own params."""
    theirs = save_random(tmp_path / "hf", MistralConfig(**SIZES, **HEADS, sliding_window=7, rms_norm_eps=1e-5))
    params = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 48}
    source = write_meta(
        tmp_path / "meta", old_tensors(tmp_path / "hf", META), {**params, "norm_eps": 1e-5, "sliding_window": 7}
    )
    check_as_original(tmp_path, source, theirs)


def test_the_tokenizer_is_found(tmp_path):
    """tokenizer.model in the folder, or another folder's; it goes along when the model is saved."""
    meta_model(tmp_path)
    source = write_meta(tmp_path / "meta", old_tensors(tmp_path / "hf", META))
    (source / "tokenizer.model").write_bytes(sentencepiece_model("llama"))
    assert open_checkpoint(source).tokenizer().bos_token == "<s>"
    assert open_checkpoint(source, weights=False).tokenizer().eos_token == "</s>"
    save_model(tmp_path / "out", load_model(source), open_checkpoint(source))
    assert {"tokenizer.model", "tokenizer.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    assert open_checkpoint(source, tokenizer=tmp_path / "other").tokenizer().eos_token == "<|im_end|>"


def test_what_is_wrong_with_a_release_is_told(tmp_path):
    """A key of another architecture, a key that is absent, a share that is missing or of another shape."""
    meta_model(tmp_path)
    tensors = old_tensors(tmp_path / "hf", META)
    source = write_meta(tmp_path / "meta", tensors, {**PARAMS, "moe": {}})
    with pytest.raises(UnsupportedError, match=r"params.json: 'moe' is not known"):
        open_checkpoint(source)
    (source / "params.json").write_text(json.dumps({"dim": 32}))
    with pytest.raises(CheckpointError, match=r"params.json: has no 'n_layers'"):
        open_checkpoint(source)
    source = write_meta(tmp_path / "meta", tensors, num_ranks=3)
    (source / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated.00.pth: .* number 1 is missing"):
        open_checkpoint(source)
    source = write_meta(tmp_path / "meta", tensors, num_ranks=2)
    (source / "consolidated.02.pth").unlink()
    last = source / "consolidated.01.pth"
    share = torch.load(last)
    torch.save({**share, "layers.1.attention.wq.weight": torch.zeros(3, 3)}, last)
    with pytest.raises(CheckpointError, match=r"01.pth: its share of the tensor 'layers.1.attention.wq.weight' is \(3"):
        open_checkpoint(source)
    share.pop("layers.2.feed_forward.w2.weight")
    torch.save(share, last)
    with pytest.raises(CheckpointError, match=r"01.pth: has no share of the tensor 'layers.2.feed_forward.w2.weight'"):
        open_checkpoint(source)


FAMILIES = {
    "llama": (LlamaConfig(**SIZES, **HEADS), FIRST_LIBRARY, True),
    "llama, tied": (LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True), FIRST_LIBRARY, True),
    "mistral": (MistralConfig(**SIZES, **HEADS, sliding_window=None), FIRST_LIBRARY, True),
    "gemma": (GemmaConfig(**SIZES, **HEADS, head_dim=HEAD_DIM), FIRST_LIBRARY, True),
    "gemma2": (Gemma2Config(**SIZES, **HEADS, head_dim=HEAD_DIM, query_pre_attn_scalar=8), GEMMA2, True),
    "qwen2": (Qwen2Config(**SIZES, **HEADS), FIRST_LIBRARY, False),
    "qwen3": (Qwen3Config(**SIZES, **HEADS, head_dim=HEAD_DIM), FIRST_LIBRARY, False),
    "phi3": (Phi3Config(**SIZES, **HEADS, pad_token_id=0), FIRST_LIBRARY, False),
}


def write_first_library(tmp_path, family, *, name="model-00001-of-00001.bin", wrap=lambda tensors: tensors):
    """A folder as the first library left it: its file, and the base's config.json."""
    config, rules, pairs = FAMILIES[family]
    theirs = save_random(tmp_path / "hf", config)
    tensors = old_tensors(tmp_path / "hf", rules, pairs=pairs)
    tensors = split_fused(tensors, config) if family == "phi3" else tensors
    source = tmp_path / "epoch_0"
    source.mkdir()
    (source / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    torch.save(wrap(tensors), source / name)
    return source, tensors, theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_the_first_library(tmp_path, family):
    """Each family that it had: names, pairs where its rotary turned pairs, fused matrices apart."""
    source, _, theirs = write_first_library(tmp_path, family)
    check_as_original(tmp_path, source, theirs)


@pytest.mark.parametrize("name", ["torchtune_model_0.pt", "model.pt", "meta_model_2.pt"])
def test_whatever_the_file_is_called_and_wrapped_in(tmp_path, name):
    """The names of tensors decide; the weights may lie under the key `model`; the file itself can be named."""
    source, _, theirs = write_first_library(
        tmp_path, "llama", name=name, wrap=lambda tensors: {"model": tensors, "epochs_run": 1}
    )
    for place in (source, source / name):
        assert_close(load_model(place)(IDS), theirs(IDS).logits, 1e-5, "logits")


def test_one_of_several_epochs_is_named(tmp_path):
    """Older releases left the files of all epochs side by side, each in parts."""
    source, tensors, theirs = write_first_library(tmp_path, "llama", name="hf_model_0001_0.pt")
    names = list(tensors)
    for epoch, factor in ((0, 1.0), (1, 2.0)):
        for part in (1, 2):
            share = {name: tensors[name] * factor for name in names[part - 1 :: 2]}
            torch.save(share, source / f"hf_model_{part:04}_{epoch}.pt")
    with pytest.raises(CheckpointError, match=r"several .* hf_model_0001_0.pt, hf_model_0001_1.pt; name one of them"):
        open_checkpoint(source)
    assert_close(load_model(source / "hf_model_0001_0.pt")(IDS), theirs(IDS).logits, 1e-5, "logits")


def test_metas_names_in_a_bin_beside_params_or_a_config(tmp_path):
    """What the first library wrote of a base in Meta's layout."""
    theirs = meta_model(tmp_path)
    source = write_meta(tmp_path / "epoch_0", old_tensors(tmp_path / "hf", META))
    (source / "consolidated.00.pth").rename(source / "model-00001-of-00001.bin")
    assert_close(load_model(source)(IDS), theirs(IDS).logits, 1e-5, "logits")
    (source / "params.json").unlink()
    (source / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    check_as_original(tmp_path, source, theirs)


def test_case_c076_a_mix_of_layouts_is_refused(tmp_path):
    """Two of the three in one file, in any pairing: both tensors are named."""
    source, tensors, _ = write_first_library(tmp_path, "llama", name="model.pt")
    hugging_face = stored_tensors(tmp_path / "hf")
    meta = old_tensors(tmp_path / "hf", META)
    q = {"first": "layers.0.attn.q_proj.weight", "meta": "layers.0.attention.wq.weight"}
    hf_q = "model.layers.0.self_attn.q_proj.weight"
    mixes = [
        ({**tensors, q["meta"]: meta[q["meta"]]}, ("layers.0", q["meta"])),
        ({**tensors, hf_q: hugging_face[hf_q]}, ("layers.0", hf_q)),
        ({**meta, hf_q: hugging_face[hf_q]}, ("layers.0", hf_q)),
        ({**hugging_face, q["first"]: tensors[q["first"]]}, (q["first"], "model.")),
    ]
    for mix, named in mixes:
        torch.save(mix, source / "model.pt")
        with pytest.raises(CheckpointError, match="model.pt: holds a mix of layouts") as caught:
            open_checkpoint(source)
        assert all(name in str(caught.value) for name in named)


def test_what_is_not_known_of_the_first_library_is_told(tmp_path):
    """Adapters, another family, a tensor that no model of it has, a part of a fused matrix that is missing."""
    source, tensors, _ = write_first_library(tmp_path, "phi3", name="model.pt")
    torch.save({**tensors, "layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 2)}, source / "model.pt")
    with pytest.raises(UnsupportedError, match=r"'layers.0.attn.q_proj.lora_a.weight' is an adapter's"):
        open_checkpoint(source)
    torch.save({**tensors, "layers.0.attn.gate": torch.ones(2)}, source / "model.pt")
    with pytest.raises(CheckpointError, match=r"model.pt: tensor 'layers.0.attn.gate' is not known in the first lib"):
        open_checkpoint(source)
    torch.save({name: t for name, t in tensors.items() if name != "layers.1.mlp.w3.weight"}, source / "model.pt")
    with pytest.raises(CheckpointError, match=r"'layers.1.mlp.w3.weight' is missing, a part of 'model.layers.1.mlp.g"):
        open_checkpoint(source)
    (source / "config.json").write_text('{"model_type": "mllama"}')
    with pytest.raises(UnsupportedError, match=r"is known for llama, mistral, .*, not for 'mllama'"):
        open_checkpoint(source)


def test_gemma2s_exchanged_norms_are_told(tmp_path, caplog):
    """Its files were trained with two norms exchanged; they are read as they were trained, and that is said."""
    source, _, _ = write_first_library(tmp_path, "gemma2")
    open_checkpoint(source)
    assert "norms before and after the feed-forward exchanged" in caplog.text
