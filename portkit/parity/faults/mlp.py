"""Faults of a gated MLP: which half is activated, and by which function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from portkit.parity.faults.fault import Edit, Fault, Place, on
from portkit.parity.faults.modules import Product, sparsities


def _activation(of: tuple[str, ...], by: str) -> Edit:
    def edit(product: Product, place: Place) -> Iterable[Product]:
        return (replace(product, activation=by),) if product.activation in of else ()

    return on(Product, edit)


def _dense(product: Product, place: Place) -> Iterator[Product]:
    if product.sparsity:
        yield replace(product, sparsity=0.0)


def _sparse(product: Product, place: Place) -> Iterator[Product]:
    pattern = sparsities(place.facts) or []
    if not product.sparsity:
        yield from (replace(product, sparsity=one) for one in dict.fromkeys(pattern) if one)


def _cut_elsewhere(product: Product, place: Place) -> Iterator[Product]:
    """At another layer's quantile, at the usual one, at the other end; by another deviation."""
    if product.sparsity:
        usual = (*(sparsities(place.facts) or ()), 0.95, 1 - product.sparsity)
        for one in dict.fromkeys(usual):
            if one and one != product.sparsity:
                yield replace(product, sparsity=one)
        yield replace(product, unbiased=True)


_GELUS, _ALL = ("gelu", "gelu_tanh"), ("silu", "gelu", "gelu_tanh")

FAULTS = (
    Fault(
        "mlp.gate_up_exchanged",
        "activates `up` and not `gate`",
        "act(gate) * up; of a fused matrix the gate's rows come first here",
        on(Product, lambda p, _: (replace(p, gate=p.up, up=p.gate),)),
    ),
    Fault(
        "mlp.gelu_exact",
        "activates with the exact GELU where this config has its tanh form",
        'use gelu(approximate="tanh")',
        _activation(("gelu_tanh",), "gelu"),
    ),
    Fault(
        "mlp.gelu_tanh",
        "activates with GELU's tanh form where this config has the exact one",
        'use gelu(approximate="none")',
        _activation(("gelu",), "gelu_tanh"),
    ),
    Fault(
        "mlp.silu_for_gelu",
        "activates with SiLU where this config has GELU",
        "read the activation of the config; its key is not `hidden_act` everywhere",
        _activation(_GELUS, "silu"),
    ),
    Fault(
        "mlp.gelu_for_silu",
        "activates with GELU where this config has SiLU",
        "read the activation of the config",
        on(
            Product,
            lambda p, _: (replace(p, activation=one) for one in _GELUS if p.activation == "silu"),
        ),
    ),
    Fault(
        "mlp.relu",
        "activates with ReLU",
        "read the activation of the config",
        _activation(_ALL, "relu"),
    ),
    Fault(
        "mlp.gate_not_activated",
        "multiplies `gate` and `up` without an activation",
        "act(gate) * up",
        _activation((*_ALL, "relu"), "none"),
    ),
    Fault(
        "mlp.sparsity_missing",
        "lets all gates of a sparse layer count",
        "activate relu(gate - (mean + deviation * quantile)), by `activation_sparsity_pattern`",
        on(Product, _dense),
    ),
    Fault(
        "mlp.sparsity_everywhere",
        "makes the gates of a dense layer sparse",
        "a 0 in `activation_sparsity_pattern` means that the layer's gates count as they are",
        on(Product, _sparse),
    ),
    Fault(
        "mlp.sparsity_cut",
        "cuts a sparse layer's gates off at another value",
        "at the layer's own quantile of a normal distribution with the gates' mean and deviation",
        on(Product, _cut_elsewhere),
    ),
)
