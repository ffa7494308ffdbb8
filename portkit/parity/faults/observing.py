"""Which recipes a site could have, by what stands there: a module's kind, a functional point.

The one place that turns a site's name into recipes. A family's new piece joins here: its sites, and
the recipes that are tried for them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from portkit.parity.faults import (
    attending,
    choosing,
    modules,
    rotary,
    sharing,
    streaming,
    wiring,
)
from portkit.parity.faults.recipe import Recipe
from portkit.parity.faults.scene import Scene
from portkit.parity.judging.ledger import PARAMETER
from portkit.parity.sides.sites import AGAIN, LOGITS


def candidates(scene: Scene, site: str) -> Iterator[Recipe]:
    """The recipes that a site could have, the likelier first."""
    if site.endswith(PARAMETER):
        yield wiring.parameter_of(scene, site)
    elif site == LOGITS:
        yield modules.logits(scene.facts.config)
    elif "#" in site:
        yield from _functional(scene, site)
    elif site.endswith((":in.cos", ":in.sin")):
        yield from _given_tables(scene, site)
    elif site in scene.trace:
        yield from _of_module(scene, site)


def is_shown_by_parameters(scene: Scene, site: str) -> bool:
    """Whether there is nothing to mistake at a site that its parameters would not show."""
    module = scene.facts.modules.get(site)
    return (
        isinstance(module, nn.Linear)
        and f"{site}.bias" not in scene.facts.parameters
        and module.in_features != module.out_features
    )


def _functional(scene: Scene, site: str) -> Iterator[Recipe]:
    role = site.partition("#")[2]
    if role.startswith(("cos", "sin")):
        yield from rotary.tables(scene, role.partition(".")[2])
    elif role in {"query", "key"}:
        yield from rotary.rotations(scene, site)
        yield from sharing.shared(scene, site)
    elif role == "value":
        attention = scene.facts.attention(site)
        for source in (f"{attention}.v_norm", f"{attention}.v_proj"):
            if source in scene.trace:
                yield rotary.Heads(source, scene.given(site).shape[1])
        yield from sharing.shared(scene, site)
    elif role == "mask":
        yield from attending.masks(scene, site)
    elif role == "experts":
        yield from choosing.choices(scene, site)
    elif role == "context":
        yield from attending.kernels(scene, site)
    else:
        yield from streaming.streams(scene, site)


def _given_tables(scene: Scene, site: str) -> Iterator[Recipe]:
    """A layer is given the tables of one of the layer types: which, is seen."""
    wanted, role = scene.trace[site], site[-3:]
    for name, made in scene.trace.items():
        if f"#{role}" in name and torch.equal(made, wanted):
            yield from rotary.tables(scene, name.partition(f"#{role}")[2].lstrip("."))


def _of_module(scene: Scene, site: str) -> Iterator[Recipe]:
    module = scene.facts.modules.get(site.partition(AGAIN)[0]) if ":" not in site else None
    yield from streaming.streams(scene, site)
    yield from choosing.mixtures(scene, site)
    if module is None:  # an input
        if site.endswith(".down_proj:in"):
            yield from modules.products(scene, site)
        if ".qk_norm" in site:
            yield from rotary.rotations(scene, site)
        yield from wiring.connections(scene, site)
    elif choosing.is_router(scene, site) or site.endswith("_coefs"):
        yield modules.Linear(f"{site}.weight", None)
    elif isinstance(module, nn.Linear):
        if not is_shown_by_parameters(scene, site):
            bias = f"{site}.bias" if f"{site}.bias" in scene.facts.parameters else None
            yield modules.Linear(f"{site}.weight", bias)
    elif isinstance(module, nn.Embedding):
        yield from modules.embeddings(scene, site, module)
    elif isinstance(module, nn.LayerNorm):
        yield modules.layer_norm(scene, site, module)
    elif "norm" in site.rpartition(".")[2]:
        yield from modules.norms(scene, site, module)
    else:
        yield from wiring.connections(scene, site)
