"""What checkpointing keeps of each layer, in the host's memory: copied there and back beside the computation.

In the forward pass a layer's input goes to pinned memory on a stream of its own while the layer runs. In the backward
pass each layer that takes its input back starts the copy of the one before it, so that it is there when it is needed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class HostMemory:
    """Where inputs are put, and in which order: all layers of a model share one."""

    def __init__(self) -> None:
        self._last: weakref.ref[_Kept] | None = None

    def put(self, tensor: Tensor) -> _Kept:
        """Start its copy to the host; `take` of what comes gives it back."""
        kept = _Kept(tensor, None if self._last is None else self._last())
        self._last = weakref.ref(kept)
        return kept

    def take(self, kept: _Kept) -> Tensor:
        """The tensor on its device again, and the copy of the one that was put before it under way."""
        kept.start()
        before = None if kept.before is None else kept.before()
        if before is not None:
            before.start()
        return kept.arrived()


class _Kept:
    """A tensor on the host."""

    def __init__(self, tensor: Tensor, before: _Kept | None) -> None:
        # Weak: the autograd graph holds what is still to be taken, and nothing else needs to.
        self.before = None if before is None else weakref.ref(before)
        self._device = tensor.device
        self._coming: tuple[Tensor, torch.cuda.Event] | None = None
        stream = _side_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        # Its memory must not be used again before the copy is made.
        tensor.record_stream(stream)

    def start(self) -> None:
        """Copy it back, unless that has begun."""
        if self._coming is None:
            with torch.cuda.stream(_side_stream(self._device)):
                tensor = self._host.to(self._device, non_blocking=True)
                self._coming = tensor, torch.cuda.current_stream(self._device).record_event()

    def arrived(self) -> Tensor:
        """It, for the current stream, which waits for the copy; the host does not."""
        assert self._coming is not None
        tensor, event = self._coming
        self._coming = None
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        tensor.record_stream(current)
        return tensor


def offload_inputs(host: HostMemory, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Run a checkpointed `forward`, whose inputs are all that autograd keeps of it, and keep them in `host`."""
    with saved_tensors_hooks(host.put, host.take):
        return forward(*args, **kwargs)


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
