"""Port and reference over one probe: are the logits equal, in every bit?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.nn.cache import Cache
from portkit.parity.probe import Probe


@dataclass(frozen=True)
class PassResult:
    """One pass. Figures are over the logits of its real tokens."""

    name: str
    exact: bool
    num_logits: int
    num_unequal: int
    max_difference: float
    """Largest absolute difference; NaN where one side has NaN and the other has not."""


def port_logits(model: CausalLM, probe: Probe) -> dict[str, Tensor]:
    """Logits (batch, tokens, vocab_size) of every pass, by its name.

    A pass may be continued once: its cache goes on.
    """
    caches: dict[str, Cache] = {}
    found: dict[str, Tensor] = {}
    longest = sum(one.input_ids.shape[1] for one in probe)
    with torch.no_grad():
        for one in probe:
            batch, num_tokens = one.input_ids.shape
            cache = caches.pop(one.continues) if one.continues else model.new_cache(batch, longest)
            found[one.name] = model(one.input_ids, one.positions, cache, one.attention_mask)
            cache.advance(num_tokens)
            caches[one.name] = cache
    return found


def compare_logits(
    probe: Probe, port: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> list[PassResult]:
    """Hold the two sides' logits against each other, pass by pass, padded rows left out."""
    results = []
    for one in probe:
        ours, theirs = port[one.name][one.real], reference[one.name][one.real]
        assert ours.shape == theirs.shape, f"{one.name}: {ours.shape} against {theirs.shape}"
        exact = torch.equal(ours, theirs)
        difference = 0.0 if exact else float((ours.double() - theirs.double()).abs().max())
        unequal = 0 if exact else int((ours != theirs).sum())
        results.append(PassResult(one.name, exact, ours.numel(), unequal, difference))
    return results
