"""Rotary tables: how far two may be apart whose frequencies are one function's, rounded otherwise.

A frequency is rounded to float32, and a last bit of it grows with the position. Knows sites by
their names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from portkit.parity.probes.probe import Pass

_TABLES = ("#cos", "#sin")


def is_table(site: str) -> bool:
    return any(each in site for each in _TABLES)


def within_frequencies(one: Pass, port: Tensor, truth: Tensor | None) -> bool:
    """Whether two tables are as near as frequencies that one of them rounds to float32, and then
    each to its dtype.
    """
    if truth is None or truth.shape[1:] != port.shape[1:]:  # one of them may be for all rows one
        return False
    rounded = sum(torch.finfo(each.dtype).eps / 2 for each in (port, truth))
    turned = float(one.positions.max()) * torch.finfo(torch.float32).eps
    return float((port.double() - truth.double()).abs().max()) <= turned + rounded
