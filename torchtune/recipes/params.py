"""What the params of every fine-tuning recipe share. The defaults and their reasons: docs/defaults.md.

A params object holds or raises: it looks at its own values alone. `check` in torchtune/recipes/checks.py
compares them with what lies on disk.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from torchtune.config.component import Component
from torchtune.config.strict import STRICT
from torchtune.data.options import DatasetOptions
from torchtune.distributed.mesh import MeshSizes
from torchtune.evaluation.scoring import BATCH_TOKENS

Dtype = Literal["auto", "fp32", "bf16", "fp16", "fp64"]
Count = Annotated[int, Field(ge=1)]


@dataclass(config=STRICT, kw_only=True)
class LRSchedulerParams:
    """The learning rate over the run: torchtune/training/lr_schedulers.py states the formula."""

    shorthand: ClassVar[str] = "name"

    name: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Shape of the decay after the warm-up."
    )
    num_warmup_steps: int | None = Field(
        default=None, ge=0, description="Steps of linear warm-up; by default 3 % of the steps, at most 100."
    )
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="The last step's rate, as a share of the peak.")


@dataclass(config=STRICT, kw_only=True)
class ProfilerParams:
    """The torch profiler on chosen steps."""

    enabled: bool = Field(default=False, description="Profile the steps after wait_steps + warmup_steps.")
    output_dir: str | None = Field(default=None, description="Where traces go; by default OUT/profiling_outputs.")
    cpu: bool = Field(default=True, description="Record CPU operators.")
    cuda: bool = Field(default=True, description="Record CUDA kernels, where there is CUDA.")
    profile_memory: bool = Field(default=False, description="Record allocations.")
    with_stack: bool = Field(default=False, description="Record the Python stack of each operator.")
    record_shapes: bool = Field(default=True, description="Record the shapes of operators' inputs.")
    with_flops: bool = Field(default=False, description="Estimate the operations of matrix products.")
    wait_steps: int = Field(default=5, ge=0, description="Steps before the warm-up.")
    warmup_steps: int = Field(default=3, ge=0, description="Steps profiled and thrown away.")
    active_steps: int = Field(default=2, ge=1, description="Steps profiled and kept.")
    num_cycles: int = Field(default=1, ge=0, description="How often to repeat; 0 means until the end.")


@dataclass(config=STRICT, kw_only=True)
class EarlyStoppingParams:
    """Stop when the held-out loss no longer falls."""

    patience: Count = Field(default=3, description="Evaluations without a better held-out loss before the run stops.")
    min_delta: float = Field(default=0.0, ge=0, description="How much lower a loss must be to count as better.")


@dataclass(config=STRICT, kw_only=True)
class SamplesParams:
    """Prompts that are answered in the middle of training."""

    shorthand: ClassVar[str] = "prompts"

    prompts: str | list[str] = Field(
        description="A user's message, or several; without a template, texts to go on with."
    )
    every_n_steps: Count | None = Field(
        default=None, description="Steps between; by default each epoch's end, and the run's."
    )
    max_new_tokens: Count = Field(default=64, description="Tokens of an answer at most.")
    temperature: float = Field(default=0.0, ge=0, description="0: always the most likely token.")
    top_p: float = Field(
        default=1.0, ge=0, le=1, description="Only the most likely tokens that together have it; 1: all."
    )

    @property
    def texts(self) -> list[str]:
        """`prompts` as a list."""
        return [self.prompts] if isinstance(self.prompts, str) else self.prompts

    @model_validator(mode="before")
    @classmethod
    def _from_prompts(cls, value: Any) -> Any:
        return {"prompts": value} if isinstance(value, str) else value


@dataclass(config=STRICT, kw_only=True)
class TaskParams:
    """lm-eval's tasks, and how they are put."""

    tasks: str | list[str] = Field(default_factory=list, description="lm-eval's tasks or groups, by name.")
    include_path: str | None = Field(default=None, description="A folder of further tasks, as lm-eval's YAML files.")
    num_fewshot: int | None = Field(
        default=None, ge=0, description="Examples before each question; by default the task's."
    )
    limit: float | None = Field(default=None, gt=0, description="Questions of each task: a number, or below 1 a share.")
    apply_chat_template: bool | None = Field(default=False, description="Put tasks' questions through the template.")
    fewshot_as_multiturn: bool = Field(
        default=False, description="Examples are turns of the chat, with a chat template."
    )
    gen_kwargs: dict[str, Any] = Field(default_factory=dict, description="Of generated answers, over the task's own.")
    confirm_run_unsafe_code: bool = Field(default=False, description="Allow tasks that run what the model writes.")
    batch_tokens: Count = Field(default=BATCH_TOKENS, description="Tokens of a forward.")
    batch_size: Count = Field(default=8, description="Answers generated at a time.")

    @property
    def task_names(self) -> list[str]:
        """`tasks` as a list."""
        return self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks


@dataclass(config=STRICT, kw_only=True)
class EvaluationParams(TaskParams):
    """Tasks that the model is asked in the middle of training."""

    shorthand: ClassVar[str] = "tasks"

    tasks: str | list[str] = Field(description="lm-eval's tasks or groups, by name.")
    every_n_steps: Count | None = Field(
        default=None, description="Steps between; by default each epoch's end, and the run's."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_tasks(cls, value: Any) -> Any:
        return {"tasks": value} if isinstance(value, str) else value


@dataclass(config=STRICT, kw_only=True)
class ParamGroupParams:
    """Another rate or decay for the parameters whose name matches."""

    pattern: str = Field(description="Regular expression, searched in the parameter's name.")
    lr: float | None = Field(default=None, ge=0, description="Their peak learning rate.")
    weight_decay: float | None = Field(default=None, ge=0, description="Their weight decay.")


@dataclass(config=STRICT, kw_only=True)
class FinetuneParams:
    """The keys of every fine-tune."""

    # What is trained, on what, to where.
    model_checkpoint: str = Field(description="Hugging Face-layout folder, GGUF file or hub id to start from.")
    tokenizer: str | None = Field(
        default=None, description="Folder or tokenizer.json to use in place of the checkpoint's."
    )
    new_tokens: list[str] = Field(
        default_factory=list, description="Texts that become one token each, their rows the mean of all others'."
    )
    pad_vocab_to_multiple_of: Count | None = Field(
        default=None, description="Add rows to embedding and head until their number is a multiple of this."
    )
    dataset: DatasetOptions = Field(description="The data: a path, or a mapping with path and how to read it.")
    eval_dataset: DatasetOptions | None = Field(default=None, description="Held-out data, like dataset.")
    eval_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="Share of dataset's rows to hold out, when there is no eval_dataset."
    )
    output_dir: str | None = Field(
        default=None,
        description="Where all goes; by default runs/MODEL-RECIPE-TIME. A run that is there is not overwritten.",
    )
    seed: int | None = Field(default=42, ge=0, description="Seed of order, dropout and splits; null draws one.")

    # How long.
    epochs: Count | None = Field(
        default=None,
        description="Passes over the data; with neither epochs nor max_steps: 3. With max_steps: until that.",
    )
    max_steps: Count | None = Field(default=None, description="Optimizer steps after which the run ends.")
    max_steps_per_epoch: Count | None = Field(default=None, description="Optimizer steps after which an epoch ends.")

    # The batch.
    batch_size: Count | None = Field(
        default=None,
        description="Rows per data-parallel rank and micro-batch: packs (default 1), or samples (default 8).",
    )
    gradient_accumulation_steps: Count | None = Field(
        default=None, description="Micro-batches per optimizer step; by default as many as fill a step with tokens."
    )
    max_seq_len: Count | None = Field(
        default=None,
        description="Tokens of a row at most; by default chosen from the data, within the model's context.",
    )
    packed: bool = Field(default=True, description="Fill rows with several samples, which do not see each other.")
    shuffle: bool = Field(default=True, description="Another order of the rows in each epoch.")
    num_workers: int = Field(default=0, ge=0, description="Processes that tokenise ahead; 0 means a thread.")

    # The step.
    optimizer: Component = Field(
        default_factory=lambda: {"_component_": "torch.optim.AdamW"},
        description="Any optimizer as a component. Without lr, AdamW's rate is chosen by the model's size.",
    )
    param_groups: list[ParamGroupParams] = Field(
        default_factory=list, description="Other rates or decays by name pattern: [{pattern, lr, weight_decay}]."
    )
    freeze: list[str] = Field(default_factory=list, description="Name patterns of parameters not to train.")
    lr_scheduler: LRSchedulerParams = Field(default_factory=LRSchedulerParams, description="Warm-up and decay.")
    clip_grad_norm: float | None = Field(
        default=1.0, gt=0, allow_inf_nan=True, description="Largest gradient norm; null: off, inf: only measure."
    )
    optimizer_in_bwd: bool = Field(
        default=False, description="Step each parameter as its gradient comes: no two gradients are in memory together."
    )
    loss: Component = Field(
        default_factory=lambda: {"_component_": "torchtune.modules.losses.LinearCrossEntropy"},
        description="The loss: called with hidden states, head weight and targets, it gives the sum over tokens.",
    )

    # Where and in which numbers.
    device: str = Field(default="auto", description="cpu, cuda, cuda:N, mps; auto: CUDA if there is any.")
    dtype: Dtype = Field(default="auto", description="What is computed in; auto: bf16 where the device is fast at it.")
    param_dtype: Literal["fp32", "bf16", "fp64"] = Field(
        default="fp32", description="What is trained and stepped; bf16 rounds stochastically."
    )
    enable_activation_checkpointing: bool = Field(
        default=False,
        description="Keep only each layer's input, compute the rest again: less memory, a third more work.",
    )
    ac_mode: Literal["full", "selective"] = Field(
        default="full", description="Which layers that is, or for selective, what ac_option says."
    )
    ac_option: Count | Literal["op"] = Field(
        default="op", description="selective: every how many layers; or op: each, but what costs much is kept."
    )
    enable_activation_offloading: bool = Field(
        default=False, description="Keep those inputs in host memory, copied beside the work; CUDA alone."
    )
    compile: bool = Field(default=False, description="torch.compile each layer: pays off in long runs.")

    # How it is spread over the ranks that a launcher starts.
    data_parallel_replicate: Count = Field(
        default=1, description="Copies of the model, each for other rows; their gradients are summed."
    )
    data_parallel_shard: int = Field(
        default=-1, description="Ranks that share a copy, each for other rows (FSDP); -1: all that are left."
    )
    tensor_parallel: Count = Field(default=1, description="Ranks that share each layer's matrices and activations.")
    context_parallel: Count = Field(default=1, description="Ranks that share the tokens of each row: for long ones.")
    expert_parallel: Count = Field(
        default=1, description="Ranks of data_parallel_shard x context_parallel that share a layer's experts."
    )
    fsdp_reshard_after_forward: bool = Field(
        default=True, description="Let go of a layer after its forward; false: more memory, a third less to send."
    )
    fsdp_cpu_offload: bool = Field(
        default=False, description="Shards and the optimizer's step in host memory; layers visit the device."
    )
    fsdp_reduce_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="What gradients are summed in; bf16 halves what is sent."
    )
    fsdp_sum_once: bool = Field(
        default=False,
        description="Sum gradients once a step, not every micro-batch: less to send, whole ones in memory.",
    )
    fsdp_prefetch: int = Field(default=0, ge=0, description="Layers gathered ahead, besides the next; CUDA alone.")

    # What is seen and kept.
    log_every_n_steps: Count = Field(default=1, description="Steps between lines of metrics.")
    metric_logger: Any = Field(
        default=None,
        description="stdout, disk, tensorboard, wandb, mlflow, comet, a component, or a list; besides metrics.jsonl.",
    )
    eval_every_n_steps: Count | None = Field(
        default=None, description="Steps between evaluations; by default each epoch's end, and the run's."
    )
    samples: SamplesParams | None = Field(
        default=None, description="Prompts to answer now and then, kept in OUT/samples.jsonl."
    )
    evaluation: EvaluationParams | None = Field(
        default=None, description="lm-eval's tasks to measure now and then, logged as TASK/METRIC."
    )
    early_stopping: EarlyStoppingParams | None = Field(
        default=None, description="Stop when the held-out loss stops falling."
    )
    save_every_n_steps: Count | None = Field(default=None, description="Steps between checkpoints.")
    save_every_minutes: float | None = Field(default=30.0, gt=0, description="Minutes between checkpoints; null: off.")
    save_every_epoch: bool = Field(default=False, description="A checkpoint at each epoch's end.")
    save_last: bool = Field(default=True, description="A checkpoint at the end.")
    enable_async_checkpointing: bool = Field(
        default=False, description="Copy to host memory and write from there while training goes on."
    )
    keep_last: Count | None = Field(default=2, description="Checkpoints kept, the best besides; null: all.")
    resume_from_checkpoint: bool | str = Field(
        default=False,
        description="true: go on from the newest in output_dir; auto: if there is one; or a checkpoint's path.",
    )
    profiler: ProfilerParams = Field(default_factory=ProfilerParams, description="The torch profiler.")

    @property
    def mesh_sizes(self) -> MeshSizes:
        """How many ranks each axis has."""
        return MeshSizes(
            self.data_parallel_replicate,
            self.data_parallel_shard,
            self.context_parallel,
            self.tensor_parallel,
            self.expert_parallel,
        )

    @model_validator(mode="after")
    def _holds(self) -> FinetuneParams:
        """Pairs of values that can't both be meant."""
        problems = []
        if self.eval_dataset is not None and self.eval_fraction:
            problems.append("eval_fraction: eval_dataset is given too; give one of them")
        evaluates = self.eval_dataset is not None or self.eval_fraction > 0
        if not evaluates and self.eval_every_n_steps is not None:
            problems.append("eval_every_n_steps: there is nothing held out; give eval_dataset or eval_fraction")
        if not evaluates and self.early_stopping is not None:
            problems.append("early_stopping: there is nothing held out; give eval_dataset or eval_fraction")
        if self.samples is not None and self.tensor_parallel > 1:
            problems.append("samples: are not made under tensor_parallel, whose ranks share the tokens; leave them out")
        if self.evaluation is not None and self.tensor_parallel > 1:
            problems.append("evaluation: is not made under tensor_parallel, whose ranks share the tokens; leave it out")
        if self.clip_grad_norm is not None and math.isnan(self.clip_grad_norm):
            problems.append("clip_grad_norm: nan is no norm; use a positive number, null or inf")
        if self.param_dtype == "bf16" and self.dtype == "fp16":
            problems.append("param_dtype: bf16 parameters can't be computed in fp16; use dtype=bf16")
        if self.resume_from_checkpoint is True and self.output_dir is None:
            problems.append("resume_from_checkpoint: true looks in output_dir, which is not given")
        if self.data_parallel_shard < 1 and self.data_parallel_shard != -1:
            problems.append(
                f"data_parallel_shard: {self.data_parallel_shard} is no number of ranks; -1 is all left over"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self
