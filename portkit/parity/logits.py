"""Port and reference over one probe: are the logits equal, in every bit?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from portkit.parity.probes.probe import Pass, Probe
from portkit.parity.sides.sites import Side


@dataclass(frozen=True)
class PassResult:
    """One pass. Figures are over the logits of its real tokens."""

    name: str
    exact: bool
    num_logits: int
    num_unequal: int
    max_difference: float
    """Largest absolute difference; NaN where one side has NaN and the other has not."""


def run_all(side: Side, probe: Probe) -> Iterator[Tensor]:
    """Logits (batch, tokens, vocab_size) of each pass in turn, run when it is asked for.

    A pass may be continued once: its cache goes on.
    """
    caches: dict[str, Any] = {}
    for one in probe:
        # Without a name for the logits: kept here, they would outlive their comparison.
        yield side.run(one, caches)


def compare_logits(
    probe: Probe, port: Iterable[Tensor], reference: Iterable[Tensor]
) -> list[PassResult]:
    """Hold the two sides' logits against each other, pass by pass, padded rows left out.

    Of an iterator's logits one pass is held at a time: of a large vocabulary they are gigabytes.
    """
    results = list(map(_compare, probe, port, reference))  # zip would keep the last ones alive
    assert len(results) == len(probe), "both sides give the logits of every pass"
    return results


def _compare(one: Pass, port: Tensor, reference: Tensor) -> PassResult:
    assert port.shape == reference.shape, f"{one.name}: {port.shape} against {reference.shape}"
    num_logits, num_unequal, differences = 0, 0, [0.0]
    for row, real in enumerate(
        one.real_logits
    ):  # one at a time: picking the real tokens copies them
        ours, theirs = port[row, real], reference[row, real]
        num_logits += ours.numel()
        if not torch.equal(ours, theirs):
            num_unequal += int((ours != theirs).sum())
            differences.append(float((ours.double() - theirs.double()).abs().max()))
    # Python's max would pass over NaN.
    difference = float(torch.tensor(differences, dtype=torch.float64).max())
    return PassResult(one.name, len(differences) == 1, num_logits, num_unequal, difference)
