"""What can be known to be wrong with a run before it starts: params against headers and folders."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torchtune.checkpoint.open import Checkpoint, open_tokenizer_files
from torchtune.config.component import instantiate
from torchtune.data.files.find import check_paths
from torchtune.distributed.process_group import world_size
from torchtune.errors import ConfigError, Problems
from torchtune.models.build import build_model
from torchtune.modules.decoder import CausalLM
from torchtune.parallel.expert_parallel import check_expert_parallel
from torchtune.parallel.tensor_sizes import check_tensor_parallel
from torchtune.recipes.base_checkpoint import open_base_checkpoint
from torchtune.recipes.finetune_data import build_transform
from torchtune.recipes.params import FinetuneParams
from torchtune.recipes.run_folder import RunFolder
from torchtune.recipes.tasks import open_tasks
from torchtune.training.activation_checkpointing import check_activation_checkpointing
from torchtune.training.device import get_device
from torchtune.training.optimizer_in_backward import check_optimizer_in_backward
from torchtune.training.precision import get_dtype


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
    problems = Problems()
    with problems.caught("device"):
        device = get_device(params.device)
        check_activation_checkpointing(
            enabled=params.enable_activation_checkpointing,
            mode=params.ac_mode,
            option=params.ac_option,
            offload=params.enable_activation_offloading,
            compiled=params.compile,
            device=device,
        )
    with problems.caught():
        sizes = params.mesh_sizes.fitted(world_size())
        if params.optimizer_in_bwd:
            check_optimizer_in_backward(
                accumulation=params.gradient_accumulation_steps or 1,
                clip_grad_norm=params.clip_grad_norm,
                dtype=get_dtype("fp32" if params.dtype == "auto" else params.dtype),  # which auto is as good as
                sizes=sizes,
                cpu_offload=params.fsdp_cpu_offload,
            )
    with problems.caught("output_dir"):
        RunFolder(params, recipe)
    if params.evaluation is not None:
        with problems.caught("evaluation"):
            open_tasks(params.evaluation, "evaluation.")
    _look_at_data(params, problems)
    num_before = len(problems)
    if params.tokenizer is not None:
        with problems.caught("tokenizer"):
            open_tokenizer_files(params.tokenizer)
    if len(problems) == num_before:  # else one mistake would be told twice
        with problems.caught("model_checkpoint"):
            _check_checkpoint(params, adapt)
    problems.raise_all()


def check_data(params: FinetuneParams) -> None:
    """The part of `check_finetune` that is about data: its paths and transforms.

    Raises:
        ConfigError: all problems at once.
    """
    problems = Problems()
    _look_at_data(params, problems)
    problems.raise_all()


def _look_at_data(params: FinetuneParams, problems: Problems) -> None:
    for key in ("dataset", "eval_dataset"):
        options = getattr(params, key)
        for source in options.sources if options is not None else ():
            with problems.caught(f"{key}.path"):
                check_paths(source.paths, source.how)
            with problems.caught(f"{key}.transform"):
                build_transform(source.transform)


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
    problems = Problems()
    with problems.caught("tensor_parallel"):
        check_tensor_parallel(model, params.tensor_parallel, loss=instantiate(params.loss))
    with problems.caught("expert_parallel"):
        check_expert_parallel(model, params.expert_parallel)
    problems.raise_all()
    if adapt is not None:
        adapt(checkpoint, model)
