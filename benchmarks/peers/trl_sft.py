"""TRL's SFTTrainer on the benchmark's rows; runs in an environment of its own and writes what it measured as JSON."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.step_ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step is done."""
        self.step_ends.append(time.time())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """A step's loss is known."""
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def lora(options: argparse.Namespace) -> Any:
    """PEFT's config of the adapter, or nothing."""
    if not options.lora_rank:
        return None
    from peft import LoraConfig

    targets = options.lora_targets[0] if len(options.lora_targets) == 1 else options.lora_targets
    return LoraConfig(
        r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules=targets, task_type="CAUSAL_LM"
    )


def main() -> None:
    """Train some steps and write step ends, real tokens of each batch, and losses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--by-length", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--chunked", action="store_true", help="TRL's loss in chunks of tokens")
    parser.add_argument("--bf16-weights", action="store_true", help="the frozen base in bfloat16")
    parser.add_argument("--lora-rank", type=int, default=0, help="0 trains all weights")
    parser.add_argument("--lora-targets", nargs="+", default=["all-linear"])
    options = parser.parse_args()
    config = SFTConfig(
        output_dir=str(options.out.parent / "trl-output"),
        use_cpu=True,
        bf16=options.bf16,
        model_init_kwargs={"dtype": "bfloat16" if options.bf16_weights else "float32"},
        **({"loss_type": "chunked_nll"} if options.chunked else {}),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        max_steps=options.steps,
        max_length=options.max_length,
        packing=options.packing,
        train_sampling_strategy="group_by_length" if options.by_length else "random",
        gradient_checkpointing=options.gradient_checkpointing,
        optim="adamw_torch_fused",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    clock = Clock()
    trainer = SFTTrainer(
        model=options.model,
        args=config,
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        callbacks=[clock],
        peft_config=lora(options),
    )
    tokens: list[int] = []
    trained: list[int] = []
    collate = trainer.data_collator

    def counting(features: Any) -> Any:
        batch = collate(features)
        mask = batch.get("attention_mask")
        tokens.append(int(mask.sum()) if mask is not None else int(batch["input_ids"].numel()))
        trained.append(int((batch["labels"][:, 1:] != -100).sum()))
        return batch

    trainer.data_collator = counting
    trainer.train()
    per_step = options.accumulation
    tokens, trained = (
        [sum(counts[i : i + per_step]) for i in range(0, len(counts), per_step)] for counts in (tokens, trained)
    )
    measured = {"step_ends": clock.step_ends, "tokens": tokens, "trained": trained, "losses": clock.losses}
    options.out.write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main()
