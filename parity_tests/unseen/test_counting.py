"""Ports that are told no positions: what they can be asked, and what they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parity_tests.unseen import gpt2_by_hand
from parity_tests.unseen.conftest import UnseenMaker
from parity_tests.unseen.renamed import Renamed, renamed
from portkit.parity import compare
from portkit.parity.probes.probing import default_probe, unexercised
from portkit.parity.subject.traits import Traits

CPU = torch.device("cpu")
FAR = "positions up to 255"


class Counting(torch.nn.Module):
    """A port that counts places in a row, whatever is padding."""

    def __init__(self, port: Renamed) -> None:
        super().__init__()
        self.port, self.sites = port, port.sites

    def forward(self, input_ids: Tensor, attention_mask: Any = None, cache: Any = None) -> Any:
        past, batch = (0 if cache is None else cache.get_seq_length()), len(input_ids)
        places = torch.arange(past, past + input_ids.shape[1]).expand(batch, -1)
        return self.port(input_ids, places, attention_mask, cache)


def counting(folder: Path) -> Counting:
    port = renamed(folder, torch.float32, CPU)
    port.sites = "\n".join(f"port.{line}" for line in port.sites.splitlines())
    return Counting(port)


def refused(found: Any) -> set[str]:
    return {one.name for one in found.not_verified if "positions" in one.reason}


def test_a_port_that_counts_real_tokens_is_asked_for_padded_rows(
    unseen_checkpoint: UnseenMaker,
) -> None:
    folder = unseen_checkpoint("gpt2")
    port = gpt2_by_hand.load(folder, torch.float32, CPU)
    found = compare(port, folder, sites=gpt2_by_hand.load.sites)
    assert found.verdict == "rounding"
    assert refused(found) == set()
    (in_dtype,) = found.comparisons
    assert {"padded", "far"} <= {one.name for one in in_dtype.probe}


@pytest.mark.parametrize("name", ["gpt2", "phi"])
def test_one_that_counts_places_is_not_accused(name: str, unseen_checkpoint: UnseenMaker) -> None:
    """Of learned positions a padded row is then another row; of rotary ones nobody can tell."""
    found = compare(counting(unseen_checkpoint(name)), unseen_checkpoint(name))
    assert found.verdict == "inconclusive"
    assert not found.culprits
    assert any(one.startswith("pass padded") for one in refused(found)), refused(found)


def test_positions_do_not_matter_where_there_are_none(unseen_checkpoint: UnseenMaker) -> None:
    found = compare(counting(unseen_checkpoint("bloom")), unseen_checkpoint("bloom"))
    assert found.verdict == "exact"
    assert refused(found) == set()


@pytest.mark.parametrize("takes", [True, False])
def test_the_end_of_the_context_is_reached_by_tokens_where_positions_cannot_be_given(
    takes: bool,
) -> None:
    traits = Traits(251, 256, 3, takes_positions=takes)
    probe = default_probe(traits)
    (far,) = [one for one in probe if one.name == "far"]
    assert far.counts_on is not takes
    assert far.num_tokens == (24 if takes else 256)
    assert int(far.positions.max()) == 255
    assert FAR not in {one.name for one in unexercised(traits, probe)}


def test_a_context_that_is_too_long_for_that_is_not_verified() -> None:
    traits = Traits(251, 4096, 3, takes_positions=False)
    (lacking,) = unexercised(traits, default_probe(traits))
    assert lacking.name == "positions up to 4095"
    assert lacking.was_meant
