"""Experts in the form that takes float64, where a model has several: Transformers' grouped kernel
refuses it. Knows the two methods by which such a model is asked, wherever it stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_PLAIN = "eager"


def form_of_experts(model: nn.Module) -> str | None:
    """The form in which experts run, in the model's own word; None where there is one alone."""
    named = _choosable(model)
    return None if named is None else _form(named)


@contextmanager
def plain_experts(model: nn.Module | None) -> Iterator[None]:
    """Run the experts of a model, or of one that it holds, one after the other."""
    holder = None if model is None else _choosable(model)
    before = None if holder is None else _form(holder)
    if holder is None or before is None:
        yield
        return
    try:
        holder.set_experts_implementation(_PLAIN)
    except ValueError:  # it has one form, and says so
        yield
        return
    try:
        yield
    finally:
        holder.set_experts_implementation(before)


def _choosable(model: nn.Module) -> Any:
    methods = ("get_experts_implementation", "set_experts_implementation")
    return next((m for m in model.modules() if all(hasattr(m, one) for one in methods)), None)


def _form(model: Any) -> str | None:
    named = model.get_experts_implementation()
    found = named.get("") if isinstance(named, dict) else named
    return found if isinstance(found, str) else None
