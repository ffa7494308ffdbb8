"""General tests of a difference that no known fault explains: what it looks like.

A scale, a constant, a permutation of channels, a few channels, some tokens only. Knows rows of
port and reference, and how their pass was fed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from portkit.parity.faults.scene import Scene
from portkit.parity.probes.probe import Pass

_ALMOST_ALL = 0.999
_FEW = 0.05


@dataclass
class Tendencies:
    """What all passes have in common, each test as a phrase."""

    _found: list[set[str]] = field(default_factory=list)
    _fed: list[str] = field(default_factory=list)

    def add(self, one: Pass, scene: Scene, pair: tuple[Tensor, Tensor] | None) -> None:
        """A pass in which a site differs; rows are its real tokens, if they have one shape."""
        self._fed.append(
            "decode" if scene.past and one.num_tokens == 1 else "chunk" if scene.past else "prompt"
        )
        if pair is None or not pair[0].is_floating_point():
            self._found.append({"its shape is another"} if pair is None else set())
            return
        ours, theirs = (each.double() for each in pair)
        self._found.append({*_of_values(ours, theirs), *_of_tokens(one, ours != theirs)})

    def add_parameter(self, port: Tensor, reference: Tensor) -> None:
        """A parameter that holds other values, (rows, …)."""
        ours, theirs = (each.double().reshape(len(each), -1) for each in (port, reference))
        self._found.append(set(_of_values(ours, theirs)))

    def told(self) -> tuple[str, ...]:
        """The phrases that hold in every pass that was looked at."""
        if not self._found:
            return ()
        common = set.intersection(*self._found)
        if set(self._fed) == {"decode"}:
            common.add("only in decode steps")
        elif self._fed and "prompt" not in self._fed:
            common.add("only in passes that go on from another")
        return tuple(sorted(common))


def _of_values(ours: Tensor, theirs: Tensor) -> list[str]:
    gap = ours - theirs
    total = float(gap.square().sum())
    if not total or not bool(torch.isfinite(gap).all()):
        return [] if total == 0 else ["values that are not finite"]
    found = []
    scale = float((ours * theirs).sum() / theirs.square().sum().clamp(min=1e-300))
    if 1 - float((ours - scale * theirs).square().sum()) / total > _ALMOST_ALL:
        found.append(f"the reference's values times {scale:.4g}")
    constant = float(gap.mean())
    if 1 - float((gap - constant).square().sum()) / total > _ALMOST_ALL:
        found.append(f"the reference's values plus {constant:.4g}")
    if torch.equal(ours.sort(-1).values, theirs.sort(-1).values):
        found.append("the reference's channels in another order")
    elif torch.equal(ours, -theirs):
        found.append("the reference's values with the other sign")
    channels = (gap != 0).any(0)
    if int(channels.sum()) <= max(1, _FEW * len(channels)):
        places = channels.nonzero().flatten().tolist()
        named = ", ".join(map(str, places[:4])) + (", …" if len(places) > 4 else "")
        found.append(f"only in channels {named}" if len(places) > 1 else f"only in channel {named}")
    return found


def _of_tokens(one: Pass, unequal: Tensor) -> list[str]:
    """Which tokens differ, of a site with a row for each new real token."""
    where = one.real.nonzero()
    if len(where) != len(unequal) or one.num_tokens == 1:
        return []
    wrong = unequal.flatten(1).any(1)
    if bool(wrong.all()) or not bool(wrong.any()):
        return []
    batch = set(where[wrong][:, 0].tolist())
    padded = [row for row in range(len(one.input_ids)) if not bool(one.real[row].all())]
    if padded and batch <= set(padded):
        return ["only in padded rows"]
    columns = where[:, 1]
    start = int(columns[wrong].min())
    if start and bool(wrong[columns >= start].all()):
        return [f"only from position {start} on"]
    return ["only at some positions"]
