"""The keys under `dataset:`: where rows come from, how they are read, and what of them is trained."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from torchtune.data.files.find import How

Format = Literal["messages", "sharegpt", "preference", "prompt_completion", "alpaca", "text"]
TrainOn = Literal["assistant", "last_assistant", "all"]
TooLong = Literal["drop", "truncate", "split", "error"]
OnBadRow = Literal["error", "skip"]
SpecialTokensInContent = Literal["error", "split", "allow"]
System = Literal["keep", "fold"]
OnPromptMismatch = Literal["error", "as_written"]
SampleBy = Literal["document", "paragraph", "line"]
Verify = Literal["first", "all"]

FORMATS: tuple[str, ...] = get_args(Format)


# As config/strict.py, which is above this package.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(config=STRICT, kw_only=True)
class DataSource:
    """Where rows come from, how they are read, and what of them is trained. A path alone is short for it."""

    shorthand: ClassVar[str] = "path"

    path: str | list[str] = Field(
        description="File, folder, pattern (data/*.jsonl), - for standard input, or hub id; or a list of them."
    )
    split: str | None = Field(
        default=None, description="Which split of a hub id, a saved data set, or a folder; by default train."
    )
    subset: str | None = Field(default=None, description="Which configuration of a hub id.")
    format: Format | None = Field(
        default=None, description="What a row is; by default told from the first row's columns."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Other column names, e.g. {prompt: question, completion: answer}."
    )
    roles: dict[str, str] = Field(default_factory=dict, description="Other role names, e.g. {pupil: user}.")
    transform: dict[str, Any] | None = Field(
        default=None,
        description="A component that is called with each record and returns what is read instead; None drops the row.",
    )
    sample_by: SampleBy = Field(
        default="document", description="What of a plain text file is a sample: all of it, a paragraph, a line."
    )
    limit: int | None = Field(default=None, ge=1, description="Read only the first rows.")
    on_bad_row: OnBadRow = Field(
        default="error", description="What a row that can't be trained on does; skip counts it."
    )
    verify: Verify = Field(
        default="first",
        description="Before step 1, of a file over 64 MB: render the first 1,000 rows and read 20,000, or render all.",
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
    on_prompt_mismatch: OnPromptMismatch = Field(
        default="error",
        description="Turns that the template opens otherwise at inference: refuse them, or train them as written.",
    )
    system: System = Field(
        default="keep", description="fold: put a system message before the first user message's words."
    )
    merge_turns: bool = Field(
        default=False, description="Join messages of the same role in a row, with an empty line between."
    )

    @field_validator("transform", mode="before")
    @classmethod
    def _from_dotted_path(cls, value: Any) -> Any:
        return {"_component_": value} if isinstance(value, str) else value

    @property
    def paths(self) -> list[str]:
        """All paths."""
        return [self.path] if isinstance(self.path, str) else list(self.path)

    @property
    def how(self) -> How:
        """What besides the paths says which rows are read."""
        return How(split=self.split, subset=self.subset, sample_by=self.sample_by)


@dataclass(config=STRICT, kw_only=True)
class MixPart(DataSource):
    """One data set of a mix, with what it gives in an epoch."""

    weight: float | None = Field(default=None, gt=0, description="Its share of the mix's tokens, against the others'.")
    tokens: int | None = Field(default=None, ge=1, description="About so many tokens of it an epoch.")

    @model_validator(mode="after")
    def _holds(self) -> MixPart:
        if self.weight is not None and self.tokens is not None:
            raise ValueError("weight and tokens are both given; give one of them")
        return self


@dataclass(config=STRICT, kw_only=True)
class DatasetOptions(DataSource):
    """The data: one source, or a mix of several. `dataset: PATH` is short for `dataset: {path: PATH}`."""

    list_shorthand: ClassVar[str] = "mix"

    path: str | list[str] = Field(
        default_factory=list,
        description="File, folder, pattern (data/*.jsonl), - for standard input, or hub id; or a list of them.",
    )
    mix: list[MixPart] = Field(
        default_factory=list, description="Several data sets, each with its own keys and a weight or tokens."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(item, dict | MixPart) for item in value):
            return {"mix": value}
        return {"path": value} if isinstance(value, str | list) else value

    @model_validator(mode="after")
    def _one_or_several(self) -> DatasetOptions:
        if self.mix:
            given = [name for name in _not_default(self) if name != "mix"]
            if given:
                raise ValueError(
                    f"{', '.join(given)}: a mix has these in its parts: mix=[{{path: ..., {given[0]}: ...}}]"
                )
        elif not self.path:
            raise ValueError("a path is needed, or a mix of several data sets")
        return self

    @property
    def sources(self) -> list[DataSource]:
        """The parts of the mix, or this one source."""
        return list(self.mix) or [self]


def _not_default(options: DatasetOptions) -> dict[str, Any]:
    known = DatasetOptions.__pydantic_fields__  # type: ignore[attr-defined]
    default = {name: field.get_default(call_default_factory=True, validated_data={}) for name, field in known.items()}
    return {name: getattr(options, name) for name, value in default.items() if getattr(options, name) != value}
