"""Small random checkpoints, made through transformers: the Hugging Face layout, a tokenizer and a chat template."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.models.auto import AutoModelForCausalLM

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
VOCAB_SIZE = 400


@cache
def _trained_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = Path(__file__).read_text(encoding="utf-8")
    tokenizer.train_from_iterator([text] * 3, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of at most 400 ids with a ChatML template."""
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained_json()), **names)
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_config(**changes: Any) -> LlamaConfig:
    """Two Llama layers of width 64."""
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 3,
        "pad_token_id": 4,
    }
    return LlamaConfig(**(values | changes))


def save_tiny_checkpoint(folder: Path, config: Any = None, *, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    """Write a random checkpoint; norms and biases are random too, since fresh ones hide a dropped tensor."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or tiny_config(), dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.05)
    model.to(dtype).save_pretrained(folder, **save)
    tiny_tokenizer().save_pretrained(folder)
    return folder
