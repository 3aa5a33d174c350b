"""Mixtures of experts: a router chooses, for each token, the experts whose outputs are added up.

Dropless: every token reaches all its experts, whatever their load. Source: Shazeer et al., 2017
(arXiv:1701.06538), Gale et al., 2022 (arXiv:2211.15841).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune.distributed.collectives import sum_both_ways
from torchtune.distributed.mesh import Axis
from torchtune.modules.activations import ACTIVATIONS
from torchtune.modules.grouped import grouped_linear
from torchtune.modules.linear import share_of
from torchtune.modules.naming import Block
from torchtune.modules.stored import Piece, Stored

Choose = Callable[..., tuple[Tensor, Tensor]]


class Router(nn.Module):
    """Scores each token's experts, in float32, and chooses.

    No `Linear`: adapters and quantisers that look for linear layers leave it alone.

    Args:
        choose: logits [T, E] -> weights [T, k] and experts [T, k]; takes the correction second, if there is one.
        has_correction: a saved buffer [E] that is added to the scores for the choice alone (DeepSeek V3).

    Attributes:
        update: a module [T, D] -> [T, E] whose output is added to the logits, if there is one. It is no part of a
            checkpoint.
    """

    unstored = ("update",)

    def __init__(
        self, hidden_size: int, num_experts: int, choose: Choose, *, bias: bool = False, has_correction: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.02)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
        self.choose = choose
        self.update: nn.Module | None = None
        self.has_correction = has_correction
        if has_correction:
            self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> weights [T, k], experts [T, k], logits [T, E]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        logits = F.linear(x, self.weight.to(wide), None if self.bias is None else self.bias.to(wide))
        if self.update is not None:
            logits = logits + self.update(x)
        correction = (self.e_score_correction_bias,) if self.has_correction else ()
        weights, experts = self.choose(logits, *correction)
        return weights, experts, logits


def softmax_then_choose(logits: Tensor, *, top_k: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """The k largest of a softmax over all experts; `normalised`, they sum to one."""
    weights, experts = logits.softmax(-1).topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if normalised else weights), experts


def choose_then_softmax(logits: Tensor, *, top_k: int) -> tuple[Tensor, Tensor]:
    """A softmax over the k largest alone."""
    chosen, experts = logits.topk(top_k, dim=-1)
    return chosen.softmax(-1), experts


def choose_then_sigmoid(logits: Tensor, *, top_k: int) -> tuple[Tensor, Tensor]:
    """The sigmoids of the k largest, each for itself (Llama 4)."""
    chosen, experts = logits.topk(top_k, dim=-1)
    return chosen.sigmoid(), experts


def choose_by_groups(
    logits: Tensor, *, top_k: int, num_groups: int, top_groups: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The k largest of a softmax over all experts, within the `top_groups` groups whose largest are largest.

    Source: DeepSeek-V2, 2024 (arXiv:2405.04434), section 2.2.2.
    """
    scores = logits.softmax(-1)
    best = scores.unflatten(-1, (num_groups, -1)).amax(-1)  # [T, groups]
    weights, experts = scores.masked_fill(~_in_top_groups(best, top_groups, logits), 0.0).topk(top_k, dim=-1)
    return weights * scale, experts


def choose_by_biased_groups(
    logits: Tensor,
    correction: Tensor,
    *,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalised: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The k largest sigmoids, chosen with a correction added and weighed without it.

    A group counts by the sum of its two largest. Source: DeepSeek-V3, 2024 (arXiv:2412.19437), section 2.1.2.

    Args:
        correction: [E].
        normalised: the weights sum to `scale`.
    """
    scores = logits.sigmoid()
    ranked = scores + correction
    best = ranked.unflatten(-1, (num_groups, -1)).topk(2, dim=-1).values.sum(-1)  # [T, groups]
    ranked = ranked.masked_fill(~_in_top_groups(best, top_groups, logits), float("-inf"))
    experts = ranked.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, experts


def _in_top_groups(best: Tensor, top_groups: int, logits: Tensor) -> Tensor:
    """[T, E], whether an expert is in one of the groups that are largest by `best`, [T, groups]."""
    chosen = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(top_groups, dim=-1).indices, True)
    return chosen.repeat_interleave(logits.shape[-1] // best.shape[-1], dim=-1)


class Experts(Stored):
    """All experts of a layer, each a gated feed-forward, as one tensor a projection.

    Letters: T tokens, k experts a token, E experts, D hidden_size, F an expert's intermediate size.

    Attributes:
        gate_up_proj: [E, 2 F, D], the gate's rows first; [E, D, 2 F] where `transposed`.
        down_proj: [E, D, F]; [E, F, D] where `transposed`.

    Args:
        gated: gate_up [N, 2 F] -> [N, F]; `gated_by`, unless a family has its own.
        bias: each expert has biases, `gate_up_proj_bias` and `down_proj_bias`.
        weigh_inputs: a token is weighed before its experts and not after them (Llama 4).
        separate: the names of gate, up and down of one expert, in checkpoints that store each apart.
        interleaved: what `gated` takes is not gate and then up, but the two in turn (gpt-oss).

    Attributes:
        down_bias_share: how much of `down_proj_bias` is added; less than all where ranks' outputs are added up.
        updates: modules (rows [N, in], counts [E]) -> [N, out] whose output is added to that of the projection they
            are named after. They are no part of a checkpoint.
    """

    unstored = ("updates",)

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        gated: Callable[[Tensor], Tensor],
        bias: bool = False,
        transposed: bool = False,
        weigh_inputs: bool = False,
        separate: Sequence[str] = (),
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        up, down = (2 * intermediate_size, hidden_size), (hidden_size, intermediate_size)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, *(reversed(up) if transposed else up)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, *(reversed(down) if transposed else down)))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(num_experts, up[0])) if bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, down[0])) if bias else None
        if not self.down_proj.is_meta:
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.02)
        self.num_experts, self.intermediate_size = num_experts, intermediate_size
        self.gated, self.transposed, self.weigh_inputs = gated, transposed, weigh_inputs
        self.interleaved, self.down_bias_share = interleaved, 1.0
        self.updates = nn.ModuleDict()
        # Without `separate` nothing is stored otherwise than here.
        self.layouts = (partial(self._one_by_one, tuple(separate)), self._stacked) if separate else (dict,)
        self.layout = self.layouts[0]

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x [T, D], weights and experts [T, k] -> [T, D], the weighted sum of each token's experts."""
        top_k = experts.shape[1]
        order = experts.flatten().argsort(stable=True)  # [T k], by expert
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        # Not `bincount`, for which the host would wait on CUDA.
        counts = order.new_zeros(self.num_experts).scatter_add_(0, experts.flatten(), torch.ones_like(order))
        weight_of_row = weights.flatten()[order, None].to(x.dtype)
        rows = rows_of_tokens(x, order, place, top_k)
        if self.weigh_inputs:
            rows = rows * weight_of_row
        rows = self.of_rows(rows, counts)
        if not self.weigh_inputs:
            rows = rows * weight_of_row
        return sums_of_rows(rows, order, place, top_k)

    def of_rows(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [N, D], the first counts[0] for expert 0 and so on, counts [E] -> [N, D], unweighed.

        Expert parallelism wraps it: everything around it is of this rank's tokens, everything in it of its experts.
        """
        gate_up = self._linear("gate_up_proj", rows, counts)
        return self._linear("down_proj", self.gated(gate_up), counts)

    def sizes_of(self, name: str) -> tuple[int, int]:
        """in and out of a projection: D and 2 F, or F and D."""
        out, size = self._parameters[name].shape[1:]  # type: ignore[union-attr]
        return (out, size) if self.transposed else (size, out)

    def _linear(self, name: str, x: Tensor, counts: Tensor) -> Tensor:
        out = grouped_linear(x, getattr(self, name), counts, transposed=self.transposed)
        bias = share_of(getattr(self, f"{name}_bias"), self.down_bias_share if name == "down_proj" else 1.0)
        if bias is not None:
            out = out + bias.to(x.dtype).repeat_interleave(counts, dim=0, output_size=x.shape[0])
        return out + self.updates[name](x, counts) if name in self.updates else out

    def _stacked(self) -> dict[str, list[Piece]]:
        return {name: [Piece(name)] for name, _ in self.named_parameters(recurse=False)}

    def _one_by_one(self, names: tuple[str, ...]) -> dict[str, list[Piece]]:
        gate, up, down = names
        first, second = slice(0, self.intermediate_size), slice(self.intermediate_size, 2 * self.intermediate_size)
        experts = range(self.num_experts)
        halves = [
            Piece(f"{e}.{name}.weight", (e, half)) for e in experts for name, half in ((gate, first), (up, second))
        ]
        return {"gate_up_proj": halves, "down_proj": [Piece(f"{e}.{down}.weight", (e,)) for e in experts]}


def rows_of_tokens(x: Tensor, order: Tensor, place: Tensor, top_k: int) -> Tensor:
    """Each token k times, in the experts' order: x [T, D] -> [T k, D].

    Its gradient is a sum over k in the tokens' order: adding by index would be slow, and not deterministic on
    every device.

    Args:
        order: [T k], at each place of the result, k times the token that it is of, and its choice.
        place: [T k], the inverse of it.
    """
    rows: Tensor = _RowsOfTokens.apply(x, order, place, top_k)
    return rows


def sums_of_rows(rows: Tensor, order: Tensor, place: Tensor, top_k: int) -> Tensor:
    """The sum of each token's k rows: [T k, D] in the experts' order -> [T, D]; the transpose of the above."""
    sums: Tensor = _SumsOfRows.apply(rows, order, place, top_k)
    return sums


class _RowsOfTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order, place)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        order, place = ctx.saved_tensors
        return _SumsOfRows.apply(grads[0], order, place, ctx.top_k), None, None, None


class _SumsOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order, place)
        ctx.top_k = top_k
        return rows.index_select(0, place).unflatten(0, (-1, top_k)).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        order, place = ctx.saved_tensors
        return _RowsOfTokens.apply(grads[0], order, place, ctx.top_k), None, None, None


def gated_by(activation: str) -> Callable[[Tensor], Tensor]:
    """act(gate) * up of [N, 2 F], the gate's half first."""
    act = ACTIVATIONS[activation]
    if act is F.silu:
        return _SiluGate.apply

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return act(gate) * up

    return gated


class _SiluGate(torch.autograd.Function):
    """silu(gate) * up of [N, 2 F] -> [N, F]; nothing but the input is kept, and its gradient is written in place."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(grads[0], F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        return result


class MoE(Block):
    """A router, its experts, and what is added for every token.

    Args:
        shared_experts: a feed-forward that every token goes through.
        shared_expert_gate: [D] -> [1], how much of it, through a sigmoid (Qwen2-MoE).

    Attributes:
        router_logits: [T, E] of the last forward, while `keep_router_logits`.
    """

    def __init__(
        self,
        gate: Router,
        experts: Experts,
        *,
        shared_experts: nn.Module | None = None,
        shared_expert_gate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        if shared_experts is not None:
            self.shared_experts = shared_experts
        if shared_expert_gate is not None:
            self.shared_expert_gate = shared_expert_gate
        self.has_shared, self.has_shared_gate = shared_experts is not None, shared_expert_gate is not None
        self.keep_router_logits = False
        self.router_logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        weights, experts, logits = self.gate(x)
        if self.keep_router_logits:
            self.router_logits = logits
        out = self.experts(x, weights, experts)
        if not self.has_shared:
            return out
        shared = self.shared_experts(x)
        return out + (torch.sigmoid(self.shared_expert_gate(x)) * shared if self.has_shared_gate else shared)


def load_balancing_loss(router_logits: Sequence[Tensor], *, top_k: int, axis: Axis | None = None) -> Tensor:
    """How unevenly experts are used: E times the sum over experts of their share of choices and of probability.

    It is k where all are used alike, and 0 where there is no token. Source: Fedus et al., 2021 (arXiv:2101.03961),
    equations 4 to 6.

    Args:
        router_logits: [T, E] of each layer.
        axis: ranks that each have some of the tokens, if several do; the loss is that of all, on each of them.
    Returns:
        A scalar.
    """
    probabilities = torch.cat(list(router_logits)).softmax(-1)  # [L T, E]
    num_experts = probabilities.shape[-1]
    chosen = probabilities.topk(top_k, dim=-1).indices
    num_chosen = torch.bincount(chosen.flatten(), minlength=num_experts).to(probabilities.dtype)
    num_rows = num_chosen.new_full((1,), len(probabilities))
    sums = torch.cat((num_chosen, probabilities.sum(0), num_rows))
    sums = sums if axis is None else sum_both_ways(sums, axis)
    shares = sums[:-1] / sums[-1].clamp(min=1)
    return num_experts * (shares[:num_experts] * shares[num_experts:]).sum()
