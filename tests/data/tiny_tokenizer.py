"""A tiny byte-level BPE tokenizer with the special tokens that a test wants."""

from collections.abc import Sequence
from functools import cache

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from torchtune.tokenizers.tokenizer import Tokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog. What is two plus two? It is four, I think.",
    "assistant\nuser\nsystem\nmodel\ntool\n Hello, world! Answer the question in one word.",
    '{"name": "add", "arguments": {"a": 2, "b": 3}}\n\n<think>\n\n</think>\n\nFirst answer. Second answer.',
]


@cache
def tiny_tokenizer(
    special: Sequence[str] = ("<|im_start|>", "<|im_end|>"),
    *,
    added: Sequence[str] = (),
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    adds_bos: bool = False,
    rstrip: bool = False,
    vocab_size: int = 400,
) -> Tokenizer:
    """A tokenizer trained on a few sentences.

    Args:
        special: texts of special tokens. `bos`, `eos` and `pad` are added to them.
        added: texts of added tokens that are not special.
        adds_bos: the post-processor writes BOS before a text.
        rstrip: special tokens swallow the white space behind them.
    """
    backend = Backend(models.BPE())
    # White space is cut as Llama 3 and Qwen cut it, so that a prompt's end can straddle a token.
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    named = [token for token in (bos, eos, pad) if token]
    texts = list(dict.fromkeys([*special, *named]))
    backend.add_special_tokens([AddedToken(text, special=True, rstrip=rstrip) for text in texts])
    backend.add_tokens([AddedToken(text, special=False) for text in added])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    config = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    return Tokenizer.from_json(backend.to_str().encode(), {k: v for k, v in config.items() if v})


def trained_texts(tokenizer: Tokenizer, sample: object) -> list[str]:
    """The texts of the runs of trained tokens of a sample."""
    ids, trained = sample.input_ids.tolist(), sample.trained.tolist()
    runs: list[list[int]] = []
    for i, token in enumerate(ids):
        if trained[i]:
            if i == 0 or not trained[i - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def full_text(tokenizer: Tokenizer, sample: object) -> str:
    """The text of all tokens of a sample."""
    return tokenizer.decode(sample.input_ids.tolist(), skip_special_tokens=False)
