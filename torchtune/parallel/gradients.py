"""The gradients of all ranks: summed where ranks share a parameter, and their norm, each element counted once.

data, context    every rank has a gradient of its own tokens; FSDP sums those of what it shards, the others are
                 summed here
tensor           inside a split layer every gradient is a share of the sum; those of parameters that are split are
                 whole, those of all others (norms, routers) are summed here
expert           an expert sees the tokens of all ranks of its axis, so its gradient is summed over the others
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from torchtune.distributed.gradients import sum_gradients
from torchtune.distributed.mesh import Axis, Mesh
from torchtune.distributed.part import is_sharded
from torchtune.distributed.process_group import sum_over_ranks, world_size
from torchtune.modules.moe import Experts
from torchtune.parallel.splits import unsplit_parameters


class GradientSums:
    """Sums the gradients of a model's trained parameters over the ranks that share them.

    Args:
        model: as it is trained, all transforms applied.
        mesh: the ranks.

    Attributes:
        whole_at_once: names of parameters of which nothing is summed here: their gradient is whole as it arrives.
    """

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        of_experts = {
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, Experts) and mesh.expert.size > 1
            for name, _ in module.named_parameters()
        }
        unsplit = set(unsplit_parameters(model)) if mesh.tensor.size > 1 else set[str]()
        self._over: list[tuple[Axis, list[str]]] = [
            (mesh.tokens, [n for n, p in trained.items() if not is_sharded(p) and n not in of_experts]),
            (mesh.same_experts, [n for n, p in trained.items() if not is_sharded(p) and n in of_experts]),
            (mesh.tensor, [name for name in trained if name in unsplit]),
        ]
        waits = {name for axis, names in self._over for name in names if axis.size > 1}
        self.whole_at_once = trained.keys() - waits
        self._copies: dict[str, int] = {}
        for name, parameter in trained.items():
            copies = mesh.sizes.replicate if is_sharded(parameter) else mesh.tokens.size
            if name in of_experts and not is_sharded(parameter):
                copies = mesh.same_experts.size
            self._copies[name] = copies * (mesh.tensor.size if name in unsplit else 1)

    def sum(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give each parameter the gradient of all ranks' tokens; one without any takes part with zeros.

        Args:
            parameters: what this rank holds of them, by name.
        """
        for axis, names in self._over:
            sum_gradients([parameters[name] for name in names], axis)

    def norm(
        self,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
        *,
        stepped: Mapping[Tensor, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        """The norm of all gradients together, the same on all ranks, as a scalar on `device`; the host does not wait.

        Args:
            stepped: norms of gradients that are gone, by what this rank held of the parameter.
        """
        held = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        norms = dict(zip(held, torch._foreach_norm(list(held.values())), strict=True)) if held else {}
        norms |= {name: stepped[parameter] for name, parameter in parameters.items() if parameter in stepped}
        if world_size() == 1:
            return torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms.values()]))
        # A parameter that several ranks hold counts on each with its share.
        squares = [norm.to(device, torch.float64).square() / self._copies[name] for name, norm in norms.items()]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
        return sum_over_ranks(total).sqrt().float()
