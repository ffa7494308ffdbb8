"""A fault: one known porting mistake, written once, as an edit of what the reference does.

Used three ways: as a mutant that measures a probe, as a hypothesis that explains a difference, and
as the test of the harness itself. Where it applies follows from the recipe that was observed at a
site and from what is public of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from portkit.parity.faults.recipe import Cookbook, Recipe, as_far_as_known
from portkit.parity.faults.rotary import Rotation, Tables
from portkit.parity.faults.scene import Facts, Scene, layer_of


@dataclass(frozen=True)
class Place:
    """Where an edit is tried: a site, and what is known around it."""

    site: str
    book: Cookbook
    scene: Scene

    def recipe(self, site: str) -> Recipe | None:
        """What the reference does at another site."""
        return self.book.recipe(self.scene, site)

    def is_known(self, site: str) -> bool:
        """Whether what the reference does at a site can be told."""
        return site in self.scene.trace or self.book.knows(site)

    @property
    def facts(self) -> Facts:
        return self.book.facts

    @property
    def layer(self) -> int | None:
        return layer_of(self.site)


Edit = Callable[[Any, Place], Iterable[Recipe]]
"""A recipe to what a wrong port would have in its place: one, several to try, or none."""


@dataclass(frozen=True)
class Fault:
    """A mistake that real ports make."""

    id: str
    """`class.mistake`"""
    says: str
    """What the wrong port does, in a porter's words: one clause after "your port"."""
    mend: str
    """What to do about it."""
    edit: Edit
    needs: tuple[str, ...] = ()
    """What a probe must have to show it, in words of `needs.NEEDS`."""
    fits: bool = False
    """A recipe's `fitted` tells the number that the wrong port has."""
    leaves_out: bool = False
    """The wrong port does not call a module at all."""

    @property
    def group(self) -> str:
        """The class of the catalogue."""
        return self.id.partition(".")[0]


R = TypeVar("R")


def on(kind: type[R], edit: Callable[[R, Place], Iterable[Recipe]]) -> Edit:
    """An edit of one kind of recipe; others are left alone."""

    def only(recipe: Any, place: Place) -> Iterable[Recipe]:
        return as_far_as_known(edit(recipe, place)) if isinstance(recipe, kind) else ()

    return only


def either(*edits: Edit) -> Edit:
    """The same mistake where it can be made in several places."""

    def each(recipe: Any, place: Place) -> Iterable[Recipe]:
        for one in edits:
            yield from one(recipe, place)

    return each


def on_tables(edit: Callable[[Tables, Place], Iterable[Recipe]]) -> Edit:
    """An edit of rotary tables, or of queries and keys that are rotated by other tables."""

    def rotated(recipe: Rotation, place: Place) -> Iterable[Recipe]:
        attention = place.facts.attention(place.site)
        own = recipe.tables or place.recipe(f"{attention}:in.cos")
        if isinstance(own, Tables) and recipe.turns:
            for one in edit(own, place):
                assert isinstance(one, Tables)
                yield replace(recipe, tables=one)

    return either(on(Tables, edit), on(Rotation, rotated))
