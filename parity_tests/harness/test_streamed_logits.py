"""Comparing logits pass by pass: gigabytes are let go of, and no difference slips through."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.parity.logits import compare_logits, run_all
from portkit.parity.probes.probe import Pass, Probe
from portkit.parity.sides.port import PortSide

VOCABULARY = 7


def passes(count: int) -> Probe:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    positions = torch.arange(3).expand(2, -1)
    return Probe("test", tuple(Pass(f"pass {n}", ids, positions) for n in range(count)))


class Watchful(torch.nn.Module):
    """Stands for a model, and has nobody keep its last logits while it makes the next."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []

    def new_cache(self, batch: int, length: int) -> Watchful:
        return self

    def advance(self, num_tokens: int) -> None:
        pass

    def hidden_states(self, input_ids: Tensor, *_: Any) -> Tensor:
        return input_ids

    def logits(self, hidden_states: Tensor) -> Tensor:
        assert [one() for one in self.made if one() is not None] == []
        logits = torch.ones(*hidden_states.shape, VOCABULARY)
        self.made.append(weakref.ref(logits))
        return logits

    def run(self, probe: Probe) -> Iterator[Tensor]:
        return run_all(PortSide(cast("CausalLM", self), 99), probe)


def test_one_pass_is_held_at_a_time() -> None:
    probe, port, reference = passes(4), Watchful(), Watchful()
    results = compare_logits(probe, port.run(probe), reference.run(probe))
    assert [(one.name, one.exact) for one in results] == [(f"pass {i}", True) for i in range(4)]
    assert len(port.made) == len(reference.made) == 4


def test_differences_are_counted_over_real_tokens_alone() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    one = Pass("padded", torch.zeros(2, 3, dtype=torch.int64), torch.arange(3).expand(2, -1), mask)
    theirs = torch.zeros(2, 3, VOCABULARY)
    ours = theirs.clone()
    ours[0, 0] = math.nan  # padding
    (result,) = compare_logits(Probe("test", (one,)), [ours], [theirs])
    assert (result.exact, result.num_logits, result.num_unequal) == (True, 5 * VOCABULARY, 0)
    ours[0, 1, 2], ours[1, 0, 0] = 0.25, -0.5
    (result,) = compare_logits(Probe("test", (one,)), [ours], [theirs])
    assert (result.exact, result.num_unequal, result.max_difference) == (False, 2, 0.5)


def test_nan_on_one_side_is_a_difference_that_shows() -> None:
    ours, theirs = torch.zeros(2, 3, VOCABULARY), torch.zeros(2, 3, VOCABULARY)
    ours[0, 1, 2], ours[1, 0, 0] = math.nan, 0.5
    (result,) = compare_logits(passes(1), [ours], [theirs])
    assert not result.exact
    assert math.isnan(result.max_difference)


def test_a_side_that_leaves_passes_out_is_our_own_mistake() -> None:
    logits = torch.zeros(2, 3, VOCABULARY)
    with pytest.raises(AssertionError, match="every pass"):
        compare_logits(passes(2), [logits], [logits, logits])
