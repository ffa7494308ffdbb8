"""Recipes of what stands between modules, and of what a loader put into them.

Which site is a copy of which, and which is a sum of which, is observed: earlier sites are tried
until one, or two of them added, give the recorded tensor in every bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from portkit.parity.faults.modules import Norm
from portkit.parity.faults.scene import Scene, layer_of
from portkit.parity.judging.ledger import PARAMETER

_NEAR, _FAR = 24, 60
"""How many sites back a copy is looked for, and a sum's terms."""


@dataclass(frozen=True)
class Copy:
    """The same tensor as another site, its heads flattened or its last tokens taken."""

    of: str
    through: Norm | None = None
    """Normalised on the way."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        x, wanted = scene.at(self.of), scene.trace.get(site)
        if x is None or wanted is None:
            return None
        x = _shaped(scene, x, wanted, self.of)
        return x if x is None or self.through is None else self.through.of(scene, x)


def _shaped(scene: Scene, x: Tensor, wanted: Tensor, of: str) -> Tensor | None:
    if x.shape == wanted.shape:
        return x
    if x.numel() == wanted.numel():
        if x.dim() == 3 and wanted.dim() == 4 and wanted.shape[1] != x.shape[1]:
            return scene.heads_first(of, wanted.shape[1])
        return x.reshape(wanted.shape)
    if x.dim() == wanted.dim() == 3 and x.shape[::2] == wanted.shape[::2]:
        return x[:, -wanted.shape[1] :]
    return None


@dataclass(frozen=True)
class Sum:
    """Tensors added from left to right."""

    terms: tuple[str, ...]
    upcast: bool = False
    """Added in float32, cast once."""
    cast: bool = True
    divisor: float = 1.0
    """The sum is divided by it."""
    norm: Norm | None = None
    """The sum is normalised."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        found = [scene.at(one) for one in self.terms]
        total = found[0]
        if total is None or any(one is None or one.numel() != total.numel() for one in found):
            return None
        dtype = total.dtype
        if self.upcast:
            total = total.float()
        for one in found[1:]:
            assert one is not None
            # Experts stand in one row, whatever batch their tokens come from.
            term = one.reshape(total.shape)
            total = total + (term.float() if self.upcast else term)
        if self.divisor != 1.0:
            total = total / self.divisor
        total = total.to(dtype) if self.cast else total
        return total if self.norm is None else self.norm.of(scene, total)


def connections(scene: Scene, site: str) -> Iterator[Copy | Sum]:
    """What a site's tensor could be made of, the nearest first."""
    wanted = scene.trace[site]
    names = list(scene.trace)
    earlier = names[: names.index(site)][::-1][:_NEAR]
    outputs = [one for one in earlier if ":in" not in one]
    for one in (*outputs, *(name for name in earlier if ":in" in name)):
        yield Copy(one)
    # What is added stands side by side in a block, or is what the block was given.
    block = site.removesuffix(":in").rpartition(".")[0] if site.endswith(":in") else site
    alike = [
        one
        for one in names[: names.index(site)][::-1][:_FAR]
        if _as_many(scene.trace[one], wanted)
        and one.removesuffix(":in").rpartition(".")[0] in (block, block.rpartition(".")[0])
    ]
    # Of equal tensors one stands for all: a layer's input is that of its first norm as well.
    different: list[str] = []
    for one in alike[::-1]:
        if not any(torch.equal(scene.trace[one], scene.trace[other]) for other in different):
            different.append(one)
    different.sort(key=lambda one: scene.trace[one].shape != wanted.shape)
    # A layer adds to what it was given: what its inner norms are given is not read by its sum.
    inner = [one for one in different if ":in" not in one or is_layer_input(one)]
    for three in combinations(inner, 3):
        yield Sum(three)
    for first, second in combinations(different, 2):
        yield Sum((first, second))
    if site.endswith(":in"):  # LAuReL adds a branch, and takes the sum down again
        for first, second, third in combinations(different, 3):
            for two in ((second, third), (third, second)):
                yield Sum((first, *two), divisor=math.sqrt(2))


def _as_many(tensor: Tensor, wanted: Tensor) -> bool:
    """Of one shape, but for tokens that stand in one row."""
    return tensor.shape == wanted.shape or (
        tensor.dim() == wanted.dim() - 1
        and tensor.shape[-1] == wanted.shape[-1]
        and tensor.numel() == wanted.numel()
    )


@dataclass(frozen=True)
class Parameter:
    """A parameter as it was loaded; the site is its name."""

    source: str
    transposed: bool = False
    interleaved: int = 0
    """1: rows of rotated halves laid out as neighbours; -1: the other way."""
    head_dim: int = 0
    constant: float | None = None
    drawn: bool = False
    """Values of its own, as before anything was loaded."""
    order: tuple[int, ...] = ()
    """Of a block of experts: whose matrices stand in each one's place."""
    halves: int = 0
    """A dimension along which the two halves are exchanged."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        held = scene.facts.parameter(self.source)
        own = scene.facts.parameter(site.removesuffix(PARAMETER))
        if held is None or own is None or (held.shape != own.shape):
            return None
        if self.constant is not None:
            return torch.full_like(held, self.constant)
        if self.drawn:
            generator = torch.Generator(held.device).manual_seed(0)
            drawn = torch.empty(held.shape[-1], device=held.device)
            drawn.normal_(0, 0.02, generator=generator)
            return drawn.to(held.dtype).expand(held.shape)  # one row for all: it may be large
        return self._moved(held)

    def _moved(self, held: Tensor) -> Tensor:
        """The same values in other places."""
        if self.order:
            return held[list(self.order)]
        if self.halves:
            return torch.cat(held.chunk(2, self.halves)[::-1], self.halves)
        if self.transposed:
            return held.transpose(-1, -2)
        if self.interleaved:
            return _interleaved(held, self.head_dim, self.interleaved)
        return held

    def likeness(self, port: Tensor, reference: Tensor) -> float | None:
        """Of values that nobody can foretell: how little they have to do with the reference's."""
        if not self.drawn or port.shape != reference.shape:
            return None
        a, b = (
            one.reshape(-1, one.shape[-1])[:512].double().flatten() for one in (port, reference)
        )
        a, b = a - a.mean(), b - b.mean()
        scale = float(a.norm() * b.norm())
        return 1.0 - (float(a @ b) / scale) ** 2 if scale else 0.0


def _interleaved(rows: Tensor, head_dim: int, way: int) -> Tensor:
    half = head_dim // 2
    inner = (2, half) if way > 0 else (half, 2)
    return rows.view(-1, *inner, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def parameter_of(scene: Scene, site: str) -> Parameter:
    """A parameter as the reference holds it."""
    return Parameter(site.removesuffix(PARAMETER))


def is_layer_input(site: str) -> bool:
    """Whether a site is what a whole layer is given."""
    layer = layer_of(site)
    return layer is not None and site.endswith(f".{layer}:in")
