"""Named inputs: what a model that is no causal language model is called with, as its user gives it.

An encoder, a vision tower, an encoder-decoder is called once, by the names of its own arguments.
Knows tensors and files; runs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from portkit.errors import ProbeError
from portkit.parity.probes.probe import Pass, Probe
from portkit.parity.sides.pairs import near

NAME = "inputs"
"""Of such a probe, and of its one pass."""
IDS = "input_ids"


def checked(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inputs as a user has them, a tokenizer's among them. Raises `ProbeError`."""
    if not isinstance(inputs, Mapping):
        raise ProbeError(f"inputs: {type(inputs).__name__} is no mapping of names to tensors")
    for name, one in inputs.items():
        if not isinstance(one, Tensor) or not one.numel():
            raise ProbeError(f"inputs: {name} is no tensor with values ({one!r:.60})")
    if not any(one.dim() for one in inputs.values()):
        raise ProbeError("inputs: give tensors by the names of the model's own arguments")
    return dict(inputs)


def read_inputs(file: str | Path) -> dict[str, Tensor]:
    """Those of a safetensors file. Raises `ProbeError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return checked(load_file(file))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ProbeError(f"{file} is no safetensors file of named inputs: {reason}") from error


def named_probe(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> Probe:
    """One pass of them; what has a fraction is rounded to the dtype in which both sides run."""
    held = {n: one.to(dtype) if one.is_floating_point() else one for n, one in inputs.items()}
    return Probe(NAME, (named_pass(held),))


def named_pass(inputs: Mapping[str, Tensor], name: str = NAME) -> Pass:
    """Rows and tokens are those of `input_ids`; without any, a placeholder for each row."""
    first = next(one for one in inputs.values() if one.dim())
    ids = inputs.get(IDS)
    if ids is None or ids.dim() != 2 or ids.is_floating_point():
        ids = torch.zeros((len(first), 1), dtype=torch.int64, device=first.device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    return Pass(name, ids, positions, inputs=inputs)


def check_names(who: str, inputs: Collection[str], takes: Collection[str]) -> None:
    """Raise `ProbeError` where somebody has no argument of that name, which he may swallow."""
    for name in inputs if takes else ():
        if name not in takes:
            raise ProbeError(f"inputs: {who} takes no {name}{near(name, takes)}")
