"""Where the values lie in a file that is not JSON lines: one array of rows, or objects that span lines."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator

import numpy as np

from torchtune.errors import DataError

WHITESPACE = " \t\r\n"
# Only such files are read whole to be indexed; JSON lines of any size never are.
LARGEST_BYTES = 1 << 30
_SPACE = re.compile(f"[{WHITESPACE}]*")
_DECODER = json.JSONDecoder()


def index_values(data: mmap.mmap, begin: int, path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Byte starts, byte ends and line numbers of the values; None if the file is to be read line by line.

    A file is an array, or holds objects over several lines, when its first line alone does not begin with a
    whole JSON value but the file does. Anything else, broken files included, is read line by line, so that
    the message about a fault names its line.
    """
    first, rest = _first_line(data, begin)
    is_array = first.startswith(b"[")
    if len(data) > LARGEST_BYTES or not (is_array or first.startswith(b"{")):
        return None
    if _begins_with_value(first) and not (is_array and not rest):
        return None
    try:
        text = data[begin:].decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[begin : begin + error.start].count(b"\n") + 1
        raise DataError("not UTF-8 text; save the file as UTF-8", source=f"{path}:{line}") from error
    try:
        spans = list(_array_spans(text) if is_array else _stream_spans(text))
    except (json.JSONDecodeError, RecursionError) as error:
        if not is_array:
            return None
        if isinstance(error, RecursionError):
            raise DataError("JSON that is nested too deeply", source=path) from error
        problem = f"not a JSON array of rows: {error.msg} at column {error.colno}"
        raise DataError(problem, source=f"{path}:{error.lineno}") from error
    return _in_bytes(text, spans, begin)


def _first_line(data: mmap.mmap, begin: int) -> tuple[bytes, bool]:
    """The first line that is not blank, and whether another one follows."""
    while begin < len(data):
        end = data.find(b"\n", begin)
        end = len(data) if end < 0 else end
        if line := data[begin:end].strip(WHITESPACE.encode()):
            return line, bool(data[end:].strip(WHITESPACE.encode())) if line.startswith(b"[") else True
        begin = end + 1
    return b"", False


def _begins_with_value(line: bytes) -> bool:
    try:
        _DECODER.raw_decode(line.decode("utf-8"))
    except ValueError:
        return False
    except RecursionError:
        return True
    return True


def _in_bytes(text: str, spans: list[tuple[int, int]], begin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Byte starts, byte ends and line numbers of character spans; `text` begins at byte `begin`."""
    starts, ends, lines = [], [], []
    place, byte, line = 0, begin, 1
    for start, end in spans:
        byte += len(text[place:start].encode())
        line += text.count("\n", place, start)
        starts.append(byte)
        lines.append(line)
        byte += len(text[start:end].encode())
        line += text.count("\n", start, end)
        ends.append(byte)
        place = end
    return np.array(starts, np.int64), np.array(ends, np.int64), np.array(lines, np.int64)


def _array_spans(text: str) -> Iterator[tuple[int, int]]:
    """Character spans of the elements of the one array that `text` is."""
    place = _skip(text, text.index("[") + 1)
    if text[place : place + 1] != "]":
        place -= 1
        while True:
            start = _skip(text, place + 1)
            _, end = _DECODER.raw_decode(text, start)
            yield start, end
            place = _skip(text, end)
            if text[place : place + 1] != ",":
                break
    if text[place : place + 1] != "]":
        raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
    if (after := _skip(text, place + 1)) != len(text):
        raise json.JSONDecodeError("Extra data", text, after)


def _stream_spans(text: str) -> Iterator[tuple[int, int]]:
    """Character spans of values that follow one another."""
    place = _skip(text, 0)
    while place < len(text):
        _, end = _DECODER.raw_decode(text, place)
        yield place, end
        place = _skip(text, end)


def _skip(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None
    return match.end()
