"""What can be known to be wrong with a run before it starts: params against headers and folders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from torchtune.checkpoint.open import Checkpoint, open_tokenizer_files
from torchtune.data.files.find import check_paths
from torchtune.errors import ConfigError, Problem, TuneError
from torchtune.models.build import build_model
from torchtune.modules.decoder import CausalLM
from torchtune.recipes.base_checkpoint import open_base_checkpoint
from torchtune.recipes.finetune_data import build_transform
from torchtune.recipes.params import FinetuneParams
from torchtune.recipes.run_folder import RunFolder
from torchtune.training.device import get_device


class _Problems(list[Problem]):
    """What was found wrong; `attempt` adds to it, and goes on."""

    def attempt(self, key: str, look: Callable[[], Any]) -> None:
        """Call `look`; what it raises is a problem of `key`."""
        try:
            look()
        except ConfigError as error:
            self.extend(error.problems)
        except (TuneError, OSError) as error:
            self.append(Problem("", key, str(error)))

    def raise_all(self) -> None:
        """Raise everything at once, if there is anything."""
        if self:
            raise ConfigError(self)


def check_finetune(
    params: FinetuneParams, recipe: str, *, adapt: Callable[[Checkpoint, CausalLM], object] | None = None
) -> None:
    """Compare params with the checkpoint's headers, the data's paths, the device and the output folder.

    No weight is read and nothing is written.

    Args:
        adapt: what the recipe does with the model on the meta device; what it raises is a problem too.
    Raises:
        ConfigError: all problems at once.
    """
    problems = _Problems()
    problems.attempt("device", lambda: get_device(params.device))
    problems.attempt("output_dir", lambda: RunFolder(params, recipe))
    _look_at_data(params, problems)
    num_before = len(problems)
    if params.tokenizer is not None:
        problems.attempt("tokenizer", partial(open_tokenizer_files, params.tokenizer))
    if len(problems) == num_before:  # else one mistake would be told twice
        problems.attempt("model_checkpoint", lambda: _check_checkpoint(params, adapt))
    problems.raise_all()


def check_data(params: FinetuneParams) -> None:
    """The part of `check_finetune` that is about data: its paths and transforms.

    Raises:
        ConfigError: all problems at once.
    """
    problems = _Problems()
    _look_at_data(params, problems)
    problems.raise_all()


def _look_at_data(params: FinetuneParams, problems: _Problems) -> None:
    for key in ("dataset", "eval_dataset"):
        options = getattr(params, key)
        for source in options.sources if options is not None else ():
            problems.attempt(f"{key}.path", partial(check_paths, source.paths, source.how))
            problems.attempt(f"{key}.transform", partial(build_transform, source.transform))


def _check_checkpoint(params: FinetuneParams, adapt: Callable[[Checkpoint, CausalLM], object] | None) -> None:
    checkpoint = open_base_checkpoint(params.model_checkpoint, params)
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    checkpoint.check(model, checkpoint.tokenizer())
    context = model.model.max_positions
    if params.max_seq_len and context and params.max_seq_len > context:
        raise ConfigError(
            f"{params.max_seq_len} is more than this checkpoint's {context}; set max_seq_len={context}",
            key="max_seq_len",
        )
    if adapt is not None:
        adapt(checkpoint, model)
