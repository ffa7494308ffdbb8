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
from portkit.parity.judging.routing import logits_before
from portkit.parity.sides.routing import EXPERTS, choice_of

_MATRICES = ("gate_up", "down")


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
    weighs: str
    """input, output, or nothing."""
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
        _, experts = choice.topk(count, dim=-1)
        outputs = x.new_zeros(*experts.shape, x.shape[1])
        for expert in torch.unique(experts).tolist():
            tokens, places = torch.where(experts == expert)
            weight = choice[tokens, expert, None]
            given = x[tokens] * weight if self.weighs == "input" else x[tokens]
            held = (expert + self.shifted) % choice.shape[1]
            gate_up, down = _matrices(scene, f"{self.block}.experts", held)
            made = F.linear(_gated(F.linear(given, gate_up), self.exchanged), down)
            outputs[tokens, places] = made * weight if self.weighs == "output" else made
        return _one_by_one(outputs, experts) if self.one_by_one else outputs.sum(1)


@dataclass(frozen=True)
class Sent:
    """What all experts are given, one after the other: all tokens, times the expert's weights."""

    choice: str
    source: str
    """(tokens, hidden_size)"""
    weighs: bool = True

    def run(self, scene: Scene, site: str) -> Tensor | None:
        x, choice = scene.at(self.source), scene.at(self.choice)
        if x is None or choice is None or x.dim() != 2:
            return None
        weights = choice if self.weighs else (choice != 0).to(x.dtype)
        return (x * weights.t()[..., None]).flatten(0, 1)


@dataclass(frozen=True)
class Blocks:
    """What all experts make of that; their matrices are stored as (experts, in, out)."""

    experts: str
    shifted: int = 0
    exchanged: bool = False

    def run(self, scene: Scene, site: str) -> Tensor | None:
        given = scene.at(f"{self.experts}:in")
        if given is None:
            return None
        count = len(scene.facts.parameters[f"{self.experts}.down_proj"])
        made = []
        # Each of all tokens, as the reference: how many there are decides which kernel runs.
        for expert, x in enumerate(given.chunk(count)):
            gate_up, down = _matrices(scene, self.experts, (expert + self.shifted) % count)
            made.append(torch.mm(_gated(torch.mm(x, gate_up), self.exchanged), down))
        return torch.cat(made)


@dataclass(frozen=True)
class Total:
    """What all experts made of a token, added to what one made that all tokens pass through."""

    choice: str
    experts: str
    shared: str | None
    one_by_one: bool = False
    weighs: bool = False

    def run(self, scene: Scene, site: str) -> Tensor | None:
        choice, made = scene.at(self.choice), scene.at(self.experts)
        if choice is None or made is None or len(made) != choice.numel():
            return None
        outputs = made.view(*choice.t().shape, -1).transpose(0, 1)  # (tokens, experts, size)
        if self.weighs:
            outputs = outputs * choice[..., None]
        total = outputs.sum(1)
        if self.one_by_one:
            total = _one_by_one(outputs, torch.arange(choice.shape[1]).expand(choice.shape))
        shared = None if self.shared is None else scene.at(self.shared)
        return total if shared is None else shared + total


def _matrices(scene: Scene, experts: str, number: int) -> tuple[Tensor, Tensor]:
    gate_up, down = (
        scene.upcast(scene.facts.parameters[f"{experts}.{name}_proj"][number]) for name in _MATRICES
    )
    return gate_up, down


def _gated(both: Tensor, exchanged: bool) -> Tensor:
    halves = both.chunk(2, dim=-1)
    gate, up = halves[::-1] if exchanged else halves
    return F.silu(gate) * up


def _one_by_one(outputs: Tensor, experts: Tensor) -> Tensor:
    ordered = experts.argsort(dim=-1)[..., None].expand_as(outputs)
    first, *others = outputs.gather(1, ordered).unbind(1)
    for one in others:
        first = first + one
    return first


def mixtures(scene: Scene, site: str) -> Iterator[Mixture | Sent | Blocks | Total]:
    """What a block of experts may do, its experts alone, or what is between router and experts."""
    block = site.removesuffix(":in").removesuffix(".experts")
    experts, choice = f"{block}.experts", f"{block}{EXPERTS}"
    if f"{experts}.gate_up_proj" not in scene.facts.parameters or choice not in scene.trace:
        return
    source = f"{logits_before(choice, scene.trace)}:in"
    # Experts are given their choices' weights, or each of them all tokens, weighted already: those
    # are multiplied by matrices stored as (experts, in, out), which tells them where there is one.
    sent, given = scene.trace.get(f"{experts}:in"), scene.trace.get(source)
    gate_up, down = (scene.facts.parameters[f"{experts}.{name}_proj"] for name in _MATRICES)
    is_sent = (
        sent is not None
        and given is not None
        and len(sent) == len(down) * len(given)
        and gate_up.shape[2] == 2 * down.shape[1]
    )
    if site == experts and not is_sent:
        for weighs in ("output", "input"):
            yield Mixture(block, source, weighs)
    elif site == experts:
        yield Blocks(experts)
    elif site == f"{experts}:in" and is_sent:
        yield Sent(choice, source)
    elif site == block and is_sent:
        shared = f"{block}.shared_expert"
        yield Total(choice, experts, shared if shared in scene.trace else None)
