"""What rounding costs: the held-out loss of a small model in each kind, and how much of int4's training rounded recovers.

    python benchmarks/quantized_loss.py

The model is trained here in float32 first: weights that once were 4-bit blocks, like those of the quickstart's model,
would lose nothing by being rounded again. Nor does a model lose much that has learned little, so it is small, reads bytes,
and has a text of which much can be predicted. From it two runs of as many steps go on, one as before and one with `qat`;
the first's weights are rounded afterwards. benchmarks/README.md says more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sft_vs_trl import cpu_name
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from torchtune.cli.tune import run
from torchtune.models.build import build_model
from torchtune.quantization.schemes import KINDS

VOCAB_SIZE = 258  # the bytes, and two special tokens
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
MAX_SEQ_LEN, ROW_BYTES = 512, 128
NUMBERED = ("CJK UNIFIED", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN")
HELD_OUT = 20  # of so many rows one


def main() -> None:
    """Train, round, train rounded; print the tables and write them under results/."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--group-sizes", type=int, nargs="*", default=[64])
    parser.add_argument("--work", help="Folder to keep; what lies there of an earlier run is not made again.")
    parser.add_argument("--name", default="quantized-loss")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(options.work or folder)
        work.mkdir(exist_ok=True)
        train, held_out = write_texts(work)
        random_checkpoint(work / "random", train)
        base = tune_up(work / "base", work / "random", train, options.base_steps, lr=4e-3)
        more = tune_up(work / "more", base, train, options.steps, lr=1e-3)
        dense = loss(more, held_out)
        kinds = {kind: loss(quantized(work / kind, more, kind), held_out) for kind in KINDS}
        print(dense, kinds, flush=True)
        recovered = {}
        for group_size in options.group_sizes:
            plain = loss(quantized(work / f"plain{group_size}", more, "int4", group_size=group_size), held_out)
            keys = {"qat": "int4", "qat_group_size": group_size}
            trained = tune_up(work / f"qat{group_size}", base, train, options.steps, lr=1e-3, **keys)
            recovered[group_size] = {"rounded": plain, "trained_rounded": loss(trained / "quantized", held_out)}
            print(group_size, recovered[group_size], flush=True)
    report(dense, kinds, recovered, options)


def write_texts(work: Path) -> tuple[Path, Path]:
    """Rows of text: the names of Unicode's characters in their order, a few in each; every 20th row held out.

    Rows are short, for a step that has one script alone points another way than the next. Left out are the scripts whose
    names are numbers and nothing else.
    """
    texts = [""]
    for code in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(code), "")
        if name and not name.startswith(NUMBERED):
            if len(texts[-1]) + len(name) > ROW_BYTES:
                texts.append("")
            texts[-1] += name + "\n"
    paths = work / "train.jsonl", work / "held_out.jsonl"
    for path, is_held_out in zip(paths, (False, True), strict=True):
        rows = [text for index, text in enumerate(texts) if (index % HELD_OUT == 0) == is_held_out]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
    return paths


def random_checkpoint(folder: Path, text: Path) -> None:
    """A random Llama with a tokenizer trained on the text."""
    if folder.exists():
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    rows = text.read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator((json.loads(row)["text"] for row in rows), trainer)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_SEQ_LEN,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
        **SIZES,
        **HEADS,
    }
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def tune(recipe: str, **keys: Any) -> None:
    """Run a recipe, in this process."""
    words = [f"{key}={value}" for key, value in keys.items()]
    if run(["run", recipe, *words]):
        raise SystemExit(f"{recipe} failed: {' '.join(words)}")


def tune_up(out: Path, start: Path, data: Path, steps: int, *, lr: float, **keys: Any) -> Path:
    """Train in float32 from a checkpoint; returns the last one."""
    fixed = {"dtype": "fp32", "max_seq_len": MAX_SEQ_LEN, "batch_size": 1, "gradient_accumulation_steps": 1}
    # Down to nothing: what is still in motion is not much worse for being rounded.
    keys |= {"optimizer.lr": lr, "lr_scheduler.min_lr_ratio": 0, **fixed}
    if not (out / f"step_{steps}").exists():
        tune("full_finetune", model_checkpoint=start, dataset=data, output_dir=out, max_steps=steps, **keys)
    return out / f"step_{steps}"


def quantized(out: Path, model: Path, kind: str, **keys: Any) -> Path:
    """A checkpoint quantised."""
    if not out.exists():
        tune("quantize", model_checkpoint=model, output_dir=out, kind=kind, **keys)
    return out


def loss(model: Path, data: Path) -> float:
    """The held-out loss of a folder, in nats a token."""
    found = data.with_name("found.json")
    tune("evaluate", model_checkpoint=model, dataset=data, dtype="fp32", max_seq_len=MAX_SEQ_LEN, output=found)
    return float(json.loads(found.read_text())["dataset"]["loss"])


def report(
    dense: float, kinds: dict[str, float], recovered: dict[int, dict[str, float]], options: argparse.Namespace
) -> None:
    """Tables for people."""
    lines = [
        f"# Held-out loss of quantised models, {datetime.date.today()}",
        "",
        f"{cpu_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, fp32.",
        f"Command: `python benchmarks/quantized_loss.py {' '.join(sys.argv[1:])}`. A Llama of {SIZES}, "
        f"vocabulary {VOCAB_SIZE}, trained {options.base_steps} + {options.steps} steps of {MAX_SEQ_LEN} bytes on the names "
        "of Unicode's characters.",
        "",
        "| weights | held-out loss | against dense |",
        "| --- | --- | --- |",
        f"| dense, fp32 | {dense:.4f} | |",
        *(f"| {kind} | {found:.4f} | {found / dense - 1:+.2%} |" for kind, found in kinds.items()),
        "",
        f"int4 of the last {options.steps} steps with `qat=int4`, against the same steps without it and rounded afterwards:",
        "",
        "| group | rounded afterwards | trained rounded | recovered |",
        "| --- | --- | --- | --- |",
    ]
    for group_size, losses in recovered.items():
        plain, trained = losses.values()
        # Of next to nothing any share can be recovered.
        share = f"{(plain - trained) / (plain - dense):.0%}" if plain > 1.01 * dense else "(lost less than 1 %)"
        lines.append(
            f"| {group_size} | {plain:.4f} ({plain / dense - 1:+.2%}) | {trained:.4f} ({trained / dense - 1:+.2%}) | {share} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    target = Path(__file__).parent / "results" / f"{datetime.date.today()}-{options.name}.md"
    target.write_text(text, encoding="utf-8")
    found = {"dense": dense, "kinds": kinds, "int4": recovered}
    target.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
