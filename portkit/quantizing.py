"""Quantising a loaded model: its linear maps are replaced by ones of 8 or 4 bits, one at a time.

The embedding stays, and with it a head that is tied to it: the head gets an 8-bit copy of its own,
because each of its rows decides about a token. Knows modules; knows no family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from portkit.architecture import CausalLM
from portkit.errors import QuantizationError
from portkit.nn.quantized import Int4Linear, Int8Linear, group_size

Scheme = Literal["int8", "int4"]
SCHEMES = ("int8", "int4")
_HEAD = "lm_head"


@dataclass(frozen=True)
class Quantized:
    """What was done to a model's linear maps. Bytes are of all of them, read once a token."""

    scheme: str
    num_int4: int
    num_int8: int
    fallen_back: tuple[str, ...]
    """Maps inside the layers that do not fit the 4-bit kernel, and have 8 bits."""
    bytes_before: int
    bytes_after: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What people should know, a line each."""
        if not self.fallen_back:
            return ()
        others = f" and {len(self.fallen_back) - 1} more" if len(self.fallen_back) > 1 else ""
        return (
            f"{self.fallen_back[0]}{others}: in 8 bits, because the 4-bit kernel takes rows by 16 "
            "and columns by 32",
        )


@torch.no_grad()
def quantize(model: CausalLM, scheme: str) -> Quantized:
    """Replace the linear maps of `model`, whose parameters they no longer are.

    Raises QuantizationError for an unknown scheme, a model without linear maps, int4 elsewhere than
    on the CPU.
    """
    if scheme not in SCHEMES:
        raise QuantizationError(f"--quantize {scheme}: choose one of {', '.join(SCHEMES)}")
    device = next(model.parameters()).device
    if scheme == "int4" and device.type != "cpu":
        raise QuantizationError(f"--quantize int4 runs on the CPU, not on {device.type}: take int8")
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    inside = [name for name in linear if name != _HEAD]
    if not inside:
        raise QuantizationError("this model's matrices are no linear maps that could be quantised")
    before = sum(one.weight.nbytes for one in linear.values())
    fallen_back: list[str] = []
    after, num_int4 = 0, 0
    for name, module in linear.items():
        new: Int4Linear | Int8Linear
        if scheme == "int4" and name != _HEAD and group_size(module.weight) is not None:
            new, num_int4 = Int4Linear(module), num_int4 + 1
        else:
            new = Int8Linear(module)
            fallen_back += [name] if scheme == "int4" and name != _HEAD else []
        after += sum(one.nbytes for one in new.buffers())
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
    return Quantized(scheme, num_int4, len(linear) - num_int4, tuple(fallen_back), before, after)
