"""Which of several ranks tells what went wrong: the first to fail. The others fail because it is gone.

watch(store)   when the group begins
note(error)    on the way out, before the group ends and the others notice
is_to_tell()   at the end of the process
linger()       after telling
"""

from __future__ import annotations

import os
import time

import torch.distributed as dist

from torchtune.errors import RankError

# How long a rank waits for the first to speak. Its agent ends it meanwhile, where a rank of the same machine has ended.
SECONDS_FOR_THE_FIRST = 3.0
SECONDS_TO_LOOK = 1.0

_store: dist.Store | None = None
_is_first = False


def watch(store: dist.Store) -> None:
    """Note failures in this store, which the ranks of one attempt share."""
    global _store, _is_first
    _store, _is_first = store, False


def note(error: Exception) -> None:
    """Note that this rank has failed, unless the error only says that another one is gone."""
    global _is_first
    if not follows_from_another(error):
        _is_first = _count(1) == 1


def follows_from_another(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised from, is that another rank is gone."""
    if error is None:
        return False
    # gloo has no class of its own for a connection that another rank has closed.
    is_gloo = type(error) is RuntimeError and "gloo" in str(error).lower()
    is_of_another = is_gloo or isinstance(error, dist.DistError | RankError)
    return is_of_another or follows_from_another(error.__cause__ or error.__context__)


def is_to_tell(rank: int) -> bool:
    """Whether this rank, which has failed, is the one to say why; if not at once, it waits here for its end.

    Args:
        rank: 0 tells first where the group had not begun.
    """
    if _is_first or (_store is None and rank == 0):
        return True
    is_told = _count(0)
    time.sleep(SECONDS_FOR_THE_FIRST)
    num_told = _count(1)
    if is_told is None or num_told is None:
        # The store's host is gone. On this machine it has told why, or its agent does; of another one nothing is known.
        return _has_other_machines()
    return not is_told and num_told <= 1


def linger() -> None:
    """Where ranks of other machines look into a store that ends with this process, give them the time to."""
    if _is_first and _has_other_machines():
        time.sleep(SECONDS_TO_LOOK)


def _has_other_machines() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")


def _count(more: int) -> int | None:
    """How many ranks have failed, this one included if `more` is 1; None where the store is gone, and its host with it."""
    try:
        return 0 if _store is None else _store.add("count", more)
    except dist.DistError:
        return None
