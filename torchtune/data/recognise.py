"""What a row is: told from the columns of the first row, the most structured first.

The rule, the same for every file: `messages`, else `conversations`, else `chosen` with `rejected`, else `prompt`
with `completion`, else `instruction` with `output`, else `text`; then other names of the same columns (ALIASES).
`dataset.format` and `dataset.columns` override it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchtune.data.options import FORMATS
from torchtune.errors import DataError, did_you_mean

# By format: the columns that a row must have, and those that it may have. The order is the rule's.
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("tools",)),
    "sharegpt": (("conversations",), ("system", "tools")),
    "preference": (("chosen", "rejected"), ("prompt", "system", "tools")),
    "prompt_completion": (("prompt", "completion"), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "text": (("text",), ()),
}
assert tuple(COLUMNS) == FORMATS
# What files call a prompt, and its answer.
PROMPTS = ("prompt", "question", "query", "problem", "input", "instruction")
COMPLETIONS = ("completion", "response", "answer", "output", "solution")
# Names by which files call the same columns, tried in this order where no format's own names fit.
ALIASES: tuple[tuple[str, dict[str, str]], ...] = (
    ("messages", {"messages": "conversation"}),
    ("messages", {"messages": "dialog"}),
    ("alpaca", {"output": "response", "input": "context"}),  # Dolly
    *(
        ("prompt_completion", {"prompt": prompt, "completion": completion})
        for prompt in PROMPTS
        for completion in COMPLETIONS
    ),
)


@dataclass(frozen=True)
class Schema:
    """How every row of a data set is read.

    Attributes:
        format: one of FORMATS.
        columns: our name of a column to the file's name.
        ignored: columns of the first row that are not read.
    """

    format: str
    columns: Mapping[str, str]
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = ", ".join(name if name == column else f"{name} = {column}" for name, column in self.columns.items())
        ignored = f"; ignored columns: {', '.join(self.ignored)}" if self.ignored else ""
        half = "; chosen is trained, rejected is not" if self.format == "preference" else ""
        return f"rows are {self.format} ({names}){half}{ignored}"

    def get(self, record: Mapping[str, Any], name: str) -> Any:
        """The value of our column `name`, None if the row has none."""
        return record.get(self.columns.get(name, name))


def recognise(record: Any, *, format: str | None = None, columns: Mapping[str, str] | None = None) -> Schema | None:
    """How rows like `record` are read; None if `record` is empty and says nothing.

    Args:
        record: a file's first row.
        format: what rows are, if it is not to be told from the row.
        columns: our name of a column to the name that the file has for it.
    Raises:
        DataError: no format fits, or a column that was named is not there; names the columns that are.
    """
    if record is None or record == {}:
        return None
    if not isinstance(record, dict):
        raise DataError(f"a row must be a JSON object, not {_kind(record)}")
    columns = dict(columns or {})
    present = ", ".join(map(str, record))
    for name, column in columns.items():
        _refuse_unknown(name, format)
        if column not in record:
            raise DataError(f"there is no column '{column}' for {name}; the row has: {present}")
    # A column that is null in every row, as tables that were merged have them, says nothing; so first without.
    filled = {column: value for column, value in record.items() if value is not None}
    if not columns and (alias := _alias(filled, format) or _alias(record, format)):
        format, columns = alias
    names = {name: columns.get(name, name) for fields in COLUMNS.values() for name in (*fields[0], *fields[1])}
    format = format or _format_of(filled, names, columns) or _format_of(record, names, columns)
    if format is None:
        expected = "; ".join(" and ".join(needed) for needed, _ in COLUMNS.values())
        raise DataError(
            f"no known kind of row: it has the columns {present}; expected are {expected}. "
            "Other names are given by dataset.columns, e.g. columns={prompt: question, completion: answer}"
        )
    needed, optional = COLUMNS[format]
    for name in needed:
        if names[name] not in record:
            raise DataError(f"a {format} row needs the column '{names[name]}'; the row has: {present}")
    used = {name: names[name] for name in (*needed, *optional) if name in needed or names[name] in record}
    return Schema(format, used, tuple(str(column) for column in record if column not in used.values()))


def check_record(record: Any, schema: Schema) -> None:
    """Raises DataError, without source, for a row that the schema can't read."""
    if record is None or record == {}:
        raise DataError("the row is empty")
    if not isinstance(record, dict):
        raise DataError(f"a row must be a JSON object, not {_kind(record)}")
    needed, _ = COLUMNS[schema.format]
    missing = [schema.columns[name] for name in needed if schema.columns[name] not in record]
    if missing:
        raise DataError(
            f"the row has no {' and no '.join(missing)}, but {', '.join(map(str, record))}; "
            f"rows of this data set are {schema.format}"
        )


def _format_of(record: Mapping[str, Any], names: Mapping[str, str], given: Mapping[str, str]) -> str | None:
    """The first format whose columns the row has; where a column was named, only formats that need it."""
    named = {name for needed, _ in COLUMNS.values() for name in needed if name in given}
    for format, (needed, _) in COLUMNS.items():
        if named <= set(needed) and all(names[name] in record for name in needed):
            return format
    return None


def _alias(record: Mapping[str, Any], format: str | None) -> tuple[str, dict[str, str]] | None:
    """The format and columns by other names; None where a format's own names fit, or none do."""
    own = {name: name for fields in COLUMNS.values() for name in (*fields[0], *fields[1])}
    fits = _format_of(record, own, {}) if format is None else all(name in record for name in COLUMNS[format][0])
    if fits:
        return None
    for other, columns in ALIASES:
        needed = [columns.get(name, name) for name in COLUMNS[other][0]]
        if format in (None, other) and all(name in record for name in needed):
            return other, columns
    return None


def _refuse_unknown(name: str, format: str | None) -> None:
    formats = [format] if format else list(COLUMNS)
    known = {column for each in formats for columns in COLUMNS[each] for column in columns}
    if name not in known:
        of = f" of a {format} row" if format else ""
        raise DataError(f"dataset.columns: '{name}' is no column{of} that is read{did_you_mean(name, known)}")


def _kind(value: Any) -> str:
    names = {list: "an array", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
