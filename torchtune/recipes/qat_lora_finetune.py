"""LoRA with quantisation-aware training: lora_finetune with `qat`, under the name that users of the first library type.

    tune run qat_lora_finetune model_checkpoint=SmolLM2-135M-Instruct dataset=chats.jsonl qat=int4

Trains an adapter while the model computes with the merged weights rounded, by lora_finetune's own loop. Each checkpoint
is the adapter, and below it, in `quantized/`, the merged model as recipe `quantize` writes it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from torchtune.config.parse import parse_params
from torchtune.config.strict import STRICT
from torchtune.distributed.process_group import process_group
from torchtune.recipes.lora_finetune import LoRAFinetuneParams, LoRAFinetuneRecipe, check


@dataclass(config=STRICT, kw_only=True)
class QATLoRAFinetuneParams(LoRAFinetuneParams):
    """lora_finetune's keys, with rounding on."""

    qat: Literal["none", "int4", "int8"] = Field(
        default="int4", description="Train with weights rounded as recipe quantize rounds them, and write both."
    )


def main() -> None:
    """The recipe as a program: `tune run qat_lora_finetune key=value ...`."""
    params = parse_params(QATLoRAFinetuneParams)
    with process_group(params.device):
        check(params)
        recipe = LoRAFinetuneRecipe(params=params)
        recipe.setup(params=params)
        recipe.train()
        recipe.cleanup()


if __name__ == "__main__":
    main()
