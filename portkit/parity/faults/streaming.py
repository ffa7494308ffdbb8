"""Recipes of a residual stream that is several, and of vectors that each layer has for each token.

AltUp (Baykal et al. 2023, arXiv:2301.13310) predicts all streams before a layer and corrects them
behind it; streams are (streams, batch, tokens, hidden_size). Which is the active one is the
config's, and observed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from portkit.parity.faults.modules import ACTIVATIONS
from portkit.parity.faults.recipe import Recipe
from portkit.parity.faults.scene import Facts, Scene, layer_of
from portkit.parity.faults.wiring import Copy, Sum, is_layer_input


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
    """One of several streams, or the only one."""

    of: str
    stream: int
    scale: str | None = None
    """A parameter that it is multiplied by."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        streams = scene.at(self.of)
        if streams is None or (streams.dim() == 4 and self.stream >= len(streams)):
            return None
        one = streams[self.stream] if streams.dim() == 4 else streams
        weight = None if self.scale is None else scene.parameter(self.scale)
        return one if weight is None else one * weight


@dataclass(frozen=True)
class Predicted:
    """A layer's streams before it runs: each a mixture of all, and itself."""

    altup: str
    """`model.layers.3.altup`"""
    form: str = "right"
    """skipped: they stay as they are; transposed: the mixture's matrix is; alone: not added."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        streams = scene.at(f"{self.altup}#predict:in")
        coefs = scene.at(f"{self.altup}.prediction_coefs")
        if streams is None or coefs is None or self.form == "skipped":
            return streams
        matrix = coefs.reshape(*coefs.shape[:-1], len(streams), len(streams))
        matrix = matrix if self.form == "transposed" else matrix.transpose(-1, -2)
        mixed = torch.matmul(streams.permute(1, 2, 3, 0), matrix).permute(3, 0, 1, 2)
        return (mixed if self.form == "alone" else mixed + streams).contiguous()


@dataclass(frozen=True)
class Corrected:
    """A layer's streams behind it: each moved by the active one's error, times its own factor."""

    altup: str
    active: int
    form: str = "right"
    """skipped: as predicted; active: the active one is replaced, and no other moved; without_one:
    factors are not counted from one."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        predicted = scene.at(f"{self.altup}#correct:in")
        activated = scene.at(f"{self.altup}#correct:in.activated")
        coefs = scene.at(f"{self.altup}.correction_coefs")
        if self.form == "skipped" or predicted is None or activated is None or coefs is None:
            return predicted
        if self.active >= len(predicted):
            return None
        if self.form == "active":
            predicted = predicted.clone()
            predicted[self.active] = activated
            return predicted
        coefs = coefs if self.form == "without_one" else coefs + 1.0
        innovation = (activated - predicted[self.active]).repeat(len(predicted), 1, 1, 1)
        return innovation * coefs.permute(2, 0, 1).unsqueeze(-1) + predicted


@dataclass(frozen=True)
class Added:
    """Streams, to some of which a layer's own vector is added."""

    streams: str
    added: str
    active: int
    to: str = "others"
    """others: all but the first; all; inactive: all but the active one; none."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        streams, added = scene.at(self.streams), scene.at(self.added)
        if streams is None or added is None or streams.dim() != 4:
            return None
        where = torch.full((len(streams), 1, 1, 1), self.to != "none", device=added.device)
        if self.to in {"others", "inactive"}:
            where[0 if self.to == "others" else self.active] = False
        return torch.where(where, streams + added, streams)


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
class OwnVector:
    """A layer's own vector of each token: a looked-up and a projected one, added and scaled."""

    number: int
    """Of the layer whose vector it is."""
    table: str = "model.embed_tokens_per_layer"
    """Rows of the tokens, all layers side by side."""
    projected: str = "model.per_layer_projection_norm"
    """What is made of the embedding: (batch, tokens, layers, size)."""
    projection: str = "model.per_layer_model_projection"
    """What it is made by."""
    scaled: bool = True
    """By 1 / sqrt(2), held in the model's dtype."""
    terms: str = "both"
    """both, table, or projected."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        table, projected = scene.at(self.table), scene.at(self.projected)
        if table is None or projected is None or self.number >= projected.shape[-2]:
            return None
        p = projected[:, :, self.number]
        e = table.view(projected.shape)[:, :, self.number]
        vector = p + e if self.terms == "both" else e if self.terms == "table" else p
        return vector * constant(scene, 2**-0.5) if self.scaled else vector


@dataclass(frozen=True)
class GatedVector:
    """A layer's own vector, gated by the stream."""

    gate: str
    vector: str
    activation: str

    def run(self, scene: Scene, site: str) -> Tensor | None:
        gate, vector = scene.at(self.gate), scene.at(self.vector)
        if gate is None or vector is None:
            return None
        return ACTIVATIONS[self.activation](gate) * vector


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
        if (given := scene.trace.get(f"{projection}:in")) is not None:
            yield Scaled(projection, float(given.shape[-1]) ** -0.5)
    elif role == "in":
        yield from _ends(scene, site, module)
    layer = layer_of(site)
    if layer is not None:
        yield from _in_layer(scene, site, f"model.layers.{layer}")


def _projections(facts: Facts, way: str) -> tuple[str, ...]:
    return tuple(
        n for n in facts.modules if re.fullmatch(rf"model\.altup_{way}projections\.\d+", n)
    )


def _ends(scene: Scene, site: str, module: str) -> Iterator[Recipe]:
    """Where streams are made of one tensor, and where one is made of them."""
    others = _projections(scene.facts, "")
    if not others:
        return
    if is_layer_input(site) and layer_of(site) == 0:
        yield Spread("model.embed_tokens", others)
    back = _projections(scene.facts, "unembed_")
    last = f"model.layers.{scene.facts.num_layers - 1}"
    if module in back:
        yield StreamOf(last, back.index(module) + 1)
    elif module == "model.norm":
        yield Gathered(last, back)


def _in_layer(scene: Scene, site: str, layer: str) -> Iterator[Recipe]:
    """What stands within a layer, or is given to it beside the streams."""
    if site == f"{layer}:in.per_layer_input":
        yield OwnVector(layer_of(layer) or 0)
    elif site == f"{layer}.per_layer_projection:in":
        for activation in ACTIVATIONS:
            vector = f"{layer}:in.per_layer_input"
            yield GatedVector(f"{layer}.per_layer_input_gate", vector, activation)
    if (given := scene.trace.get(f"{layer}.altup#predict:in")) is not None:
        for active in range(len(given)):
            if (found := _of_streams(site, layer, active)) is not None:
                yield found


def _of_streams(site: str, layer: str, active: int) -> Recipe | None:
    altup = f"{layer}.altup"
    weight = f"{altup}.correct_output_scale"
    found: dict[str, Recipe] = {
        f"{altup}#predict:in": Copy(f"{layer}:in"),
        f"{altup}.router_norm:in": StreamOf(f"{altup}#predict:in", active),
        f"{altup}#predict": Predicted(altup),
        f"{layer}.input_layernorm:in": StreamOf(f"{altup}#predict", active),
        f"{altup}#correct:in": Copy(f"{altup}#predict"),
        f"{altup}#correct:in.activated": Sum(
            (f"{layer}.pre_feedforward_layernorm:in", f"{layer}.post_feedforward_layernorm")
        ),
        f"{altup}.router_norm@2:in": Copy(f"{altup}#correct:in.activated"),
        f"{altup}#correct": Corrected(altup, active),
        f"{layer}.per_layer_input_gate:in": StreamOf(f"{altup}#correct", active, weight),
        layer: Added(f"{altup}#correct", f"{layer}.post_per_layer_input_norm", active),
    }
    return found.get(site)
