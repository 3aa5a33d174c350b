"""What the optimizer steps: of each trained parameter the plain tensor that this rank holds.

Where FSDP has split a parameter, this is its local share, in the same memory: an optimizer that treats each element
alone does the same to a share as to the whole, and needs to know nothing of ranks.
"""

from __future__ import annotations

from torch import nn

from torchtune.distributed.part import is_sharded, local


class SteppedParameters:
    """The trained parameters of a model as the optimizer sees them.

    Attributes:
        by_name: the tensors to step, each a leaf with a gradient of its own; a parameter that is not split is itself.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.by_name = {
            name: nn.Parameter(local(parameter.detach())) if is_sharded(parameter) else parameter
            for name, parameter in trained
        }
        # Looked up again each time: FSDP may put its parameters into other memory when it first runs.
        self._places = {
            name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            for name, parameter in trained
            if is_sharded(parameter)
        }

    @property
    def has_shares(self) -> bool:
        """Whether some are shares of a parameter."""
        return bool(self._places)

    def take_gradients(self) -> None:
        """After the backward pass: let the shares have the gradients of theirs."""
        for name, (module, attribute) in self._places.items():
            parameter, stepped = getattr(module, attribute), self.by_name[name]
            stepped.data = local(parameter.detach())
            stepped.grad = None if parameter.grad is None else local(parameter.grad)

    def forget_gradients(self) -> None:
        """After the step: no gradient is left, here nor in the model."""
        for stepped in self.by_name.values():
            stepped.grad = None
        for module, attribute in self._places.values():
            getattr(module, attribute).grad = None
