"""Recipes of modules: norms, linear maps, embeddings, and what a gated MLP puts together.

Each is the formula of a paper, with what implementations differ in as fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portkit.parity.faults.scene import Scene

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
    for casts_first, offset in ((True, 0.0), (False, 1.0), (False, 0.0), (True, 1.0)):
        for centred in (False, True):
            yield Norm(f"{site}.weight", eps, offset, casts_first, centred=centred)


@dataclass(frozen=True)
class Linear:
    """A linear map of a module's recorded input."""

    weight: str
    bias: str | None
    transposed: bool = False

    def run(self, scene: Scene, site: str) -> Tensor | None:
        x, weight = scene.at(f"{site}:in"), scene.parameter(self.weight)
        bias = None if self.bias is None else scene.parameter(self.bias)
        if x is None or weight is None or weight.shape[1] != x.shape[-1]:
            return None
        return F.linear(x, weight.T if self.transposed else weight, bias)


@dataclass(frozen=True)
class Embedding:
    """Rows of a table, scaled in the table's dtype or not."""

    weight: str
    scale: float | None
    """As the reference computes it, before it is rounded."""
    rounded: bool = True
    """The scale is held in the dtype of the table."""
    times: int = 1

    def run(self, scene: Scene, site: str) -> Tensor | None:
        whole = scene.facts.parameters[self.weight]
        input_ids = scene.one.input_ids  # beyond a smaller table a token has the first row
        h = scene.upcast(F.embedding(input_ids.where(input_ids < len(whole), 0), whole))
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
    yield Embedding(weight, float(module.embedding_dim) ** 0.5)


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

    def run(self, scene: Scene, site: str) -> Tensor | None:
        gate, up = scene.at(self.gate), scene.at(self.up)
        if gate is None or up is None or gate.shape != up.shape:
            return None
        act = ACTIVATIONS[self.activation]
        if self.upcast:
            return (act(gate.float()) * up.float()).to(gate.dtype)
        return act(gate) * up


def products(scene: Scene, site: str) -> Iterator[Product]:
    block = site.removesuffix(".down_proj:in")
    for activation in ACTIVATIONS:
        yield Product(f"{block}.gate_proj", f"{block}.up_proj", activation)


@dataclass(frozen=True)
class Logits:
    """What a model returns, of what its head made."""

    cap: float | None

    def run(self, scene: Scene, site: str) -> Tensor | None:
        made = scene.at("lm_head")
        if made is None or self.cap is None:
            return made
        return torch.tanh(made / self.cap) * self.cap


def logits(config: Any) -> Logits:
    """As the config says it; what is returned is not kept, so that it is believed."""
    cap = getattr(config, "final_logit_softcapping", None)
    return Logits(None if cap is None else float(cap))
