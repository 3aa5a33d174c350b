"""What a recipe opened is closed when one of its stages fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def closing_on_error(close: Callable[[], None]) -> Iterator[None]:
    """Call `close` when the block raises, and let the error go on; a block that ends leaves all open."""
    try:
        yield
    except BaseException:
        close()
        raise
