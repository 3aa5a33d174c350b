"""What asking a model in the middle of its training takes, so that training goes on as it would have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from torchtune.checkpoint.open import Checkpoint
from torchtune.data.prompts import Prompter
from torchtune.data.template import choose_template
from torchtune.modules.decoder import CausalLM
from torchtune.parallel.fsdp import reshard
from torchtune.recipes.params import FinetuneParams
from torchtune.recipes.run_state import RunState
from torchtune.tokenizers.tokenizer import Tokenizer


@contextmanager
def asking(model: CausalLM, *, is_compiled: bool) -> Iterator[None]:
    """Forwards in this block are of any length, and leave nothing gathered."""
    # A layer that was compiled for training would be compiled anew for each length.
    with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
        yield
    reshard(model)


def prompter_of(params: FinetuneParams, checkpoint: Checkpoint, tokenizer: Tokenizer, state: RunState) -> Prompter:
    """What encodes prompts as the run's data is rendered."""
    templates = choose_template(params.dataset.chat_template, checkpoint.chat_template)
    return Prompter(tokenizer, templates, variables=params.dataset.chat_template_kwargs, now=state.started)
