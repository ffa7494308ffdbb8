"""Faults of a loader: the right arithmetic on tensors that are in the wrong place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from portkit.parity.faults.fault import Edit, Fault, Place, either, on
from portkit.parity.faults.modules import Linear
from portkit.parity.faults.recipe import Recipe
from portkit.parity.faults.scene import in_layer, layer_of
from portkit.parity.faults.wiring import Parameter

_NORM = re.compile(r"(.*\.)?\w*norm\.weight$")


def _other(parameter: Parameter, place: Place, name: str) -> Iterator[Parameter]:
    """Another parameter's values, where there is one of that shape and other values."""
    held, own = (place.facts.parameter(one) for one in (name, parameter.source))
    if name == parameter.source or held is None or own is None or held.shape != own.shape:
        return
    yield replace(parameter, source=name)


def _shape(place: Place, name: str) -> tuple[int, ...]:
    held = place.facts.parameter(name)
    return () if held is None else tuple(held.shape)


def _swapped(one: str, other: str) -> Edit:
    def edit(parameter: Parameter, place: Place) -> Iterator[Parameter]:
        for a, b in ((one, other), (other, one)):
            if a in parameter.source:
                yield from _other(parameter, place, parameter.source.replace(a, b))

    return on(Parameter, edit)


def _layers(place: Place) -> list[int]:
    return sorted({n for one in place.facts.attentions if (n := layer_of(one)) is not None})


def _from_layer(choose: Callable[[int, list[int]], Iterable[int]]) -> Edit:
    def edit(parameter: Parameter, place: Place) -> Iterator[Parameter]:
        own = layer_of(parameter.source)
        for layer in () if own is None else choose(own, _layers(place)):
            yield from _other(parameter, place, in_layer(parameter.source, layer))

    return on(Parameter, edit)


def _neighbours(own: int, layers: list[int]) -> Iterator[int]:
    yield from (one for one in (own + 1, own - 1) if one in layers)


def _lexicographic(own: int, layers: list[int]) -> Iterator[int]:
    if len(layers) > 10:
        yield sorted(layers, key=str)[own]


def _transposed(parameter: Parameter, place: Place) -> Iterator[Parameter]:
    shape = _shape(place, parameter.source)
    if len(shape) in (2, 3) and shape[-2] == shape[-1]:
        yield replace(parameter, transposed=True)


def _norms_swapped(parameter: Parameter, place: Place) -> Iterator[Parameter]:
    own = layer_of(parameter.source)
    if own is None or not _NORM.match(parameter.source):
        return
    for name in place.facts.parameters:
        if layer_of(name) == own and _NORM.match(name):
            yield from _other(parameter, place, name)


def _interleaved(parameter: Parameter, place: Place) -> Iterator[Parameter]:
    if re.search(r"self_attn\.[qk]_proj\.(weight|bias)$", parameter.source):
        head_dim = getattr(place.facts.modules[place.facts.attentions[0]], "head_dim", 0)
        if head_dim:
            for way in (1, -1):
                yield replace(parameter, interleaved=way, head_dim=head_dim)


def _tie(tied: bool) -> Edit:
    def edit(parameter: Parameter, place: Place) -> Iterator[Parameter]:
        if parameter.source != "lm_head.weight":
            return
        if bool(getattr(place.facts.config, "tie_word_embeddings", False)) != tied:
            return
        if tied:
            yield replace(parameter, drawn=True)
        else:
            yield from _other(parameter, place, "model.embed_tokens.weight")

    return on(Parameter, edit)


def _initial_norm(parameter: Parameter, place: Place) -> Iterator[Parameter]:
    if _NORM.match(parameter.source):
        yield from (replace(parameter, constant=one) for one in (1.0, 0.0))


def _initial_matrix(parameter: Parameter, place: Place) -> Iterator[Parameter]:
    if len(_shape(place, parameter.source)) > 1:
        yield replace(parameter, drawn=True)


def _bias_zero(parameter: Parameter, place: Place) -> Iterator[Parameter]:
    if parameter.source.endswith(".bias"):
        yield replace(parameter, constant=0.0)


def _bias_left_out(linear: Linear, place: Place) -> Iterable[Recipe]:
    return () if linear.bias is None else (replace(linear, bias=None),)


def _linear_transposed(linear: Linear, place: Place) -> Iterable[Recipe]:
    shape = _shape(place, linear.weight)
    return (replace(linear, transposed=True),) if shape[0] == shape[1] else ()


def _halves_exchanged(parameter: Parameter, place: Place) -> Iterator[Parameter]:
    """Of a block of experts, gate and up of which lie side by side."""
    if parameter.source.endswith("gate_up_proj"):
        shape, hidden_size = _shape(place, parameter.source), place.facts.config.hidden_size
        yield from (replace(parameter, halves=d) for d in (1, 2) if shape[3 - d] == hidden_size)


def _other_experts(parameter: Parameter, place: Place) -> Iterator[Parameter]:
    """Another expert's matrix, or a block in another order."""
    place_of = re.fullmatch(r"(.+\.experts\.\w+_proj)\.(\d+)", parameter.source)
    count = _num_experts(place, parameter.source)
    if count < 2:
        return
    orders = (
        (*range(1, count), 0),
        (count - 1, *range(count - 1)),
        tuple(sorted(range(count), key=str)),
        tuple(range(count))[::-1],
        (1, 0, *range(2, count)),
    )
    for order in dict.fromkeys(orders):
        if order == tuple(range(count)):
            continue
        if place_of is None:
            yield replace(parameter, order=order)
        elif order[int(place_of[2])] != int(place_of[2]):
            yield from _other(parameter, place, f"{place_of[1]}.{order[int(place_of[2])]}")


def _num_experts(place: Place, name: str) -> int:
    """Of the block that a parameter is or is a part of; 0: none."""
    block = re.match(r"(.+\.experts)\.\w+_proj", name)
    shape = () if block is None else _shape(place, f"{block[1]}.down_proj")
    return shape[0] if len(shape) == 3 else 0


FAULTS = (
    Fault(
        "loader.q_k_swapped",
        "loads `q_proj` where `k_proj` belongs, and the reverse",
        "exchange the two rules of the weight map",
        _swapped("q_proj", "k_proj"),
    ),
    Fault(
        "loader.k_v_swapped",
        "loads `k_proj` where `v_proj` belongs, and the reverse",
        "exchange the two rules of the weight map",
        _swapped("k_proj", "v_proj"),
    ),
    Fault(
        "loader.gate_up_swapped",
        "loads `gate_proj` where `up_proj` belongs, and the reverse",
        "exchange the two; of a fused matrix the gate's rows come first here",
        either(_swapped("gate_proj", "up_proj"), on(Parameter, _halves_exchanged)),
    ),
    Fault(
        "loader.square_transposed",
        "holds this matrix transposed, which a square one does not complain of",
        "load it as (out, in), or transpose where the other format stores (in, out)",
        either(on(Parameter, _transposed), on(Linear, _linear_transposed)),
    ),
    Fault(
        "loader.norms_swapped",
        "holds another norm's weight of the same layer",
        "look at which name of the checkpoint each norm of a layer is loaded from",
        on(Parameter, _norms_swapped),
    ),
    Fault(
        "loader.neighbouring_layers",
        "holds the neighbouring layer's tensor",
        "look for an off-by-one in the layer's number, or two layers that are exchanged",
        _from_layer(_neighbours),
    ),
    Fault(
        "loader.lexicographic_layers",
        "takes the layers in the order of their names as words: 0, 1, 10, 11, 2",
        "sort layers by their number",
        _from_layer(_lexicographic),
    ),
    Fault(
        "loader.layer_zero_everywhere",
        "holds layer 0's tensor in every layer",
        "fill in the layer's number when the checkpoint's name is made",
        _from_layer(lambda own, layers: layers[:1]),
    ),
    Fault(
        "loader.qk_rows_interleaved",
        "holds the rows of q and k in the other rotary layout, pairs side by side or in halves",
        "permute the rows of each head between (pairs, 2) and (2, pairs), or rotate the other way",
        on(Parameter, _interleaved),
    ),
    Fault(
        "loader.experts_order",
        "holds the matrices of another expert",
        "stack experts in the order of their numbers: 10 comes behind 9, and not behind 1",
        on(Parameter, _other_experts),
    ),
    Fault(
        "loader.tie_ignored",
        "has a head of its own where the head is the embedding",
        "honour `tie_word_embeddings`: let the head's weight be the embedding's",
        _tie(tied=True),
    ),
    Fault(
        "loader.tied_although_untied",
        "uses the embedding as head although the checkpoint has its own",
        "load `lm_head.weight` where `tie_word_embeddings` is false",
        _tie(tied=False),
    ),
    Fault(
        "loader.norm_at_initial_value",
        "has a norm whose weight was never loaded",
        "add the missing rule; an unclaimed parameter should be an error",
        on(Parameter, _initial_norm),
    ),
    Fault(
        "loader.matrix_at_initial_value",
        "has a matrix whose values have nothing to do with the checkpoint's",
        "add the missing rule; an unclaimed parameter should be an error",
        on(Parameter, _initial_matrix),
    ),
    Fault(
        "loader.bias_lost",
        "leaves out a bias that the checkpoint has",
        "give the linear map its bias and load it",
        either(on(Parameter, _bias_zero), on(Linear, _bias_left_out)),
    ),
)
