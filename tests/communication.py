"""What a rank sends: the collectives within a block of code, by kind, with their bytes."""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# c10d's own, and those that torch.compile traces.
KINDS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    # FSDP's on the CPU (parallel/host_transfers.py): a broadcast from each rank is a gather, an exchange a scatter.
    "broadcast_": "broadcast",
    "alltoall_base_": "all_to_all",
}
NOT_SENDING = {"wait_tensor", "_wrap_tensor_autograd"}


@dataclass(frozen=True)
class Sent:
    """Collectives of each kind, and the bytes of what each is about.

    Attributes:
        num: how many.
        num_bytes: those of the whole, that is gathered, summed or scattered, whatever the ranks' number; of an
            exchange those that go from this rank or come to it, whichever are more.
    """

    num: Counter = field(default_factory=Counter)
    num_bytes: Counter = field(default_factory=Counter)

    def of(self, kind):
        """(how many, bytes) of a kind."""
        return self.num[kind], self.num_bytes[kind]


class Counting(TorchDispatchMode):
    """Within this context collectives are counted; `sent` is what there was since `sent` was last asked for."""

    def __init__(self):
        super().__init__()
        self._sent = Sent()

    @property
    def sent(self):
        sent, self._sent = self._sent, Sent()
        return sent

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        namespace, _, name = function._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name not in NOT_SENDING:
            kind = KINDS[name]  # one that is not known is to be counted too
            parts = [[leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)] for part in (*args, result)]
            self._sent.num[kind] += 1
            self._sent.num_bytes[kind] += max(sum(tensor.nbytes for tensor in part) for part in parts)
        return result
