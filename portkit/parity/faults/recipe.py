"""Recipes: how the reference comes to what it has at a site, as data that a fault can edit.

A recipe computes a site's tensor from what was recorded before it. It is believed only where it
reproduces the reference in every bit; so what a model does (an offset in its norms, the form of its
rotation, its activation) is observed, and never looked up by a family's name. A fault is an edit of
a recipe, and two faults that meet are two edits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from portkit.parity.faults.scene import Facts, Scene
from portkit.parity.judging.ledger import difference
from portkit.parity.subject.dims import same_shape


class Recipe(Protocol):
    """A frozen dataclass whose fields are what a port could get wrong."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        """What a port of this recipe has at the site; None: this pass cannot tell."""
        ...


Candidates = Callable[[Scene, str], Iterable[Recipe]]
"""The recipes that a site could have, the likelier first."""


class Cookbook:
    """The recipes of a reference's sites, observed once and kept."""

    def __init__(self, facts: Facts, candidates: Candidates) -> None:
        self.facts, self._candidates = facts, candidates
        self._known: dict[str, Recipe | None] = {}

    def knows(self, site: str) -> bool:
        """Whether a site was observed before."""
        return site in self._known

    def recipe(self, scene: Scene, site: str) -> Recipe | None:
        """The first candidate that gives the recorded tensor in every bit."""
        if site not in self._known and not scene.exact:
            found = (x for x in self._candidates(scene, site) if reproduces(x, scene, site))
            self._known[site] = next(as_far_as_known(found), None)
        return self._known.get(site)


T = TypeVar("T")


def as_far_as_known(tried: Iterable[T]) -> Iterator[T]:
    """What is tried, up to where it asks a model for something that this one does not have.

    The catalogue is written of what models have in common; of one that is made otherwise it knows
    less, and that is no reason for a proof to end.
    """
    with suppress(AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        yield from tried


def reproduces(recipe: Recipe, scene: Scene, site: str) -> bool:
    """Whether a recipe gives what was recorded at the real tokens."""
    try:
        made, recorded = recipe.run(scene, site), scene.at(site)
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError):
        return False  # what cannot be computed of these tensors is not what stands there
    if made is None:
        return False
    if recorded is None:
        return True  # a parameter
    return same(scene, site, made, recorded)


def same(scene: Scene, site: str, made: Tensor, recorded: Tensor) -> bool:
    """Equal in every bit at the real tokens."""
    dims = scene.facts.table.dims(site)
    if dims is None:
        return made.dtype == recorded.dtype and torch.equal(made, recorded)
    if not same_shape(dims, made, recorded) or made.dtype != recorded.dtype:
        return False
    return difference(scene.one, dims, made, recorded) is None
