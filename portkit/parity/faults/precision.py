"""Faults of care: the right function, with an upcast left out or one too many.

In float32 most of them change nothing, and are not applicable there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from portkit.parity.faults.attending import Kernel
from portkit.parity.faults.fault import Edit, Fault, Place, on
from portkit.parity.faults.modules import Norm, Product
from portkit.parity.faults.norms import is_final
from portkit.parity.faults.rotary import Rotation
from portkit.parity.faults.wiring import Sum


def _not_upcast(final: bool) -> Edit:
    def edit(norm: Norm, place: Place) -> Iterable[Norm]:
        applies = norm.upcast and is_final(place.site) == final
        return (replace(norm, upcast=False),) if applies else ()

    return on(Norm, edit)


def _wide_residual(total: Sum, place: Place) -> Iterator[Sum]:
    """In float32 from the layer's input to its output, or handed on in float32."""
    if len(total.terms) > 2:
        yield replace(total, upcast=True)
    yield replace(total, upcast=True, cast=False)


def _in_parts(**changes: Any) -> Edit:
    """Of the kernel that is computed from its parts, where float32 is another dtype."""

    def edit(kernel: Kernel, place: Place) -> Iterable[Kernel]:
        applies = kernel.kernel == "eager" and place.facts.dtype != torch.float32
        return (replace(kernel, **changes),) if applies else ()

    return on(Kernel, edit)


FAULTS = (
    Fault(
        "precision.norm_not_upcast",
        "computes this norm in the model's dtype",
        "upcast to float32 before squaring, and cast back after the root",
        _not_upcast(final=False),
    ),
    Fault(
        "precision.final_norm_not_upcast",
        "computes the final norm in the model's dtype",
        "upcast to float32 before squaring, and cast back after the root",
        _not_upcast(final=True),
    ),
    Fault(
        "precision.rotation_upcast",
        "rotates in float32 and casts once, where this family rotates in the model's dtype",
        "leave query, key, cos and sin in the model's dtype",
        on(Rotation, lambda r, _: () if r.upcast else (replace(r, upcast=True),)),
    ),
    Fault(
        "precision.rotation_not_upcast",
        "rotates in the model's dtype where this family rotates in float32 and casts once",
        "upcast query and key, rotate, and cast back",
        on(Rotation, lambda r, _: (replace(r, upcast=False),) if r.upcast else ()),
    ),
    Fault(
        "precision.residual_upcast",
        "keeps the residual stream in float32 within a layer",
        "add in the model's dtype, at every block",
        on(Sum, _wide_residual),
    ),
    Fault(
        "precision.mlp_product_upcast",
        "multiplies act(gate) and up in float32",
        "activate and multiply in the model's dtype",
        on(Product, lambda p, _: (replace(p, upcast=True),)),
    ),
    Fault(
        "attention.softmax_in_dtype",
        "computes each step of the softmax in the model's dtype",
        "upcast the scores to float32 for the softmax, and cast the weights back",
        _in_parts(low_softmax=True),
    ),
    Fault(
        "precision.scores_upcast",
        "multiplies query and key in float32",
        "multiply them in the model's dtype",
        _in_parts(wide_scores=True),
    ),
    Fault(
        "precision.softmax_weights_upcast",
        "keeps the softmax's weights in float32 for the product with the values",
        "cast the weights back before they meet the values",
        _in_parts(wide_weights=True),
    ),
)
