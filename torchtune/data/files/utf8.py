"""UTF-8 as every text file is read: a byte order mark skipped, anything else refused by line."""

from __future__ import annotations

import mmap

from torchtune.errors import DataError

BOM = b"\xef\xbb\xbf"
OTHER_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def begin_of_text(data: mmap.mmap, path: str) -> int:
    """Where the text begins: behind the byte order mark, if there is one.

    Raises:
        DataError: the mark is that of UTF-16.
    """
    if encoding := OTHER_BOMS.get(data[:2]):
        raise DataError(f"{encoding} text; save the file as UTF-8", source=path)
    return len(BOM) if data[: len(BOM)] == BOM else 0


def decode(raw: bytes, source: str) -> str:
    """The text of some bytes.

    Raises:
        DataError: they are not UTF-8; says which byte.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        raise DataError(f"not UTF-8 text: {found}; save the file as UTF-8", source=source) from error
