"""A GGUF file's metadata as the files of a Hugging Face folder: config, generation config and tokenizer."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from torchtune.checkpoint.gguf import ARCHITECTURES, GGUFFile
from torchtune.errors import UnsupportedError, did_you_mean

CONTROL, USER_DEFINED = 3, 4

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json that this file's metadata and tensors amount to."""
    arch = file.architecture

    def get(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{arch}.{key}", default)

    model_type = ARCHITECTURES[arch]
    hidden_size, num_heads = int(get("embedding_length")), file.num_heads
    config: dict[str, Any] = {
        "architectures": [
            {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[arch]
        ],
        "model_type": model_type,
        "vocab_size": file.headers["model.embed_tokens.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": int(get("feed_forward_length")),
        "num_hidden_layers": int(get("block_count")),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.num_kv_heads,
        "head_dim": int(get("attention.key_length") or hidden_size // num_heads),
        "hidden_act": "silu",
        "max_position_embeddings": int(get("context_length")),
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "lm_head.weight" not in file.headers,
        "torch_dtype": str(next(iter(file.headers.values())).dtype).removeprefix("torch."),
    }
    if arch != "qwen2":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in file.headers
    if scaling := _rope_scaling(file, get, config):
        config["rope_scaling"] = scaling
    for name in ("bos", "eos", "padding"):
        token_id = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            config[f"{NAMES[name]}_id"] = int(token_id)
    return config


def _rope_scaling(file: GGUFFile, get: Any, config: dict[str, Any]) -> dict[str, Any] | None:
    if file.rope_factors is not None:
        return _llama3_scaling(file.rope_factors, config)
    kind = get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(f"{file.path}: rope scaling '{kind}' is not supported; linear, yarn and llama3's are")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _decimal(get("rope.scaling.factor"))}
    if original := get("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = int(original)
    return scaling


def _llama3_scaling(factors: np.ndarray, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1 and later keep what each frequency is divided by; the options behind it are found again."""
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    head_dim = config["head_dim"]
    inv_freq = config["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelength = 2 * np.pi / inv_freq
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(expected, factors, rtol=1e-4):
        raise UnsupportedError("the GGUF file's rope_freqs are not Llama 3.1's; open the original checkpoint instead")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _decimal(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, where the file holds 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def hf_generation_config(file: GGUFFile) -> dict[str, Any]:
    """The generation_config.json: which tokens begin and end."""
    found = {}
    for name in ("bos", "eos", "padding"):
        token_id = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            found[{"padding": "pad"}.get(name, name) + "_token_id"] = int(token_id)
    return found


def hf_tokenizer(file: GGUFFile) -> tuple[bytes, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json that encode as this file's tokenizer does.

    Raises:
        UnsupportedError: a kind of tokenizer that is not known here.
    """
    metadata = file.metadata
    kind = metadata.get("tokenizer.ggml.model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers:
        raise UnsupportedError(f"{file.path}: tokenizer '{kind}' is not supported{did_you_mean(str(kind), makers)}")
    tokenizer = makers[str(kind)](metadata, str(file.path))
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (CONTROL, USER_DEFINED):
            added = AddedToken(token, normalized=False, special=token_type == CONTROL)
            (tokenizer.add_special_tokens if token_type == CONTROL else tokenizer.add_tokens)([added])
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in NAMES.items():
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            config[key] = tokens[token_id]
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and "bos_token" in config:
        bos = config["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    if context := metadata.get(f"{file.architecture}.context_length"):
        config["model_max_length"] = int(context)
    return tokenizer.to_str().encode(), config


def _byte_level(metadata: dict[str, Any], path: str) -> Tokenizer:
    """Byte-level BPE; `tokenizer.ggml.pre` says how text is cut before merging."""
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    pre = metadata.get("tokenizer.ggml.pre", "default")
    by_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])

    cuts = {
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_regex]),
        "gpt-2": by_regex,
        "default": by_regex,
        "llama-bpe": split(LLAMA3_SPLIT),
        "qwen2": split(QWEN2_SPLIT),
    }
    if pre not in cuts:
        raise UnsupportedError(f"{path}: pre-tokenizer '{pre}' is not supported{did_you_mean(str(pre), cuts)}")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cuts[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], path: str) -> Tokenizer:
    """SentencePiece's BPE: merges follow from the pieces' scores, unknown characters fall back to bytes."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += [(score, pair) for pair in sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    merges.sort(key=lambda merge: merge[0], reverse=True)
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    model = models.BPE(vocab, [pair for _, pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
