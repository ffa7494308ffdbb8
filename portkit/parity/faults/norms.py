"""Faults of norms: their formula, and which tensor they are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from portkit.parity.faults.fault import Edit, Fault, Place, either, on
from portkit.parity.faults.modules import LayerNorm, Norm
from portkit.parity.faults.recipe import Recipe
from portkit.parity.faults.scene import layer_of
from portkit.parity.faults.wiring import Copy, Sum

_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3)
_HEADS = (".q_norm", ".k_norm", ".v_norm")
SUBLAYERS = (".self_attn", ".mlp", ".feed_forward")


def _edit(**changes: object) -> Edit:
    def edit(norm: Norm, place: Place) -> Iterable[Recipe]:
        changed = replace(norm, **changes)  # type: ignore[arg-type]
        return () if changed == norm else (changed,)

    return on(Norm, edit)


def _epsilons(norm: Norm | LayerNorm, place: Place) -> Iterator[Recipe]:
    for eps in _EPSILONS:
        if eps != norm.eps:
            yield replace(norm, eps=eps)


def _mean_kept(norm: Norm | LayerNorm, place: Place) -> Iterable[Recipe]:
    return (replace(norm, centred=False),) if norm.centred else ()


def _cast_first(norm: Norm, place: Place) -> Iterable[Norm]:
    weightless = norm.weight is None
    return () if norm.casts_first or weightless else (replace(norm, casts_first=True),)


def _is_norm(place: Place, site: str) -> bool:
    return isinstance(place.recipe(site), Norm)


def is_inner(site: str) -> bool:
    """A norm that is neither of heads, nor the final one."""
    return not is_final(site) and not site.endswith(_HEADS)


def is_final(site: str) -> bool:
    """The norm behind all layers, or what it is given."""
    return layer_of(site) is None and site.partition(":")[0].rpartition(".")[2] == "norm"


def left_out(copy: Copy, place: Place) -> Iterator[Copy]:
    """What reads a norm reads what the norm was to normalise."""
    if _is_norm(place, copy.of) and is_inner(copy.of):
        yield replace(copy, of=f"{copy.of}:in")


def _left_out_of_sum(total: Sum, place: Place) -> Iterator[Sum]:
    for number, term in enumerate(total.terms):
        if _is_norm(place, term):
            yield _with(total, number, f"{term}:in")


def _with(total: Sum, number: int, term: str) -> Sum:
    terms = [*total.terms]
    terms[number] = term
    return replace(total, terms=tuple(terms))


def _missing_itself(norm: Norm, place: Place) -> Iterable[Norm]:
    return (replace(norm, missing=True),) if is_inner(place.site) else ()


def _siblings(place: Place, norm: str) -> Iterator[str]:
    """The other norms of a layer that normalise as many channels."""
    held = place.facts.parameters.get(f"{norm}.weight")
    for name in place.facts.modules:
        other = place.facts.parameters.get(f"{name}.weight")
        if (
            name != norm
            and layer_of(name) == layer_of(norm) is not None
            and "norm" in name.rpartition(".")[2]
            and held is not None
            and other is not None
            and other.shape == held.shape
        ):
            yield name


def _other_weight(norm: Norm, place: Place) -> Iterator[Norm]:
    if is_inner(place.site):
        for name in _siblings(place, place.site):
            yield replace(norm, weight=f"{name}.weight")


def _exchanged_copy(copy: Copy, place: Place) -> Iterator[Recipe]:
    """Either norm called in the other's place: what it is given, and who reads it."""
    if _is_norm(place, copy.of) and is_inner(copy.of):
        for name in _siblings(place, copy.of):
            yield replace(copy, of=name)
    site = place.site.removesuffix(":in")
    if site != place.site and _is_norm(place, site) and is_inner(site):
        for name in _siblings(place, site):
            yield Copy(f"{name}:in")


def _exchanged_sum(total: Sum, place: Place) -> Iterator[Sum]:
    for number, term in enumerate(total.terms):
        if _is_norm(place, term):
            for name in _siblings(place, term):
                yield _with(total, number, name)


def _sums(place: Place, layer: str) -> Iterator[Sum]:
    """The sums that a layer's norms are given, and the one that it gives."""
    names = (f"{one}:in" for one in place.facts.modules if _is_norm_of(one, layer))
    for site in (*names, layer):
        total = place.recipe(site) if site in place.scene.trace else None
        if isinstance(total, Sum):
            yield total


def _is_norm_of(name: str, layer: str) -> bool:
    within, _, norm = name.rpartition(".")
    return within == layer and "norm" in norm


def _post_for_pre_copy(copy: Copy, place: Place) -> Iterator[Sum]:
    """Who reads a norm of a sum reads the sum of what was added, normalised, and the stream."""
    total = place.recipe(f"{copy.of}:in") if _is_norm(place, copy.of) else None
    if isinstance(total, Sum) and total.terms[-1].endswith(SUBLAYERS) and is_inner(copy.of):
        yield replace(total, terms=(*total.terms[:-1], copy.of))


def _post_for_pre_sum(total: Sum, place: Place) -> Iterator[Recipe]:
    """A norm of a sum is given what is added alone; the stream gets what it makes of that."""
    norm = place.site.removesuffix(":in")
    if norm != place.site:
        if _is_norm(place, norm) and is_inner(norm) and total.terms[-1].endswith(SUBLAYERS):
            yield Copy(total.terms[-1])
        return
    for name in place.facts.modules:
        inner = place.recipe(f"{name}:in") if _is_norm_of(name, place.site) else None
        if isinstance(inner, Sum) and inner.terms[-1] in total.terms:
            yield _with(total, total.terms.index(inner.terms[-1]), name)


def _pre_for_post(copy: Copy, place: Place) -> Iterator[Recipe]:
    """A norm of a block's input that is given its output, or the reverse."""
    norm = place.site.removesuffix(":in")
    if norm == place.site or not _is_norm(place, norm) or not is_inner(norm):
        return
    block = norm.rpartition(".")[0]
    if copy.of.endswith(SUBLAYERS):
        yield replace(copy, of=f"{copy.of}:in")
        yield replace(copy, of=f"{block}:in")
        for total in _sums(place, block):
            if norm in total.terms:  # which it would normalise with the block's output added
                yield Sum((*total.terms[: total.terms.index(norm)], copy.of))
        return
    for part in SUBLAYERS:
        own = place.recipe(f"{block}{part}:in") if f"{block}{part}" in place.facts.modules else None
        if isinstance(own, Copy) and own.of == norm:
            yield replace(copy, of=f"{block}{part}")


FAULTS = (
    Fault(
        "norm.epsilon",
        "has another epsilon in this norm",
        "read it of the config, as `rms_norm_eps`, and take no default",
        either(on(Norm, _epsilons), on(LayerNorm, _epsilons)),
        fits=True,
    ),
    Fault(
        "norm.epsilon_outside_root",
        "adds epsilon to the root and not under it",
        "x * rsqrt(mean(x ** 2) + eps)",
        _edit(eps_outside=True),
    ),
    Fault(
        "norm.offset_missing",
        "multiplies by `weight` where this family multiplies by `1 + weight`",
        "add 1 to the weight, in float32",
        on(Norm, lambda n, _: (replace(n, offset=0.0),) if n.offset else ()),
    ),
    Fault(
        "norm.offset_added",
        "multiplies by `1 + weight` where this family multiplies by `weight`",
        "leave the 1 out",
        on(Norm, lambda n, _: () if n.offset else (replace(n, offset=1.0),)),
    ),
    Fault(
        "norm.offset_rounded",
        "rounds `1 + weight` to the model's dtype",
        "add 1 to the weight in float32",
        on(Norm, lambda n, _: (replace(n, rounded_offset=True),) if n.offset else ()),
    ),
    Fault(
        "norm.weight_before_cast",
        "multiplies the weight in float32 and casts last, where this family casts first",
        "cast back to the model's dtype, then multiply by the weight",
        on(Norm, lambda n, _: (replace(n, casts_first=False),) if n.casts_first else ()),
    ),
    Fault(
        "norm.cast_before_weight",
        "casts before it multiplies the weight, where this family multiplies in float32",
        "multiply by the weight in float32, and cast last",
        on(Norm, _cast_first),
    ),
    Fault(
        "norm.mean_subtracted",
        "subtracts the mean, as LayerNorm does",
        "this is an RMSNorm: divide by the root of the mean square alone",
        on(Norm, lambda n, _: () if n.centred else (replace(n, centred=True),)),
    ),
    Fault(
        "norm.mean_kept",
        "does not subtract the mean, as an RMSNorm does not",
        "this is a LayerNorm: subtract the mean, then divide by the deviation",
        either(on(Norm, _mean_kept), on(LayerNorm, _mean_kept)),
    ),
    Fault(
        "norm.missing",
        "leaves this norm out",
        "call it",
        either(on(Norm, _missing_itself), on(Copy, left_out), on(Sum, _left_out_of_sum)),
        leaves_out=True,
    ),
    Fault(
        "norm.exchanged",
        "calls another norm of the layer in this one's place",
        "exchange the two",
        either(on(Norm, _other_weight), on(Copy, _exchanged_copy), on(Sum, _exchanged_sum)),
    ),
    Fault(
        "norm.pre_for_post",
        "normalises a block's input where this family normalises its output, or the reverse",
        "move the norm to the other side of the block",
        either(
            on(Copy, _pre_for_post),
            on(Sum, _post_for_pre_sum),
            on(Copy, _post_for_pre_copy),
        ),
        leaves_out=True,
    ),
    Fault(
        "norm.sum_for_mean",
        "divides by the root of the sum of squares and not of their mean",
        "take the mean over the channels",
        _edit(summed=True),
    ),
)
