"""A tokenizer from whichever files a checkpoint has, read as transformers reads them.

`tokenizer.json` wins; else `tokenizer.model` (SentencePiece or tiktoken), `vocab.json` and `merges.txt`, or a
`*.tiktoken` file. All end as one `tokenizers` object, so that nothing downstream knows where it came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, pre_tokenizers

from torchtune.errors import CheckpointError
from torchtune.tokenizers.added_tokens import (
    DeclaredTokens,
    add_declared,
    read_declared,
    set_bos_and_eos,
    special_token,
    text_of,
)
from torchtune.tokenizers.sentencepiece import SPACE, read_model, sentencepiece_tokenizer
from torchtune.tokenizers.tiktoken import is_tiktoken, published, read_ranks, tiktoken_tokenizer
from torchtune.tokenizers.tokenizer import Tokenizer
from torchtune.tokenizers.vocab_merges import vocab_merges_tokenizer

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

# Model types whose folders transformers reads as they are, whatever `tokenizer_class` says (tokenization_auto).
_CLASS_IGNORED = frozenset(
    [
        "arctic",
        "ernie4_5",
        "ernie4_5_moe",
        "fuyu",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "internlm2",
        "internlm3",
        "jamba",
        "kimi_linear",
        "llava",
        "llava_next",
        "minicpm3",
        "minimax_m2",
        "ministral",
        "ministral3",
        "mistral",
        "mistral3",
        "mixtral",
        "nemotron",
        "olmo2",
        "olmo3",
        "persimmon",
        "phi3",
        "phi3_v",
        "phimoe",
        "pixtral",
        "stablelm",
        "vipllava",
        "voxtral",
    ]
)


def open_tokenizer(files: Mapping[str, bytes], config: Mapping[str, Any] | None = None) -> Tokenizer:
    """The tokenizer that a folder's files make.

    Args:
        files: contents by file name.
        config: config.json, which says what the files leave open.
    Raises:
        CheckpointError, UnsupportedError: there is none, or it can't be read; names the file.
    """
    fast, tokenizer_config = _build(files, config or {})
    return Tokenizer(fast, tokenizer_config)


def tokenizer_from_files(
    files: Mapping[str, bytes], config: Mapping[str, Any] | None = None
) -> tuple[bytes, dict[str, Any]]:
    """The same as contents: those of tokenizer.json, and the object of tokenizer_config.json.

    Args, raises: as `open_tokenizer`.
    """
    fast, tokenizer_config = _build(files, config or {})
    return fast.to_str(pretty=True).encode(), tokenizer_config


def with_tokenizer_json(files: Mapping[str, bytes], config: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """The files, and where they have a vocabulary but no tokenizer.json, that and a tokenizer_config.json to it.

    With these, transformers and vLLM read the folder quickly and to the same ids.

    Args, raises: as `open_tokenizer`.
    """
    if "tokenizer.json" in files or not has_vocabulary(files):
        return dict(files)
    tokenizer_json, tokenizer_config = tokenizer_from_files(files, config)
    written = json.dumps(tokenizer_config, ensure_ascii=False, indent=2).encode()
    return {**files, "tokenizer.json": tokenizer_json, "tokenizer_config.json": written}


def has_vocabulary(files: Mapping[str, bytes]) -> bool:
    """Whether there is anything that `open_tokenizer` could read."""
    return any(is_vocabulary(name) for name in files)


def is_vocabulary(name: str) -> bool:
    """Whether a file of this name holds a vocabulary."""
    return name in VOCABULARY_FILES or name.endswith(".tiktoken")


def _build(files: Mapping[str, bytes], config: Mapping[str, Any]) -> tuple[FastTokenizer, dict[str, Any]]:
    declared = read_declared(files)
    if "tokenizer.json" in files:
        fast = _parse(files["tokenizer.json"])
        if _is_llama_class(declared.config, config) and b'"ByteLevel"' not in files["tokenizer.json"]:
            _as_llama_class(fast, declared.config)
        return add_declared(fast, declared), declared.config
    if "tokenizer.model" in files:
        content = files["tokenizer.model"]
        build = _from_tiktoken if is_tiktoken(content) else _from_sentencepiece
        return build("tokenizer.model", content, declared, config)
    if "vocab.json" in files and "merges.txt" in files:
        fast, names = vocab_merges_tokenizer(files["vocab.json"], files["merges.txt"], declared.config, config)
        return _finish(fast, declared, names)
    if named := sorted(name for name in files if name.endswith(".tiktoken")):
        return _from_tiktoken(named[0], files[named[0]], declared, config)
    found = ", ".join(sorted(name for name in files if is_vocabulary(name))) or "none of them"
    raise CheckpointError(
        "has no tokenizer: tokenizer.json, tokenizer.model, vocab.json with merges.txt, or a .tiktoken file is "
        f"needed, there is {found}; name a folder or file that has one with tokenizer=PATH"
    )


def _parse(tokenizer_json: bytes) -> FastTokenizer:
    try:
        return FastTokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"tokenizer.json can't be read: {error}") from error


def _from_sentencepiece(
    name: str, content: bytes, declared: DeclaredTokens, config: Mapping[str, Any]
) -> tuple[FastTokenizer, dict[str, Any]]:
    try:
        model = read_model(content)
    except CheckpointError as error:
        raise CheckpointError(f"{name} {error.problem}") from error
    tokenizer_config = declared.config
    layout = _sentencepiece_layout(tokenizer_config, config) if model.fits_llama else "sentencepiece"
    prefix_space = tokenizer_config.get("add_prefix_space")
    fast = sentencepiece_tokenizer(
        model,
        layout=layout,
        # The classes put one or not, whatever the model says.
        prefix_space={"llama": prefix_space is not False, "gemma": False}.get(layout),
        prefix_every=bool(tokenizer_config.get("legacy", layout != "llama")),
        renamed={i: token.content for i, token in declared.by_id.items() if i < len(model.pieces)},
    )
    if layout == "sentencepiece":
        _read_as_it_is(tokenizer_config)
    names = {name: text for name, text in model.named().items() if name != "pad_token" or layout == "gemma"}
    return _finish(fast, declared, names)


def _from_tiktoken(
    name: str, content: bytes, declared: DeclaredTokens, config: Mapping[str, Any]
) -> tuple[FastTokenizer, dict[str, Any]]:
    try:
        ranks = read_ranks(content)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error.problem}") from error
    vocabulary = published(len(ranks), config)
    if not declared.by_id:
        declared.by_id = {token_id: special_token(text) for token_id, text in vocabulary.special.items()}
        if vocabulary.adds_bos:
            declared.config.setdefault("add_bos_token", True)
    else:
        # Ids between those of declared tokens belong to rows that no text reaches; transformers names them so.
        for token_id in range(len(ranks), max(declared.by_id)):
            declared.by_id.setdefault(token_id, special_token(f"<|reserved_token_{token_id}|>"))
    _read_as_it_is(declared.config)
    known = {token.content for token in declared.by_id.values()}
    names = {name: token for name, token in vocabulary.names.items() if token in known}
    return _finish(tiktoken_tokenizer(ranks, vocabulary.layout), declared, names)


def _finish(
    fast: FastTokenizer, declared: DeclaredTokens, names: Mapping[str, str]
) -> tuple[FastTokenizer, dict[str, Any]]:
    """Complete what no tokenizer.json has said: named tokens, added ones, BOS and EOS."""
    declared.name_by_default(names)
    config = declared.config
    fast = add_declared(fast, declared)
    ends = [
        text_of(config.get(f"{name}_token")) if config.get(f"add_{name}_token") else None for name in ("bos", "eos")
    ]
    set_bos_and_eos(fast, *ends)
    return fast, config


def _class_name(tokenizer_config: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    return str(tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class") or "").removesuffix("Fast")


def _is_llama_class(tokenizer_config: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    counts = config.get("model_type") not in _CLASS_IGNORED
    return counts and _class_name(tokenizer_config, config) == "LlamaTokenizer"


def _sentencepiece_layout(tokenizer_config: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    is_gemma = _class_name(tokenizer_config, config) in ("GemmaTokenizer", "") and "gemma" in config.get(
        "model_type", ""
    )
    return "llama" if _is_llama_class(tokenizer_config, config) else "gemma" if is_gemma else "sentencepiece"


def _read_as_it_is(tokenizer_config: dict[str, Any]) -> None:
    """Name the class that takes a tokenizer.json as it stands: others put their own steps around its pieces."""
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"


def _as_llama_class(fast: FastTokenizer, tokenizer_config: Mapping[str, Any]) -> None:
    """Put spaces as transformers' LlamaTokenizer does: it keeps a tokenizer.json's pieces, not what stands around.

    Without `legacy` the first word alone is prefixed, not each text after a special token; and a text that
    begins with a space gets no second one.
    """
    prefix_space = tokenizer_config.get("add_prefix_space") is not False
    scheme: Any = "never" if not prefix_space else "always" if tokenizer_config.get("legacy") else "first"
    fast.normalizer = None
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix_space else [])])
