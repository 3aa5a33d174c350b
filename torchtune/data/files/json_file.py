"""JSON lines, JSON arrays, and objects that span lines, indexed once by the byte offsets of their values.

What a file is, is told from its first bytes, not its name: `.json` files hold lines and `.jsonl` files hold
arrays as often as not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchtune.data.files.json_values import index_values
from torchtune.data.files.lines import index_lines
from torchtune.data.files.mapped import MappedBytes
from torchtune.data.files.utf8 import begin_of_text, decode
from torchtune.errors import DataError

SHOWN_CHARS = 60


class JsonFile:
    """Rows of a JSON file.

    Args:
        path: as the user named it.
        file: where the bytes lie.
    Raises:
        DataError: it is not UTF-8 text, or holds nothing.
    """

    def __init__(self, path: str, file: Path) -> None:
        self.path = path
        self._mapped = MappedBytes(file)
        data = self._mapped.data
        self.num_bytes = len(data)
        begin = begin_of_text(data, path)
        values = index_values(data, begin, path)
        self._starts, self._ends, self._lines = index_lines(data, begin) if values is None else values
        if len(self._starts) == 0:
            raise DataError("the file has no rows: it holds only white space", source=path)

    def __len__(self) -> int:
        return len(self._starts)

    def source(self, place: int) -> str:
        """`file:line` of a value, with the physical line where it begins."""
        return f"{self.path}:{self._lines[place]}"

    def record(self, place: int) -> Any:
        """The parsed value at `place`."""
        return parse(self._mapped.data[int(self._starts[place]) : int(self._ends[place])], self.source(place))


def parse(raw: bytes, source: str) -> Any:
    """The JSON value in one line; DataError with the column and the line's beginning if there is none."""
    text = decode(raw, source)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        shown = text[:SHOWN_CHARS] + ("..." if len(text) > SHOWN_CHARS else "")
        message = error.msg.removesuffix(" starting at")
        if message == "Extra data":
            message = "something follows the JSON object, and one object a line is expected"
        problem = f"not valid JSON at column {error.pos + 1}: {message}; the line begins: {shown}"
        raise DataError(problem, source=source) from error
    except RecursionError as error:
        raise DataError("JSON that is nested too deeply", source=source) from error
