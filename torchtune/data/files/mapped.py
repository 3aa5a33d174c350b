"""A file's bytes, mapped into memory by each process that reads them."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path
from typing import Any


class MappedBytes:
    """The bytes of a file that is not empty; read by threads, and sent to processes as a path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._mapped: mmap.mmap | None = None

    @property
    def data(self) -> mmap.mmap:
        """The bytes; mapped when first asked for."""
        if self._mapped is None:
            with self._lock:
                if self._mapped is None:
                    with open(self.path, "rb") as file:
                        self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]
