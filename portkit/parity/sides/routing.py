"""A router's choice of experts as sites, whatever form it is given in.

Our routers give a `Routing`; the reference's a tuple, whose parts are told by what they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from portkit.nn.moe import Routing
from portkit.parity.sides.roles import Visit

EXPERTS = "#experts"


def routing_of(output: Any) -> Routing | None:
    """What a router gives as a tuple, in whatever order: told by what the tensors are.

    (tokens, experts) logits; and either (tokens, choices) weights beside whole numbers, or all
    experts' weights, zero where not chosen. None where it is nothing of the kind.
    """
    if not isinstance(output, tuple) or not all(isinstance(one, Tensor) for one in output):
        return None
    if any(one.dim() != 2 or len(one) != len(output[0]) for one in output):
        return None
    whole = [one for one in output if not one.is_floating_point()]
    real = [one for one in output if one.is_floating_point()]
    if len(whole) == 1 and len(real) == 2:
        choices = whole[0].shape[1]
        weights = next((one for one in reversed(real) if one.shape[1] == choices), None)
        logits = next((one for one in real if one is not weights), None)
        if weights is not None and logits is not None and logits.shape[1] >= choices:
            return Routing(logits, weights, whole[0])
    if not whole and len(real) == 2 and real[0].shape == real[1].shape:
        scores = min(real, key=lambda one: int((one != 0).sum()))
        most = int((scores != 0).sum(-1).max())
        if most < scores.shape[1] or real[0] is scores:
            logits = real[1] if scores is real[0] else real[0]
            weights, experts = scores.topk(max(1, most))
            return Routing(logits, weights, experts)
    return None


def routing_as(output: tuple[Tensor, ...], seen: Routing, before: Routing) -> tuple[Tensor, ...]:
    """A router's tuple with what was put in the place of its parts."""
    if all(a is b for a, b in zip(seen, before, strict=True)):
        return output
    new = []
    for one in output:
        if not one.is_floating_point():
            new.append(seen.experts.to(one.dtype))
        elif one is before.logits:
            new.append(seen.logits)
        elif one is before.weights:
            new.append(seen.weights)
        else:  # the weights of all experts
            new.append(seen.scores)
    return tuple(new)


def visit_routing(router: str, visit: Visit, routing: Routing) -> Routing:
    """Visit a router's logits, under its own name, and then its choice, under its block's.

    The choice is always the weights of all experts, zero where not chosen, whatever form a router
    gives it in. One that the visitor leaves as it is keeps its form, and a token that is given
    the experts that it has keeps their order: what the experts hold within lies in that order.
    """
    logits = visit(router, routing.logits)
    weights, experts = routing.weights, routing.experts
    effective = routing.scores
    seen = visit(choice_of(router), effective)
    if seen is not effective:
        most = int((seen != 0).sum(-1).max())
        weights, new = seen.topk(max(1, most))
        if new.shape == experts.shape:
            same = new.sort(-1).values == experts.sort(-1).values
            experts = torch.where(same.all(-1, keepdim=True), experts, new)
            weights = seen.gather(-1, experts)
        else:
            experts = new
    return Routing(logits, weights, experts)


def choice_of(router: str) -> str:
    """`model.layers.0.mlp.gate` to `model.layers.0.mlp#experts`."""
    return router.rpartition(".")[0] + EXPERTS
