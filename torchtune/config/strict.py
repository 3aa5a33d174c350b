"""How strictly params are validated.

    @dataclass(config=STRICT, kw_only=True)  # pydantic's dataclass
    class MyParams: ...

Unknown keys are refused. Numbers may come as text ("2e-5") and whole floats are integers (3.0, 1e3), since
that is what YAML files hold; a fraction for an integer is refused. Infinite and NaN floats are refused
unless a field means them: `Field(..., allow_inf_nan=True)`.

A nested dataclass may be written as the value of one of its keys, which it names:

    class DatasetOptions:
        shorthand: ClassVar[str] = "path"  # `dataset: chats.jsonl` is `dataset: {path: chats.jsonl}`
        list_shorthand: ClassVar[str] = "mix"  # `dataset: [{path: a}, {path: b}]` is `dataset: {mix: [...]}`

That is what configs and command lines get. A class that should also take it when built in Python
(`FullFinetuneParams(dataset="chats.jsonl")`) has a validator besides:

        @model_validator(mode="before")
        @classmethod
        def _from_path(cls, value: Any) -> Any:
            return {"path": value} if isinstance(value, str) else value
"""

from __future__ import annotations

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
