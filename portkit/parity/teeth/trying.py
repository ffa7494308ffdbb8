"""How well a recipe reproduces what a port had: the measure by which hypotheses are compared.

Bits where both are in the dtype under test; rows in float64 where nothing else shows a difference.
Knows one site in one pass, and no catalogue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from portkit.parity.faults.recipe import Recipe
from portkit.parity.faults.scene import Scene
from portkit.parity.judging.ledger import picked
from portkit.parity.judging.precision import casts_lifted
from portkit.parity.subject.dims import rows, same_shape

EXPLAINED = 0.9
"""The share of the difference that a cause takes away, at the least."""
_ROUNDING = 4.0
"""Steps of the dtype, relative RMS, within which a recipe has reproduced a tensor."""
NUM_ROWS = 512
"""Of a parameter."""


def of_parameter(edited: Recipe, scene: Scene, site: str, port: Tensor, reference: Tensor) -> float:
    """The share of a parameter's difference that a recipe takes away; at most 1."""
    likeness = getattr(edited, "likeness", lambda *_: None)(port, reference)
    if likeness is not None:
        return float(likeness) - 1e-3 if likeness >= EXPLAINED else 0.0
    made = edited.run(scene, site)
    if made is None or made.shape != port.shape:
        return -math.inf
    if torch.equal(made, port):
        return 1.0
    ours, held, fault = (one[:NUM_ROWS].double() for one in (port, reference, made))
    total = float((ours - held).square().sum())
    return 1 - float((ours - fault).square().sum()) / total if total else -math.inf


@dataclass
class Trying:
    """A port's tensor at a site in one pass, and how well a recipe reproduces it."""

    scene: Scene
    site: str
    port: Tensor
    base: Recipe | None
    exact: bool
    _total: float | None = None

    def _dims(self) -> str:
        dims = self.scene.facts.table.dims(self.site)
        assert dims is not None, f"{self.site} is declared"
        return dims

    @property
    def is_misshapen(self) -> bool:
        """The reference has another shape there."""
        held = None if self.exact else self.scene.trace.get(self.site)
        return held is not None and not same_shape(self._dims(), self.port, held)

    def _run(self, recipe: Recipe) -> Tensor | None:
        if not self.exact:
            return recipe.run(self.scene, self.site)
        with casts_lifted():
            return recipe.run(self.scene.in_float64(), self.site)

    def _rows(self, tensor: Tensor) -> Tensor:
        found = rows(tensor, self._dims(), self.scene.one)
        return picked(found) if self.exact else found

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Rows of port and reference, where they have one shape."""
        held = self.scene.at(self.site)
        if self.exact or held is None:
            held = None if self.base is None else self._run(self.base)
        if held is None:
            return None
        if self.exact:
            return self.port, self._rows(held)
        if not same_shape(self._dims(), self.port, held):
            return None
        return self._rows(self.port), self._rows(held)

    def fitted(self) -> Recipe | None:
        """The recipe with the number that the port must have, where it can be read off."""
        pair, fit = self.pair(), getattr(self.base, "fitted", None)
        scene = self.scene.in_float64() if self.exact else self.scene
        x = scene.at(f"{self.site}:in")
        if fit is None or pair is None or x is None:
            return None
        width = x.shape[-1]
        given = self._rows(x)
        if given.shape != pair[0].shape:
            return None
        made: Recipe | None = fit(*(one.reshape(-1, width) for one in (given, *pair)))
        return made

    def score(self, recipe: Recipe) -> float:
        """The share of the difference that the recipe takes away; at most 1."""
        made = self._run(recipe)
        if made is None:
            return -1.0
        if not self.exact and not (
            same_shape(self._dims(), self.port, made) and made.dtype == self.port.dtype
        ):
            return -1.0
        ours = self.port if self.exact else self._rows(self.port)
        theirs = self._rows(made)
        if ours.shape != theirs.shape:
            return -1.0
        if torch.equal(ours, theirs):
            return 1.0
        if not ours.is_floating_point():
            ours, theirs = ours.double(), theirs.double()
        gap = _size(ours.double() - theirs.double())
        total = self._difference(ours)
        return 1 - gap / total if total and math.isfinite(gap) else -1.0

    @property
    def enough(self) -> float:
        """The share from which on what is left is rounding: nobody looks for a second fault."""
        ours = (self.port if self.exact else self._rows(self.port)).double()
        step = 1e-13 if self.exact else torch.finfo(self.scene.facts.dtype).eps
        total = self._difference(ours)
        left = (_ROUNDING * step) ** 2 * _size(ours)
        return max(EXPLAINED, 1 - left / total) if total else EXPLAINED

    def _difference(self, ours: Tensor) -> float:
        """Of port and reference; of other shapes, or kinds of numbers, a hundredth of the port."""
        if self._total is None:
            pair = self.pair()
            numbers = (self.scene.facts.dtype, torch.float64, torch.bool)
            if pair is None or self.port.dtype not in numbers:
                self._total = _size(ours.double()) / 1e4
            else:
                self._total = _size(pair[0].double() - pair[1].double())
        return self._total


def _size(tensor: Tensor) -> float:
    return float(tensor.square().sum())
