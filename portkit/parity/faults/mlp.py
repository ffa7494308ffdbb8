"""Faults of a gated MLP: which half is activated, and by which function."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from portkit.parity.faults.fault import Edit, Fault, Place, on
from portkit.parity.faults.modules import Product


def _activation(of: tuple[str, ...], by: str) -> Edit:
    def edit(product: Product, place: Place) -> Iterable[Product]:
        return (replace(product, activation=by),) if product.activation in of else ()

    return on(Product, edit)


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
)
