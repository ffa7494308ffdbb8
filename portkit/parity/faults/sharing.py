"""Recipes of keys and values that a layer has not of its own, and sees as an earlier one had them.

Which layer shows them is observed: the nearest earlier one that has these very values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from portkit.parity.faults.modules import Norm
from portkit.parity.faults.rotary import Rotation, recorded_tables
from portkit.parity.faults.scene import Scene


@dataclass(frozen=True)
class Shared:
    """All keys or values that another layer's attention was shown in the same pass."""

    of: str
    """`model.layers.3.self_attn#key`"""
    own: bool = False
    """That layer's matrices alone are shared: what they are given is this layer's own."""
    norm: Norm | None = None
    """Of heads, where its own are made."""
    rotation: Rotation | None = None

    def run(self, scene: Scene, site: str) -> Tensor | None:
        shown = scene.at(self.of)
        if shown is None or not self.own:
            return shown
        attention, source = scene.facts.attention(site), scene.facts.attention(self.of)
        letter = "k" if site.endswith("#key") else "v"
        x, weight = (
            scene.at(f"{attention}:in"),
            scene.parameter(f"{source}.{letter}_proj.weight"),
        )
        if x is None or weight is None or scene.past:
            return None  # what was held of its own nobody recorded
        bias = scene.parameter(f"{source}.{letter}_proj.bias")
        made = F.linear(x, weight, bias).view(*x.shape[:2], shown.shape[1], -1).transpose(1, 2)
        normed = made if self.norm is None else self.norm.of(scene, made)
        tables = recorded_tables(scene, site)
        if normed is None or self.rotation is None or tables is None:
            return normed
        return self.rotation.rotated(normed, *tables)


def shared(scene: Scene, site: str) -> Iterator[Shared]:
    """The earlier layers that a layer without keys of its own may see, the nearest first."""
    attention, role = scene.facts.attention(site), site.partition("#")[2]
    if role == "query" or f"{attention}.k_proj" in scene.trace:
        return
    for source in owners(scene, site)[::-1]:
        yield Shared(f"{source}#{role}")


def owners(scene: Scene, site: str) -> list[str]:
    """The earlier layers that have keys and values of their own."""
    names = scene.facts.attentions
    earlier = names[: names.index(scene.facts.attention(site))]
    return [one for one in earlier if f"{one}.k_proj" in scene.trace]
