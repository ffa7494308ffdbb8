"""Recipes of experts: how a router chooses and weighs, and what is made of its choice.

Sizes and counts are the config's and the parameters'; which form a router has, and whether weights
go on inputs or outputs, is observed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from portkit.parity.faults.scene import Scene
from portkit.parity.routing import logits_before
from portkit.parity.sites import EXPERTS, choice_of


@dataclass(frozen=True)
class Choice:
    """The weights of all experts, zero where not chosen, (tokens, experts)."""

    logits: str
    count: int
    form: str
    """softmax: over all experts; chosen: a softmax over the chosen alone; sigmoid."""
    normalised: bool
    """Weights are made to sum to one."""
    upcast: bool = True

    def run(self, scene: Scene, site: str) -> Tensor | None:
        logits = scene.at(self.logits)
        if logits is None or not 0 < self.count <= logits.shape[1]:
            return None
        best, experts = logits.topk(self.count, dim=-1)
        if self.form == "softmax":
            wide = logits.float() if self.upcast else logits
            best, experts = F.softmax(wide, dim=-1).topk(self.count, dim=-1)
        elif self.form == "chosen":
            best = F.softmax(best.float() if self.upcast else best, dim=-1)
        else:
            kept = torch.full_like(logits, -torch.inf).scatter(-1, experts, best)
            best = torch.sigmoid(kept.float() if self.upcast else kept).gather(-1, experts)
        if self.normalised:
            best = best / best.sum(-1, keepdim=True)
        best = best.to(logits.dtype)
        return torch.zeros_like(logits).scatter(-1, experts, best)


def choices(scene: Scene, site: str) -> Iterator[Choice]:
    """The forms that a router may have."""
    count = getattr(scene.facts.config, "num_experts_per_tok", None)
    logits = logits_before(site, scene.trace)
    if isinstance(count, int) and logits is not None:
        for form in ("softmax", "sigmoid", "chosen"):
            for normalised in (False, True):
                yield Choice(logits, count, form, normalised)


def is_router(scene: Scene, site: str) -> bool:
    """Whether a choice of experts is made by what this module computes."""
    choice = choice_of(site)
    return choice in scene.trace and logits_before(choice, scene.trace) == site


@dataclass(frozen=True)
class Mixture:
    """Gated blocks of which a token passes through those that were chosen for it, and their sum."""

    block: str
    """`model.layers.0.mlp`, whose router chose."""
    source: str
    """What experts are given, (tokens, hidden_size)."""
    as_linear: bool
    """Matrices are stored as (out, in), and not as (in, out)."""
    weighs: str
    """input, output, or nothing."""
    shared: str | None = None
    """The output of an expert that all tokens pass through."""
    shifted: int = 0
    """Experts have the matrices of those so many numbers further on."""
    exchanged: bool = False
    """`up` is activated, and not `gate`."""
    one_by_one: bool = False
    """Added expert by expert, rounded each time."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        x, choice = scene.at(self.source), scene.at(f"{self.block}{EXPERTS}")
        if x is None or choice is None or x.dim() != 2:
            return None
        count = max(1, int((choice != 0).sum(-1).max()))
        weights, experts = choice.topk(count, dim=-1)
        if not self.as_linear:  # in the order of their numbers, as a sum over all has them
            experts, order = experts.sort(dim=-1)
            weights = weights.gather(-1, order)
        outputs = x.new_zeros(*experts.shape, x.shape[1])
        for expert in torch.unique(experts).tolist():
            tokens, places = torch.where(experts == expert)
            outputs[tokens, places] = self._of(scene, expert, x, choice, tokens)
        total = _one_by_one(outputs, experts) if self.one_by_one else outputs.sum(1)
        shared = None if self.shared is None else scene.at(self.shared)
        return total if shared is None else shared + total

    def _of(self, scene: Scene, expert: int, x: Tensor, choice: Tensor, tokens: Tensor) -> Tensor:
        weight = choice[:, expert, None]
        held = (expert + self.shifted) % choice.shape[1]
        gate_up, down = (
            scene.upcast(scene.facts.parameters[f"{self.block}.experts.{name}_proj"][held])
            for name in ("gate_up", "down")
        )
        x = x * weight if self.weighs == "input" else x
        if self.as_linear:
            x = x[tokens]
            halves = F.linear(x, gate_up).chunk(2, dim=-1)
        else:  # all tokens, as the reference: how many there are decides which kernel runs
            halves = torch.mm(x, gate_up).chunk(2, dim=-1)
        gate, up = halves[::-1] if self.exchanged else halves
        hidden = F.silu(gate) * up
        made = F.linear(hidden, down) if self.as_linear else torch.mm(hidden, down)[tokens]
        return made * weight[tokens] if self.weighs == "output" else made


def _one_by_one(outputs: Tensor, experts: Tensor) -> Tensor:
    ordered = experts.argsort(dim=-1)[..., None].expand_as(outputs)
    first, *others = outputs.gather(1, ordered).unbind(1)
    for one in others:
        first = first + one
    return first


def mixtures(scene: Scene, site: str) -> Iterator[Mixture]:
    """What a block of experts, or its experts alone, may do."""
    block = site.removesuffix(".experts")
    held = [scene.facts.parameters.get(f"{block}.experts.{n}_proj") for n in ("gate_up", "down")]
    if held[0] is None or held[1] is None:
        return
    hidden_size = scene.facts.config.hidden_size
    forms = [held[0].shape[2] == hidden_size, held[0].shape[1] != hidden_size]
    logits = logits_before(f"{block}{EXPERTS}", scene.trace)
    alone = site != block or f"{block}.shared_expert" not in scene.trace
    shared = None if alone else f"{block}.shared_expert"
    for as_linear in sorted({*forms}):
        for weighs in ("output", "input"):
            yield Mixture(block, f"{logits}:in", as_linear, weighs, shared)
