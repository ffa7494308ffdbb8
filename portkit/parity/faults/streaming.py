"""Recipes of a residual stream that is several, and of vectors that each layer has for each token.

AltUp (Baykal et al. 2023, arXiv:2301.13310) predicts all streams before a layer and corrects them
behind it; streams are (streams, batch, tokens, hidden_size). Which is the active one is the
config's, and observed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from portkit.parity.faults.modules import ACTIVATIONS
from portkit.parity.faults.recipe import Recipe
from portkit.parity.faults.scene import Facts, Scene, layer_of
from portkit.parity.faults.wiring import is_layer_input

ROUTER_NORM = "altup.router_norm"


def is_laurel(site: str) -> bool:
    """The low-rank branch beside attention (Menghani et al. 2024, arXiv:2411.07501)."""
    return site.endswith(".laurel")


def constant(scene: Scene, value: float) -> Tensor:
    """A number that is held in the model's dtype, also where the truth is asked for."""
    with _disable_current_modes():
        held = torch.tensor(value, dtype=scene.facts.dtype)
    return scene.upcast(held)


@dataclass(frozen=True)
class Scaled:
    """Another site times a number that is held in the model's dtype."""

    of: str
    scale: float

    def run(self, scene: Scene, site: str) -> Tensor | None:
        x, wanted = scene.at(self.of), scene.trace.get(site)
        if x is None or wanted is None or x.numel() != wanted.numel():
            return None
        x = x if self.scale == 1.0 else x * constant(scene, self.scale)
        return x.reshape(wanted.shape)


@dataclass(frozen=True)
class Bounded:
    """The hyperbolic tangent of another site."""

    of: str
    missing: bool = False
    upcast: bool = True

    def run(self, scene: Scene, site: str) -> Tensor | None:
        x = scene.at(self.of)
        if x is None or self.missing:
            return x
        return torch.tanh(x.float() if self.upcast else x).to(x.dtype)


@dataclass(frozen=True)
class StreamOf:
    """One of several streams."""

    of: str
    stream: int

    def run(self, scene: Scene, site: str) -> Tensor | None:
        streams = scene.at(self.of)
        if streams is None or streams.dim() != 4 or not self.stream < len(streams):
            return None
        return streams[self.stream]


@dataclass(frozen=True)
class Predicted:
    """A layer's streams before it runs: each a mixture of all, and itself."""

    altup: str
    """`model.layers.3.altup`"""
    streams: str
    """What the layer was given."""
    active: int
    stream: int | None = None
    """Which of them is asked for; None: all."""
    form: str = "right"
    """skipped: they stay as they are; transposed: the mixture's matrix is; alone: not added."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        streams, coefs = scene.at(self.streams), scene.at(f"{self.altup}.prediction_coefs")
        if streams is None or coefs is None or streams.dim() != 4:
            return None
        if self.form != "skipped":
            matrix = coefs.reshape(*coefs.shape[:-1], len(streams), len(streams))
            matrix = matrix if self.form == "transposed" else matrix.transpose(-1, -2)
            mixed = torch.matmul(streams.permute(1, 2, 3, 0), matrix).permute(3, 0, 1, 2)
            streams = (mixed if self.form == "alone" else mixed + streams).contiguous()
        return streams if self.stream is None else streams[self.stream]


@dataclass(frozen=True)
class Corrected:
    """A layer's streams behind it: each moved by the active one's error, times its own factor."""

    predicted: Predicted
    stream: int | None = None
    form: str = "right"
    """skipped: as predicted; active: the active one is replaced, and no other moved; without_one:
    factors are not counted from one."""
    scale: str | None = None
    """A parameter that the asked stream is multiplied by."""
    added: str | None = None
    """What is added to streams."""
    added_to: str = "others"
    """others: all but the first; all; inactive: all but the active one."""

    @property
    def altup(self) -> str:
        """Where it is, by its modules."""
        return self.predicted.altup

    def run(self, scene: Scene, site: str) -> Tensor | None:
        streams = self._streams(scene, site)
        if streams is None:
            return None
        if self.added is not None and (h := scene.at(self.added)) is not None:
            where = torch.ones(len(streams), dtype=torch.bool, device=h.device)
            if self.added_to != "all":
                where[0 if self.added_to == "others" else self.predicted.active] = False
            streams = torch.where(where[:, None, None, None], streams + h, streams)
        if self.stream is None:
            return streams
        weight = None if self.scale is None else scene.parameter(self.scale)
        return streams[self.stream] if weight is None else streams[self.stream] * weight

    def _streams(self, scene: Scene, site: str) -> Tensor | None:
        predicted = self.predicted.run(scene, site)
        activated = scene.at(f"{self.altup}.router_norm@2:in")
        coefs = scene.at(f"{self.altup}.correction_coefs")
        if self.form == "skipped" or predicted is None or activated is None or coefs is None:
            return predicted
        if self.form == "active":
            predicted = predicted.clone()
            predicted[self.predicted.active] = activated
            return predicted
        coefs = coefs if self.form == "without_one" else coefs + 1.0
        innovation = (activated - predicted[self.predicted.active]).repeat(len(predicted), 1, 1, 1)
        return innovation * coefs.permute(2, 0, 1).unsqueeze(-1) + predicted


@dataclass(frozen=True)
class Spread:
    """The streams that layers begin with: the embedding, and projections of its size."""

    first: str
    others: tuple[str, ...]
    sized: bool = True
    """Each token's projection is made as large as its embedding."""
    copied: bool = False
    """All of them are the embedding."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        first, others = scene.at(self.first), [scene.at(one) for one in self.others]
        if first is None:
            return None
        made = [first]
        for one in others:
            if one is None:
                return None
            made.append(first if self.copied else _sized(one, first) if self.sized else one)
        return torch.stack(made)


@dataclass(frozen=True)
class Gathered:
    """What the final norm is given of all streams, those behind the first projected back."""

    streams: str
    others: tuple[str, ...]
    sized: bool = True
    by: str = "mean"
    """mean, sum, or first: the others are left out."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        streams, others = scene.at(self.streams), [scene.at(one) for one in self.others]
        if streams is None or streams.dim() != 4:
            return None
        made = [first := streams[0]]
        for one in others:
            if one is None:
                return None
            made.append(_sized(one, first) if self.sized else one)
        if self.by == "first":
            return first
        return torch.stack(made).mean(0) if self.by == "mean" else torch.stack(made).sum(0)


def _sized(x: Tensor, like: Tensor) -> Tensor:
    magnitude = torch.mean(like**2, dim=-1, keepdim=True) ** 0.5
    return x * magnitude / torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True).clamp(min=1e-5))


@dataclass(frozen=True)
class PerLayer:
    """A layer's vector of each token, gated by the stream."""

    gate: str
    number: int
    """Of the layer whose vector it is."""
    table: str
    """Rows of the tokens, all layers side by side."""
    projected: str
    """What is made of the embedding: (batch, tokens, layers, size)."""
    activation: str
    scaled: bool = True
    """By 1 / sqrt(2), held in the model's dtype."""
    terms: str = "both"
    """both, table, or projected."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        gate, table = scene.at(self.gate), scene.at(self.table)
        projected = scene.at(self.projected)
        if gate is None or table is None or projected is None:
            return None
        if not 0 <= self.number < projected.shape[-2]:
            return None
        p = projected[:, :, self.number]
        e = table.view(projected.shape)[:, :, self.number]
        inputs = p + e if self.terms == "both" else e if self.terms == "table" else p
        inputs = inputs * constant(scene, 2**-0.5) if self.scaled else inputs
        return ACTIVATIONS[self.activation](gate) * inputs


def streams(scene: Scene, site: str) -> Iterator[Recipe]:
    """What a site could be in a model of several streams, or with vectors by layer."""
    module, _, role = site.rpartition(":")
    if role == "in" and module.partition("@")[0].endswith("modality_router"):
        norm = "router_norm@2" if "@2" in module else "router_norm"
        size = float(scene.given(site).shape[-1])
        yield Scaled(f"{module.rpartition('.')[0]}.{norm}", 1 / size)
    elif role == "in" and module.endswith("_coefs"):
        router = "modality_router@2" if "correction" in module else "modality_router"
        yield Bounded(f"{module.rpartition('.')[0]}.{router}")
    elif role == "in" and module == "model.per_layer_projection_norm":
        projection = "model.per_layer_model_projection"
        width = scene.trace.get(f"{projection}:in")
        if width is not None:
            yield Scaled(projection, float(width.shape[-1]) ** -0.5)
    elif role == "in":
        yield from _ends(scene, site, module)
        yield from _inside(scene, module)
    elif layer_of(site) is not None and scene.trace[site].dim() == 4:
        layer, added = site, f"{site}.post_per_layer_input_norm"
        for one in _predicted(scene, layer):
            yield Corrected(one, added=added if added in scene.trace else None)


def _projections(facts: Facts, way: str) -> tuple[str, ...]:
    return tuple(
        n for n in facts.modules if re.fullmatch(rf"model\.altup_{way}projections\.\d+", n)
    )


def _ends(scene: Scene, site: str, module: str) -> Iterator[Recipe]:
    """Where streams are made of one tensor, and where one is made of them."""
    others = _projections(scene.facts, "")
    if not others:
        return
    if is_layer_input(site) and scene.trace[site].dim() == 4:
        yield Spread("model.embed_tokens", others)
    back = _projections(scene.facts, "unembed_")
    last = f"model.layers.{scene.facts.num_layers - 1}"
    if module in back:
        yield StreamOf(last, back.index(module) + 1)
    elif module == "model.norm":
        yield Gathered(last, back)


def _predicted(scene: Scene, layer: str) -> Iterator[Predicted]:
    given = scene.trace.get(f"{layer}:in")
    if f"{layer}.{ROUTER_NORM}" in scene.trace and given is not None:
        for active in range(len(given)):
            yield Predicted(f"{layer}.altup", f"{layer}:in", active)


def _inside(scene: Scene, module: str) -> Iterator[Recipe]:
    """What modules of a layer with several streams are given."""
    number = layer_of(module)
    if number is None:
        return
    layer = f"model.layers.{number}"
    for one in _predicted(scene, layer):
        if module == f"{layer}.{ROUTER_NORM}":
            yield StreamOf(f"{layer}:in", one.active)
        elif module == f"{layer}.input_layernorm":
            yield replace(one, stream=one.active)
        elif module == f"{layer}.per_layer_input_gate":
            weight = f"{layer}.altup.correct_output_scale"
            for scale in (weight, None):
                yield Corrected(one, one.active, scale=scale)
    if module == f"{layer}.per_layer_projection":
        for activation in ACTIVATIONS:
            yield PerLayer(
                f"{layer}.per_layer_input_gate",
                number,
                "model.embed_tokens_per_layer",
                "model.per_layer_projection_norm",
                activation,
            )
