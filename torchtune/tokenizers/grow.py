"""New tokens in a tokenizer's files, each one id in ours and in transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from torchtune.errors import CheckpointError
from torchtune.tokenizers.added_tokens import fill_gaps, json_object, special_token, user_token
from torchtune.tokenizers.files import open_tokenizer, tokenizer_from_files, with_tokenizer_json


def add_tokens(
    files: Mapping[str, bytes],
    tokens: Sequence[str],
    *,
    special: bool = True,
    config: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """The files of a tokenizer with `tokens` added at the next free ids, in this order.

    Args:
        files: contents by file name.
        special: decoding leaves them out where it skips special tokens.
        config: config.json, which says what the files leave open.
    Raises:
        CheckpointError: a token is empty, begins or ends with whitespace, comes twice or is there already (all of
            these at once); or there is no tokenizer.
    """
    files = with_tokenizer_json(files, config)
    known = open_tokenizer(files, config)
    problems = [
        f"'{token}' {problem}" for token in tokens if (problem := _problem(token, tokens, known.token_id(token)))
    ]
    if problems:
        raise CheckpointError("new tokens can't be added: " + "; ".join(dict.fromkeys(problems)))
    # With what other files alone declare, or the new tokens would take those ids.
    fast = fill_gaps(FastTokenizer.from_buffer(tokenizer_from_files(files, config)[0]))
    fast.add_tokens([special_token(token) if special else user_token(token) for token in tokens])
    ids = {token: fast.token_to_id(token) for token in tokens}
    grown = files | {"tokenizer.json": fast.to_str(pretty=True).encode()}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if name in files:
            grown[name] = _declared(name, json_object(files, name), ids, special=special)
    _check(grown, ids, config)
    return grown


def _problem(token: str, tokens: Sequence[str], known_id: int | None) -> str | None:
    if not token:
        return "is empty"
    if token != token.strip():
        return "begins or ends with whitespace"
    if known_id is not None:
        return f"is a token already (id {known_id})"
    return "is named twice" if tokens.count(token) > 1 else None


def _declared(name: str, content: dict[str, Any], ids: Mapping[str, int | None], *, special: bool) -> bytes:
    """One of the files that declare added tokens, with the new ones where it lists such."""
    if name == "added_tokens.json":
        content |= ids
    elif special:
        key = "extra_special_tokens" if isinstance(content.get("extra_special_tokens"), list) else None
        key = key or "additional_special_tokens"
        content[key] = [*(content.get(key) or []), *ids]
    if "added_tokens_decoder" in content:
        properties = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
        new = {str(token_id): {"content": token, **properties} for token, token_id in ids.items()}
        content["added_tokens_decoder"] = {**(content["added_tokens_decoder"] or {}), **new}
    return json.dumps(content, ensure_ascii=False, indent=2).encode()


def _check(files: Mapping[str, bytes], ids: Mapping[str, int | None], config: Mapping[str, Any] | None) -> None:
    """A token that another one begins with can be out of reach; better said than trained."""
    tokenizer = open_tokenizer(files, config)
    for token, token_id in ids.items():
        if tokenizer.encode(token).ids != [token_id]:
            raise CheckpointError(f"new token '{token}' does not become one id: a token that is there hides it")
