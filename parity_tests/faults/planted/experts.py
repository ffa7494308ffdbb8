"""Mistakes in how experts are chosen, weighed, held and summed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parity_tests.faults.planted.planting import (
    LOW,
    Model,
    Need,
    Planting,
    hold,
    replace_forward,
)
from portkit.nn.moe import Routing, weighted

Plant = Callable[[Model], str]


def blocks(model: Model) -> dict[str, Any]:
    """Feed-forwards that choose among experts, by their sites."""
    return {name: one for name, one in model.named_modules() if hasattr(one, "experts")}


def _router(block: Any) -> Any:
    return block.gate if hasattr(block, "gate") else block.router


def _first(model: Model, place: str) -> str:
    return f"{next(iter(blocks(model)))}{place}"


def _routed(route: Callable[[Any, Tensor], Routing]) -> Plant:
    """Routers that choose or weigh in another way."""

    def plant(model: Model) -> str:
        for block in blocks(model).values():
            router = _router(block)
            replace_forward(router, lambda _, x, router=router: route(router, x))
        return _first(model, "#experts")

    return plant


def _softmax_over_chosen(router: Any, x: Tensor) -> Routing:
    logits = F.linear(x, router.weight)
    best, experts = logits.topk(router.num_choices, dim=-1)
    return Routing(logits, best.float().softmax(-1).to(x.dtype), experts)


def _sigmoid(router: Any, x: Tensor) -> Routing:
    logits = F.linear(x, router.weight)
    best, experts = logits.topk(router.num_choices, dim=-1)
    weights = torch.sigmoid(best.float())
    if router.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(logits, weights.to(x.dtype), experts)


def _softmax(router: Any, x: Tensor) -> Routing:
    logits = F.linear(x, router.weight)
    weights, experts = logits.float().softmax(-1).topk(router.num_choices, dim=-1)
    return Routing(logits, weights.to(x.dtype), experts)


def _summing_to_one(router: Any, x: Tensor) -> Routing:
    routing: Routing = type(router).forward(router, x)
    weights = routing.weights.float()
    return routing._replace(weights=(weights / weights.sum(-1, keepdim=True)).to(x.dtype))


def _in_its_dtype(router: Any, x: Tensor) -> Routing:
    logits = F.linear(x, router.weight)
    weights, experts = logits.softmax(-1).topk(router.num_choices, dim=-1)
    if router.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(logits, weights, experts)


def _in_float32(router: Any, x: Tensor) -> Routing:
    """All of it, logits too."""
    wide = copy.deepcopy(router).float()
    routing: Routing = type(router).forward(wide, x.float())
    return routing._replace(weights=routing.weights.to(x.dtype))


def not_normalised(model: Model) -> str:
    for block in blocks(model).values():
        _router(block).normalise = False
    return _first(model, "#experts")


def _counted(by: int) -> Plant:
    def plant(model: Model) -> str:
        for block in blocks(model).values():
            _router(block).num_choices += by
        return _first(model, "#experts")

    return plant


def router_logits_in_float32(model: Model) -> str:
    _routed(_in_float32)(model)
    name, block = next(iter(blocks(model).items()))
    return f"{name}.{'gate' if hasattr(block, 'gate') else 'router'}"


def weights_on_input(model: Model) -> str:
    def forward(own: Any, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        columns = range(weights.shape[1])
        given = [
            own(x * weights[:, i, None], torch.ones_like(weights[:, :1]), experts[:, i, None])
            for i in columns
        ]
        return torch.stack(given).sum(0)

    return _each_expert(forward)(model)


def _each_expert(forward: Callable[..., Tensor]) -> Plant:
    """Experts that are given weights, and do something else with them."""

    def plant(model: Model) -> str:
        for block in blocks(model).values():
            replace_forward(block.experts, forward)
        return _first(model, ".experts")

    return plant


def _unweighed(own: Any, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    summed: Tensor = own(x, torch.ones_like(weights), experts)
    return summed


def _next_expert(own: Any, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    summed: Tensor = own(x, weights, (experts + 1) % len(own.__self__.gate_proj))
    return summed


def _one_by_one(own: Any, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    order = experts.argsort(dim=-1)
    weights, experts = weights.gather(-1, order), experts.gather(-1, order)
    total = torch.zeros_like(x)
    for i in range(weights.shape[1]):
        total = total + own(x, weights[:, i, None], experts[:, i, None])
    return total


def _sparse(forward: Callable[[Any, Tensor, Routing], Tensor], place: str) -> Plant:
    """Blocks that send tokens to their experts, or add up what comes back, in another way."""

    def plant(model: Model) -> str:
        for block in blocks(model).values():

            def run(x: Tensor, block: Any = block) -> Tensor:
                x = x.flatten(0, 1)
                return forward(block, x, block.router(x))

            block.forward = run
        return _first(model, place)

    return plant


def _as_ones(routing: Routing) -> Routing:
    return routing._replace(weights=torch.ones_like(routing.weights))


def _sent_unweighed(block: Any, x: Tensor, routing: Routing) -> Tensor:
    made = block.experts(weighted(x, _as_ones(routing)))
    summed: Tensor = block.shared_expert(x) + made.values.sum(1)
    return summed


def _weights_on_output(block: Any, x: Tensor, routing: Routing) -> Tensor:
    made = block.experts(weighted(x, _as_ones(routing)))
    weights = routing.weights.gather(1, routing.experts.argsort(dim=1))
    summed: Tensor = block.shared_expert(x) + (made.values * weights[..., None]).sum(1)
    return summed


def _without_shared(block: Any, x: Tensor, routing: Routing) -> Tensor:
    summed: Tensor = block.experts(weighted(x, routing)).values.sum(1)
    return summed


def gate_up_exchanged(model: Model) -> str:
    """The other half is activated."""
    for block in blocks(model).values():
        experts = block.experts
        if hasattr(experts, "gate_proj"):

            def run(expert: int, x: Tensor, own: Any = experts) -> Tensor:
                gate, up = F.linear(x, own.gate_proj[expert]), F.linear(x, own.up_proj[expert])
                return F.linear(gate * own.act(up), own.down_proj[expert])

            experts._run = run
        else:

            def product(x: Tensor, both: Tensor, down: Tensor, mul: Any, own: Any = experts) -> Any:
                gate, up = mul(x, both).chunk(2, dim=-1)
                return mul(own.act(up) * gate, down)

            experts._run = product
    return _first(model, ".experts")


def experts_as_words(model: Model) -> str:
    """0, 1, 10, 2: as their names are sorted, or one place further on where that is no other."""
    for block in blocks(model).values():
        experts = block.experts
        count = len(experts.down_proj)
        order = sorted(range(count), key=str)
        order = order if order != [*range(count)] else [*range(1, count), 0]
        for name, held in [*experts.named_children()] or [*experts.named_parameters()]:
            if isinstance(held, nn.ParameterList):
                _reordered(held, order)
            else:
                hold(experts, name, held[order])
    return _gate(model, next(i for i, j in enumerate(order) if i != j))


def _gate(model: Model, number: int = 0) -> str:
    """Where an expert's first matrix is found wrong: of a block where they are held in blocks."""
    is_block = isinstance(_first_block(model).experts.down_proj, nn.Parameter)
    held = "gate_up_proj" if is_block else f"gate_proj.{number}"
    return _first(model, f".experts.{held} (parameter)")


def _reordered(held: nn.ParameterList, order: list[int]) -> None:
    before = [*held]
    for place, source in enumerate(order):
        held[place] = nn.Parameter(before[source].detach().clone(), requires_grad=False)


def halves_exchanged(model: Model) -> str:
    """Gate and up of every expert, where they are loaded."""
    for block in blocks(model).values():
        experts = block.experts
        if isinstance(experts.down_proj, nn.Parameter):
            gate, up = experts.gate_up_proj.chunk(2, dim=-1)
            hold(experts, "gate_up_proj", torch.cat((up, gate), -1))
        else:
            experts.gate_proj, experts.up_proj = experts.up_proj, experts.gate_proj
    return _gate(model)


def expert_transposed(model: Model) -> str:
    """As the other layout, (in, out) for (out, in) or the reverse, has them."""
    for block in blocks(model).values():
        experts = block.experts
        if isinstance(experts.down_proj, nn.Parameter):
            hold(experts, "gate_up_proj", experts.gate_up_proj.transpose(1, 2))
        else:
            for i, held in enumerate(experts.gate_proj):
                experts.gate_proj[i] = nn.Parameter(held.detach().T.clone(), requires_grad=False)
    return _gate(model)


def _first_block(model: Model) -> Any:
    return next(iter(blocks(model).values()), None)


def _routers(model: Model) -> list[Any]:
    return [_router(block) for block in blocks(model).values()]


def _matrix(model: Model) -> tuple[int, ...]:
    experts = _first_block(model).experts
    is_block = isinstance(experts.down_proj, nn.Parameter)
    return tuple((experts.gate_up_proj[0] if is_block else experts.gate_proj[0]).shape)


EXPERTS = Need("no feed-forward has experts", lambda model: bool(blocks(model)))
BY_SOFTMAX = Need(
    "experts are not weighed by a softmax",
    lambda model: all(hasattr(one, "normalise") for one in _routers(model)),
)
BY_SIGMOID = Need("experts are not weighed by a sigmoid", lambda model: not BY_SOFTMAX.holds(model))
NORMALISED = Need(
    "weights of experts do not sum to one",
    lambda model: any(getattr(one, "normalise", False) for one in _routers(model)),
)
NOT_NORMALISED = Need(
    "weights of experts sum to one already", lambda model: not NORMALISED.holds(model)
)
SEVERAL = Need(
    "a token has one expert", lambda model: any(one.num_choices > 1 for one in _routers(model))
)
SENT = Need(
    "experts weigh their outputs", lambda model: hasattr(_first_block(model), "shared_expert")
)
WEIGH = Need("experts are given weighted inputs", lambda model: not SENT.holds(model))
SQUARE_EXPERTS = Need("no expert's matrix is square", lambda model: len({*_matrix(model)}) == 1)

_PLANTINGS = (
    Planting("loader.experts_order", experts_as_words),
    Planting("loader.gate_up_swapped", halves_exchanged, variant="of experts"),
    Planting(
        "loader.square_transposed", expert_transposed, (SQUARE_EXPERTS,), variant="of experts"
    ),
    Planting(
        "experts.softmax_over_chosen",
        _routed(_softmax_over_chosen),
        (BY_SOFTMAX, NOT_NORMALISED),
    ),
    Planting("experts.sigmoid", _routed(_sigmoid), (BY_SOFTMAX,)),
    Planting("experts.softmax", _routed(_softmax), (BY_SIGMOID,)),
    Planting("experts.not_normalised", not_normalised, (NORMALISED, SEVERAL)),
    Planting("experts.normalised", _routed(_summing_to_one), (NOT_NORMALISED,)),
    Planting("experts.router_in_low_precision", _routed(_in_its_dtype), (BY_SOFTMAX,), LOW),
    Planting("experts.router_logits_in_float32", router_logits_in_float32, dtypes=LOW),
    Planting("experts.one_too_few", _counted(-1), (SEVERAL,)),
    Planting("experts.one_too_many", _counted(1)),
    Planting("experts.weights_on_input", weights_on_input, (WEIGH,)),
    Planting("experts.weights_on_output", _sparse(_weights_on_output, ".experts:in"), (SENT,)),
    Planting("experts.not_weighed", _each_expert(_unweighed), (WEIGH,), variant="outputs"),
    Planting(
        "experts.not_weighed",
        _sparse(_sent_unweighed, ".experts:in"),
        (SENT,),
        variant="inputs",
    ),
    Planting("experts.order", _each_expert(_next_expert), (WEIGH,)),
    Planting("experts.gate_up_exchanged", gate_up_exchanged),
    Planting("experts.shared_lost", _sparse(_without_shared, ".shared_expert:in"), (SENT,)),
    Planting("experts.summed_one_by_one", _each_expert(_one_by_one), (WEIGH, SEVERAL), LOW),
)
PLANTINGS = tuple(replace(one, needs=(EXPERTS, *one.needs)) for one in _PLANTINGS)
