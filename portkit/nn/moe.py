"""Mixture of experts (Shazeer et al. 2017, arXiv:1701.06538): blocks of which a token takes a few.

Knows how tokens go to the experts that were chosen for them, and how the results come back. How
experts are chosen and weighted is each family's own: its router returns a `Routing`. Tokens stand
in one row here, (tokens, hidden_size), whatever batch they come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """A router's choice for each token."""

    logits: Tensor
    """(tokens, experts), what it was chosen by."""
    weights: Tensor
    """(tokens, choices)"""
    experts: Tensor
    """int64 (tokens, choices): which experts the weights belong to."""

    @property
    def scores(self) -> Tensor:
        """(tokens, experts): the weights of all experts, zero where not chosen."""
        return scores(self.weights, self.experts, self.logits.shape[1])


def scores(weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Weights (tokens, choices) to their places among all experts, (tokens, num_experts)."""
    everywhere = weights.new_zeros(len(weights), num_experts)
    return everywhere.scatter(-1, experts, weights)


class ByChoice(NamedTuple):
    """What each token has for each expert that was chosen for it."""

    values: Tensor
    """(tokens, choices, size)"""
    experts: Tensor
    """int64 (tokens, choices): whose they are, in ascending order."""
    num_experts: int

    def everywhere(self) -> Tensor:
        """(num_experts x tokens, size), expert after expert, zero where not chosen."""
        num_tokens, _, size = self.values.shape
        whole = self.values.new_zeros(self.num_experts, num_tokens, size)
        return whole.index_put((self.experts, self._tokens()), self.values).flatten(0, 1)

    def taken_from(self, everywhere: Tensor) -> ByChoice:
        """The same choices of other values, as `everywhere` lays them out."""
        whole = everywhere.view(self.num_experts, -1, everywhere.shape[-1])
        return self._replace(values=whole[self.experts, self._tokens()])

    def _tokens(self) -> Tensor:
        return torch.arange(len(self.experts), device=self.experts.device)[:, None]


def weighted(hidden_states: Tensor, routing: Routing) -> ByChoice:
    """(tokens, hidden_size), as often as there are choices, each times the choice's weight."""
    experts, order = routing.experts.sort(dim=1)
    weights = routing.weights.gather(1, order)
    values = hidden_states[:, None] * weights[..., None]
    return ByChoice(values, experts, routing.logits.shape[1])


class GatedExperts(nn.Module):
    """Gated feed-forward blocks, `down(act(gate(x)) * up(x))`, their outputs weighted and summed.

    The matrices are an expert's own, as (out, in): loaded in the dtype that they are stored in they
    stay views of the file, and of a large model only those that are chosen are ever read.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        act: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.gate_proj = _matrices(num_experts, intermediate_size, hidden_size)
        self.up_proj = _matrices(num_experts, intermediate_size, hidden_size)
        self.down_proj = _matrices(num_experts, hidden_size, intermediate_size)
        self.act = act

    def forward(self, hidden_states: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """(tokens, hidden_size) to the same; `weights` and `experts` as in `Routing`."""
        num_choices = experts.shape[1]
        order = experts.flatten().argsort()  # of the choices: expert by expert
        counts = experts.flatten().bincount(minlength=len(self.gate_proj)).tolist()
        # An expert that no token chose is not read, but where gradients are wanted: its are zero,
        # and an optimizer must be told so.
        wanted = torch.is_grad_enabled()
        sent = torch.split(hidden_states[order // num_choices], counts)
        outputs = [self._run(expert, x) for expert, x in enumerate(sent) if len(x) or wanted]
        weighted = torch.cat(outputs) * weights.flatten()[order, None]
        # One sum over a token's choices, rounded once: adding expert after expert to the output
        # rounds each time, and differs by a hundredth in bfloat16.
        return weighted[order.argsort()].view(*experts.shape, -1).sum(1)

    def _run(self, expert: int, x: Tensor) -> Tensor:
        gate_proj, up_proj = self.gate_proj[expert], self.up_proj[expert]
        if torch.is_grad_enabled():
            # In one product, as in the reference: x's gradient is then one sum and not two.
            gate, up = F.linear(x, torch.cat((gate_proj, up_proj))).chunk(2, dim=-1)
        else:
            gate, up = F.linear(x, gate_proj), F.linear(x, up_proj)
        return F.linear(self.act(gate) * up, self.down_proj[expert])


class ExpertsByChoice(nn.Module):
    """The same blocks, of what each is given: who weighs it and who sums it are others.

    The matrices of all experts are one, stored as (experts, in, out), the gate's and up's columns
    side by side. Every chosen expert computes all tokens: which product a matrix kernel runs
    depends on how many there are, and the reference runs each expert on all.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        act: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, hidden_size, 2 * intermediate_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.act = act

    def forward(self, chosen: ByChoice) -> ByChoice:
        """What each expert makes of its tokens; sizes stay."""
        if torch.is_grad_enabled():  # in one product, as the gradients' bits want it
            x = chosen.everywhere().view(chosen.num_experts, -1, chosen.values.shape[-1])
            made = self._run(x, self.gate_up_proj, self.down_proj, torch.bmm)
            return chosen.taken_from(made.flatten(0, 1))
        # Of an expert that was not chosen what it is given is zero, and so is what it makes.
        made = torch.empty_like(chosen.values)
        for expert in torch.unique(chosen.experts).tolist():
            tokens, choices = torch.where(chosen.experts == expert)
            x = torch.zeros_like(chosen.values[:, 0])
            x[tokens] = chosen.values[tokens, choices]
            matrices = self.gate_up_proj[expert], self.down_proj[expert]
            made[tokens, choices] = self._run(x, *matrices, torch.mm)[tokens]
        return chosen._replace(values=made)

    def _run(
        self,
        x: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        multiply: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        gate, up = multiply(x, gate_up_proj).chunk(2, dim=-1)
        return multiply(up * self.act(gate), down_proj)


def _matrices(count: int, rows: int, columns: int) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.empty(rows, columns)) for _ in range(count))
