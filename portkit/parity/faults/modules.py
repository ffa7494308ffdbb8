"""Recipes of modules: norms, linear maps, embeddings, and what a gated MLP puts together.

Each is the formula of a paper, with what implementations differ in as fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from portkit.parity.faults.scene import Facts, Scene, layer_of
from portkit.parity.sides.sites import AGAIN

EPSILONS = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm of the last dimension, from a module's recorded input."""

    weight: str | None
    """Whose weight, as a parameter's name; None: it has none."""
    eps: float
    offset: float = 0.0
    """Added to the weight."""
    casts_first: bool = True
    """Cast back before the weight is multiplied."""
    upcast: bool = True
    centred: bool = False
    """Subtracts the mean, as LayerNorm does."""
    summed: bool = False
    """Sums the squares where it should take their mean."""
    eps_outside: bool = False
    missing: bool = False
    rounded_offset: bool = False
    """1 + weight is rounded to the model's dtype."""
    source: str | None = None
    """Another site to normalise than the module's own input."""
    times: int = 1

    def run(self, scene: Scene, site: str) -> Tensor | None:
        x = scene.at(self.source or f"{site}:in")
        return None if x is None else self.of(scene, x)

    def of(self, scene: Scene, x: Tensor) -> Tensor | None:
        """Of any tensor whose last dimension is the norm's."""
        if self.weight is None:
            return x if self.missing else self._normalised(x).to(x.dtype)
        weight = scene.parameter(self.weight)
        if weight is None or weight.shape[0] != x.shape[-1]:
            return None
        for _ in range(0 if self.missing else self.times):
            x = self._once(x, weight)
        return x

    def fitted(self, x: Tensor, port: Tensor, reference: Tensor) -> Norm | None:
        """The same with the epsilon that a port must have, from rows of input and outputs.

        A row's outputs are as x * rsqrt(ms + eps), so their ratio tells the port's epsilon.
        """
        x, port, reference = (one.double() for one in (x, port, reference))
        power = x.pow(2).mean(-1)
        ratio = (port * reference).sum(-1) / reference.pow(2).sum(-1)
        eps = float(((power + self.eps) / ratio.pow(2) - power).median())
        return replace(self, eps=float(f"{eps:.6g}")) if eps > 0 else None

    def _normalised(self, x: Tensor) -> Tensor:
        h = x.float() if self.upcast else x
        if self.centred:
            h = h - h.mean(-1, keepdim=True)
        squares = h.pow(2)
        power = squares.sum(-1, keepdim=True) if self.summed else squares.mean(-1, keepdim=True)
        if self.eps_outside:
            return h / (power.sqrt() + self.eps)
        return h * torch.rsqrt(power + self.eps)

    def _once(self, x: Tensor, weight: Tensor) -> Tensor:
        h = self._normalised(x)
        if self.casts_first:
            return (weight if not self.offset else self.offset + weight) * h.to(x.dtype)
        if self.rounded_offset:
            weight = self.offset + weight
            return (h * (weight.float() if self.upcast else weight)).to(x.dtype)
        wide = weight.float() if self.upcast else weight
        return (h * (self.offset + wide if self.offset else wide)).to(x.dtype)


def norms(scene: Scene, site: str, module: nn.Module) -> Iterator[Norm]:
    """The conventions that a norm may follow."""
    eps = next((v for k in EPSILONS if isinstance(v := vars(module).get(k), float)), None)
    if eps is None:
        return
    if not any(True for _ in module.parameters()):
        yield Norm(None, eps)
        return
    # A module that is called again in a pass has the parameters that it has.
    site = site.partition(AGAIN)[0]
    for casts_first, offset in ((True, 0.0), (False, 1.0), (False, 0.0), (True, 1.0)):
        for centred in (False, True):
            yield Norm(f"{site}.weight", eps, offset, casts_first, centred=centred)


@dataclass(frozen=True)
class LayerNorm:
    """torch's own, of the last dimension of a module's recorded input."""

    weight: str | None
    bias: str | None
    eps: float
    centred: bool = True

    def run(self, scene: Scene, site: str) -> Tensor | None:
        x = scene.at(f"{site}:in")
        if x is None:
            return None
        weight, bias = (
            None if name is None else scene.parameter(name) for name in (self.weight, self.bias)
        )
        if self.centred:
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        made = F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return made if bias is None else made + bias


def layer_norm(scene: Scene, site: str, module: nn.LayerNorm) -> LayerNorm:
    weight, bias = (
        own if (own := f"{site.partition(AGAIN)[0]}.{part}") in scene.facts.parameters else None
        for part in ("weight", "bias")
    )
    return LayerNorm(weight, bias, module.eps)


@dataclass(frozen=True)
class Linear:
    """A linear map of a module's recorded input."""

    weight: str
    bias: str | None
    transposed: bool = False
    upcast: bool = False
    """Multiplied in float32."""
    cast: bool = True
    """Rounded to the model's dtype."""
    clip: float | None = None
    """Weights are clipped to at most so much."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        x, weight = scene.at(f"{site}:in"), scene.parameter(self.weight)
        bias = None if self.bias is None else scene.parameter(self.bias)
        if x is None or weight is None or weight.shape[1] != x.shape[-1]:
            return None
        weight = weight.T if self.transposed else weight
        weight = weight if self.clip is None else weight.clamp(-self.clip, self.clip)
        if self.upcast:
            made = F.linear(x.float(), weight.float(), bias)
            return made.to(x.dtype) if self.cast else made
        return F.linear(x, weight, bias)


@dataclass(frozen=True)
class Embedding:
    """Rows of a table, scaled in the table's dtype or not."""

    weight: str
    scale: float | None
    """As the reference computes it, before it is rounded."""
    rounded: bool = True
    """The scale is held in the dtype of the table."""
    times: int = 1
    beyond: str = "first"
    """The row of a token that a smaller table does not have: its first, or its last."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        whole = scene.facts.parameters[self.weight]
        input_ids = scene.one.input_ids
        row = 0 if self.beyond == "first" else len(whole) - 1
        h = scene.upcast(F.embedding(input_ids.where(input_ids < len(whole), row), whole))
        if self.scale is None:
            return h
        for _ in range(self.times):
            if self.rounded:  # the constant as it is held, upcast where the truth is asked for
                h = h * scene.upcast(torch.tensor(self.scale, dtype=whole.dtype, device=h.device))
            else:
                h = (h.float() * self.scale).to(h.dtype)
        return h


def embeddings(scene: Scene, site: str, module: nn.Embedding) -> Iterator[Embedding]:
    weight = f"{site}.weight"
    yield Embedding(weight, None)
    width = module.embedding_dim
    yield Embedding(weight, float(width) ** 0.5)
    if width % scene.facts.num_layers == 0:  # a vector for each layer
        yield Embedding(weight, float(width // scene.facts.num_layers) ** 0.5)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "none": lambda x: x,
}


@dataclass(frozen=True)
class Product:
    """What a gated MLP gives its last matrix: `act(gate) * up`."""

    gate: str
    up: str
    activation: str
    upcast: bool = False
    sparsity: float = 0.0
    """A gate counts by how far it is above this quantile of a normal fit to its token's."""
    unbiased: bool = False
    """The fit's deviation is that of a sample."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        gate, up = scene.at(self.gate), scene.at(self.up)
        if gate is None or up is None or gate.shape != up.shape:
            return None
        act = ACTIVATIONS[self.activation]
        if self.sparsity:
            gate = self._sparse(scene, gate)
        if self.upcast:
            return (act(gate.float()) * up.float()).to(gate.dtype)
        return act(gate) * up

    def _sparse(self, scene: Scene, gate: Tensor) -> Tensor:
        quantile = torch.erfinv(2 * torch.tensor(self.sparsity) - 1) * math.sqrt(2)
        with _disable_current_modes():  # it is held in the model's dtype, in float64 too
            deviations = scene.upcast(quantile.to(scene.facts.dtype)).to(gate.device)
        mean = torch.mean(gate, dim=-1, keepdim=True)
        spread = torch.std(gate, dim=-1, keepdim=True, unbiased=self.unbiased)
        return torch.relu(gate - (mean + spread * deviations))


def products(scene: Scene, site: str) -> Iterator[Product]:
    block, layer = site.removesuffix(".down_proj:in"), layer_of(site)
    pattern = sparsities(scene.facts)
    sparsity = 0.0 if pattern is None or layer is None else pattern[layer]
    for activation in ACTIVATIONS:
        yield Product(f"{block}.gate_proj", f"{block}.up_proj", activation, sparsity=sparsity)


def sparsities(facts: Facts) -> list[float] | None:
    """Each layer's sparsity of gates; None where a model has no such thing."""
    found = getattr(facts.config, "activation_sparsity_pattern", None)
    return None if found is None else [float(one) for one in found]


@dataclass(frozen=True)
class Logits:
    """What a model returns, of what its head made."""

    cap: float | None
    scale: float = 1.0

    def run(self, scene: Scene, site: str) -> Tensor | None:
        made = scene.at("lm_head")
        if made is None:
            return made
        made = made if self.scale == 1.0 else made * self.scale
        return made if self.cap is None else torch.tanh(made / self.cap) * self.cap


def logits(config: Any) -> Logits:
    """As the config says it; what is returned is not kept, so that it is believed."""
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None)
    return Logits(None if cap is None else float(cap), 1.0 if scale is None else float(scale))
