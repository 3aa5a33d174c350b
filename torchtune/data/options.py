"""The keys under `dataset:`: where rows come from, how they are read, and what of them is trained."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

Format = Literal["messages", "sharegpt", "prompt_completion", "alpaca", "text"]
TrainOn = Literal["assistant", "last_assistant", "all"]
TooLong = Literal["drop", "truncate", "split", "error"]
OnBadRow = Literal["error", "skip"]
SpecialTokensInContent = Literal["error", "split", "allow"]
System = Literal["keep", "fold"]

FORMATS: tuple[str, ...] = get_args(Format)


@dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False), kw_only=True)
class DatasetOptions:
    """One data set. `dataset: PATH` is short for `dataset: {path: PATH}`."""

    shorthand: ClassVar[str] = "path"

    path: str | list[str] = Field(description="JSON lines file, or a list of them.")
    format: Format | None = Field(
        default=None, description="What a row is; by default told from the first row's columns."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Other column names, e.g. {prompt: question, completion: answer}."
    )
    roles: dict[str, str] = Field(default_factory=dict, description="Other role names, e.g. {pupil: user}.")
    limit: int | None = Field(default=None, ge=1, description="Read only the first rows.")
    on_bad_row: OnBadRow = Field(
        default="error", description="What a row that can't be trained on does; skip counts it."
    )
    train_on: TrainOn = Field(default="assistant", description="Whose words are trained.")
    too_long: TooLong | None = Field(
        default=None,
        description="What is done with samples over max_seq_len; by default chats are dropped, texts split.",
    )
    special_tokens_in_content: SpecialTokensInContent = Field(
        default="error",
        description="A special token's text in a message: refuse it, encode it as plain text, or as the token.",
    )
    chat_template: str | None = Field(
        default=None, description="A .jinja file, the name of one of the checkpoint's templates, or a template's text."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the template, e.g. {enable_thinking: false}."
    )
    system: System = Field(
        default="keep", description="fold: put a system message before the first user message's words."
    )
    merge_turns: bool = Field(
        default=False, description="Join messages of the same role in a row, with an empty line between."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | list) else value
