"""A SentencePiece model (`tokenizer.model`) as a tokenizer of the `tokenizers` library.

BPE and unigram models; ids are SentencePiece's own. What a Hugging Face tokenizer class does otherwise around
the same pieces (where the space before the first word goes) is a layout here. Format: sentencepiece_model.proto.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from torchtune.errors import CheckpointError, UnsupportedError
from torchtune.tokenizers.added_tokens import special_token, user_token
from torchtune.tokenizers.merges import merges_in_order
from torchtune.tokenizers.protobuf import fields

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
_OTHER_KINDS = {3: "word", 4: "char"}
SPACE = "▁"
# Field numbers of TrainerSpec and NormalizerSpec.
_TRAINER = {
    3: "kind",
    24: "space_at_end",
    35: "byte_fallback",
    40: "unk_id",
    41: "bos_id",
    42: "eos_id",
    43: "pad_id",
}
_NORMALIZER = {2: "charsmap", 3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}


@dataclass
class SentencePieceModel:
    """What a model file says; the defaults are the format's.

    Attributes:
        pieces: text, score and kind of each, by id.
        merges: the pairs to join, the first one first; None: they follow from the scores.
        charsmap: compiled rules by which characters are replaced before anything else; empty: none.
    """

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    kind: int = UNIGRAM
    space_at_end: bool = False
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    merges: list[tuple[str, str]] | None = None
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @property
    def fits_llama(self) -> bool:
        """Whether the tokenizer classes of Llama and Gemma can read it: they know BPE with bytes alone."""
        return self.kind == BPE and self.byte_fallback and not self.charsmap

    def texts(self, *kinds: int) -> list[str]:
        """The pieces of these kinds, by id."""
        return [text for text, _, kind in self.pieces if kind in kinds]

    def named(self) -> dict[str, str]:
        """The tokens that have a name, as tokenizer_config.json would say it."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id, "pad_token": self.pad_id}
        return {name: self.pieces[i][0] for name, i in ids.items() if 0 <= i < len(self.pieces)}


def read_model(content: bytes) -> SentencePieceModel:
    """The model in the content of a `tokenizer.model`.

    Raises:
        CheckpointError: it is none.
    """
    model = SentencePieceModel()
    try:
        for number, value in fields(content):
            if number == 1:
                model.pieces.append(_piece(_message(value)))
            elif number in (2, 3):
                names = _TRAINER if number == 2 else _NORMALIZER
                for key, option in fields(_message(value)):
                    if key in names:
                        kind = type(getattr(model, names[key]))  # a flag is written as a number
                        setattr(model, names[key], kind(option))
    except ValueError as error:
        raise CheckpointError(f"is no SentencePiece model: {error}") from error
    if not model.pieces:
        raise CheckpointError("is no SentencePiece model: it has no pieces")
    return model


def _message(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"a message is expected, {value!r} was found")
    return value


def _piece(content: bytes) -> tuple[str, float, int]:
    values: dict[int, Any] = {1: b"", 2: 0.0, 3: NORMAL} | dict(fields(content))
    return values[1].decode("utf-8"), values[2], values[3]


def sentencepiece_tokenizer(
    model: SentencePieceModel,
    *,
    layout: str = "sentencepiece",
    prefix_space: bool | None = None,
    prefix_every: bool = True,
    renamed: Mapping[int, str] | None = None,
) -> Tokenizer:
    """A tokenizer that gives this model's ids.

    Args:
        layout: around the pieces, do as SentencePiece itself ("sentencepiece") or as the tokenizer class of Llama
            ("llama": the prefix is left out where the text begins with a space) or Gemma ("gemma") does.
        prefix_space: put a space before the first word; None: as the model says.
        prefix_every: and again after each special token.
        renamed: other texts for some ids, as `added_tokens_decoder` gives them to reserved pieces.
    Raises:
        UnsupportedError: a kind of model that can't be had with this library; says which.
    """
    _refuse_unsupported(model)
    model.pieces = _renamed(model.pieces, renamed or {})
    whole = model.texts(USER_DEFINED)
    if prefix_space is None:
        prefix_space = model.add_dummy_prefix
    scheme: Any = "never" if not prefix_space else "always" if prefix_every else "first"
    metaspace = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    if layout == "sentencepiece":
        tokenizer = Tokenizer(_pieces_model(model, whole_first=bool(whole)))
        tokenizer.normalizer = _normalizer(model, prefix_space and prefix_every)
        steps: list[Any] = [metaspace] if prefix_space else []
        # SentencePiece takes these whole wherever they stand, and joins nothing to them.
        steps += [pre_tokenizers.Split(Regex(_any_of(whole)), "isolated")] if whole else []
        if steps:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        tokenizer = Tokenizer(_pieces_model(model, (NORMAL, USER_DEFINED)))
        if layout == "gemma":
            tokenizer.normalizer = normalizers.Replace(" ", SPACE)
            tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        else:
            tokenizer.pre_tokenizer = metaspace
    tokenizer.decoder = _decoder(prefix_space, byte_fallback=model.byte_fallback or layout != "sentencepiece")
    added = [special_token(text) for text in model.texts(CONTROL)]
    if layout != "sentencepiece":
        added += [user_token(text) for text in whole]
    tokenizer.add_tokens(added)
    return tokenizer


def _refuse_unsupported(model: SentencePieceModel) -> None:
    if model.kind not in (UNIGRAM, BPE):
        raise UnsupportedError(
            f"a SentencePiece model of kind '{_OTHER_KINDS.get(model.kind, model.kind)}' is not supported; "
            "unigram and bpe are"
        )
    if model.space_at_end:
        raise UnsupportedError("a SentencePiece model that writes spaces after words (suffix) is not supported")
    if model.kind == BPE and model.texts(UNUSED):
        raise UnsupportedError("a SentencePiece BPE model with pieces marked unused is not supported")


def _renamed(pieces: list[tuple[str, float, int]], names: Mapping[int, str]) -> list[tuple[str, float, int]]:
    """Pieces under other texts; a text that another piece keeps is not given away."""
    kept = {text for token_id, (text, _, _) in enumerate(pieces) if token_id not in names}
    return [
        (names[token_id] if token_id in names and names[token_id] not in kept else text, score, kind)
        for token_id, (text, score, kind) in enumerate(pieces)
    ]


def _pieces_model(
    model: SentencePieceModel, joined: Collection[int] = (NORMAL,), *, whole_first: bool = False
) -> models.BPE | models.Unigram:
    if model.kind == UNIGRAM:
        vocab = [(text, score) for text, score, _ in model.pieces]
        return models.Unigram(vocab, unk_id=model.unk_id, byte_fallback=model.byte_fallback)
    ids = {text: token_id for token_id, (text, _, _) in enumerate(model.pieces)}
    merges = model.merges
    if merges is None:
        scores = {text: score for text, score, kind in model.pieces if kind in joined}
        best_first = sorted(scores, key=lambda text: (-scores[text], ids[text]))
        merges = merges_in_order(best_first, {text: ids[text] for text in scores})
    return models.BPE(
        ids,
        merges,
        unk_token=model.pieces[model.unk_id][0],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=whole_first,
    )


def _normalizer(model: SentencePieceModel, prefix_always: bool) -> normalizers.Normalizer:
    """SentencePiece's steps in its order: replace characters, drop spaces, write those that stay as ▁."""
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if prefix_always:
        # Metaspace leaves the prefix out where a text begins with ▁ already, SentencePiece doesn't.
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2))
    return normalizers.Sequence(steps)


def _decoder(prefix_space: bool, *, byte_fallback: bool) -> decoders.Decoder:
    steps: list[Any] = [decoders.Replace(SPACE, " "), *([decoders.ByteFallback()] if byte_fallback else [])]
    # Fused first: the space to strip is that of the text, not of each piece.
    steps += [decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if prefix_space else [])]
    return decoders.Sequence(steps)


def _any_of(texts: Iterable[str]) -> str:
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
