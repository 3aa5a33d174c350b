"""Added tokens, as the text files beside a vocabulary declare them.

tokenizer_config.json wins where it has `added_tokens_decoder`; older folders say the same in
special_tokens_map.json and added_tokens.json. Order and defaults are those of transformers, so that ids agree.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from torchtune.errors import CheckpointError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PROPERTIES = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass
class DeclaredTokens:
    """What the files declare.

    Attributes:
        config: tokenizer_config.json, completed by special_tokens_map.json where that counts.
        by_id: tokens whose id is given.
        named: the tokens of `bos_token`, `eos_token` and other names.
        extra: further special tokens, which have neither name nor id.
    """

    config: dict[str, Any]
    by_id: dict[int, AddedToken] = field(default_factory=dict)
    named: dict[str, AddedToken] = field(default_factory=dict)
    extra: list[AddedToken] = field(default_factory=list)

    @property
    def contents(self) -> set[str]:
        """The texts of all of them."""
        return {token.content for token in (*self.by_id.values(), *self.named.values(), *self.extra)}

    def name_by_default(self, names: Mapping[str, str]) -> None:
        """Give names to tokens where the files don't say; `null` in them means that there is none."""
        by_content = {token.content: token for token in self.by_id.values()}
        for name, text in names.items():
            if name not in self.config:
                self.config[name] = text
                self.named[name] = by_content.get(text) or special_token(text)

    def to_add(self, known: Collection[str]) -> list[AddedToken]:
        """Each once: those with an id, in the order of their ids; then named and extra ones that are not `known`."""
        found = {self.by_id[token_id].content: self.by_id[token_id] for token_id in sorted(self.by_id)}
        for token in (*self.named.values(), *self.extra):
            if token.content not in known:
                found.setdefault(token.content, token)
        for token in self.named.values():
            if token.content in found:
                found[token.content].special = True
        return list(found.values())


def read_declared(files: Mapping[str, bytes]) -> DeclaredTokens:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say.

    Raises:
        CheckpointError: one of them can't be read, or declares what is no token; names the file and key.
    """
    config = json_object(files, "tokenizer_config.json")
    declared = DeclaredTokens(config)
    if "added_tokens_decoder" in config:
        for token_id, entry in (config["added_tokens_decoder"] or {}).items():
            declared.by_id[int(token_id)] = _token(entry, f"added_tokens_decoder.{token_id}", special=False)
        _read_names(declared, config)
        return declared
    config.update(json_object(files, "special_tokens_map.json"))
    _read_names(declared, config)
    special = {token.content for token in (*declared.named.values(), *declared.extra)}
    for content, token_id in json_object(files, "added_tokens.json").items():
        is_special = content in special
        declared.by_id[int(token_id)] = AddedToken(content, normalized=not is_special, special=is_special)
    return declared


def _read_names(declared: DeclaredTokens, config: Mapping[str, Any]) -> None:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    names = {key: value for key, value in config.items() if key in NAMED_TOKENS or _is_named(key, value)}
    # Some configs give their extra tokens names of their own: {"image_token": "<image>"}.
    names.update(extra if isinstance(extra, Mapping) else {})
    by_content = {token.content: token for token in declared.by_id.values()}
    for key, value in names.items():
        if value:
            token = _token(value, key, special=True)
            declared.named[key] = by_content.get(token.content, token)
    if not isinstance(extra, Mapping):
        declared.extra = [_token(value, "extra_special_tokens", special=True) for value in extra]


def _is_named(key: str, value: Any) -> bool:
    """Flags such as `add_bos_token` end alike, but are no text."""
    return key.endswith("_token") and isinstance(value, (str, Mapping))


def _token(value: Any, key: str, *, special: bool) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=special)
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"tokenizer_config.json: {key}: {value!r} is no token; it should have a 'content'")
    properties = {name: bool(value[name]) for name in _PROPERTIES if name in value}
    return AddedToken(value["content"], **({"special": special} | properties))


def special_token(text: str) -> AddedToken:
    """A token that is matched as it is written and left out when decoding."""
    return AddedToken(text, normalized=False, special=True)


def user_token(text: str) -> AddedToken:
    """A token that is matched as it is written and kept when decoding."""
    return AddedToken(text, normalized=False, special=False)


def json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A JSON file's object; empty if there is no such file.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise CheckpointError(f"{name} can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} should hold an object, it holds a {type(value).__name__}")
    return value


def add_declared(tokenizer: Tokenizer, declared: DeclaredTokens) -> Tokenizer:
    """Give `tokenizer` the declared tokens; returns it, or a copy where tokens had to be put at their ids.

    Raises:
        CheckpointError: the vocabulary has another id for a token than the one declared.
    """
    tokenizer = _with_ids(tokenizer, declared.by_id)
    for token_id, token in declared.by_id.items():
        found = tokenizer.token_to_id(token.content)
        if found is not None and found != token_id:
            raise CheckpointError(
                f"added token '{token.content}' should have the id {token_id}, but the vocabulary gives it {found}"
            )
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens(declared.to_add(known))
    return tokenizer


def _with_ids(tokenizer: Tokenizer, by_id: Mapping[int, AddedToken]) -> Tokenizer:
    """The library numbers added tokens itself; where that would give another id, the token joins the vocabulary."""
    next_id = tokenizer.get_vocab_size()
    missing = {by_id[i].content: i for i in sorted(by_id) if tokenizer.token_to_id(by_id[i].content) is None}
    if list(missing.values()) == list(range(next_id, next_id + len(missing))):
        return tokenizer
    taken = set(tokenizer.get_vocab().values()) & set(missing.values())
    if taken:
        raise CheckpointError(f"added tokens are declared at ids that are taken: {sorted(taken)[:8]}")
    return fill_gaps(_with_pieces(tokenizer, missing))


def fill_gaps(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, or a copy in which ids that nothing has are reserved.

    The library gives a new token the number of tokens as its id, which is another's where ids leave gaps.
    """
    used = set(tokenizer.get_vocab().values())
    gaps = set(range(max(used, default=-1) + 1)) - used
    return _with_pieces(tokenizer, {f"<|reserved_token_{i}|>": i for i in sorted(gaps)}) if gaps else tokenizer


def _with_pieces(tokenizer: Tokenizer, pieces: Mapping[str, int]) -> Tokenizer:
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    if not isinstance(vocab, dict):
        raise CheckpointError(f"a vocabulary in order of ids can't have tokens at {sorted(pieces.values())[:8]}")
    vocab.update(pieces)
    return Tokenizer.from_str(json.dumps(content))


def set_bos_and_eos(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Let the tokenizer's own post-processor put these before and after a text."""
    before, after = f"{bos} " if bos else "", f" {eos}" if eos else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{after}",
        pair=f"{before}$A{after} {before}$B:1{after}",
        special_tokens=[(token, _id_of(tokenizer, token)) for token in (bos, eos) if token],
    )


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise CheckpointError(f"'{token}' should be put around each text, but the vocabulary does not have it")
    return token_id


def text_of(value: Any) -> str | None:
    """The text of a token that is written as a string, as an object with `content`, or not at all."""
    content = value.get("content") if isinstance(value, Mapping) else value
    return str(content) if content else None
