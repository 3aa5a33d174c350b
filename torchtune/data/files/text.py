"""Plain text files: a document a file, or a sample a paragraph or line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from torchtune.data.files.lines import index_lines, not_blank
from torchtune.data.files.mapped import MappedBytes
from torchtune.data.files.utf8 import begin_of_text, decode
from torchtune.errors import DataError

_BETWEEN_PARAGRAPHS = re.compile(rb"\r?\n[ \t]*(?:\r?\n[ \t]*)+")


class TextFile:
    """Rows `{"text": ...}` of a plain text file.

    Args:
        path: as the user named it.
        file: where the bytes lie.
        sample_by: `document`: the whole file; `paragraph`: what empty lines part; `line`.
    """

    def __init__(self, path: str, file: Path, sample_by: str) -> None:
        self.path = path
        self._mapped = MappedBytes(file)
        data = self._mapped.data
        self.num_bytes = len(data)
        begin = begin_of_text(data, path)
        if sample_by == "line":
            self._starts, self._ends, self._lines = index_lines(data, begin)
        else:
            breaks = list(_BETWEEN_PARAGRAPHS.finditer(data, begin)) if sample_by == "paragraph" else []
            starts = np.array([begin, *(match.end() for match in breaks)])
            ends = np.array([*(match.start() for match in breaks), len(data)])
            line_breaks = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) if breaks else np.empty(0)
            lines = np.searchsorted(line_breaks, starts) + 1
            kept = not_blank(data, starts, ends)
            self._starts, self._ends, self._lines = starts[kept], ends[kept], lines[kept]
        if len(self._starts) == 0:
            raise DataError("the file has no text: it holds only white space", source=path)

    def __len__(self) -> int:
        return len(self._starts)

    def source(self, place: int) -> str:
        """`file:line` where a sample begins."""
        return f"{self.path}:{self._lines[place]}"

    def record(self, place: int) -> dict[str, str]:
        """The sample at `place`; a line or paragraph without its line break."""
        raw = self._mapped.data[int(self._starts[place]) : int(self._ends[place])]
        text = decode(raw, self.source(place))
        if "\0" in text:
            raise DataError("holds a zero byte, so it is no text", source=self.source(place))
        return {"text": text.removesuffix("\r")}
