"""Port and reference over one probe: are the logits equal, in every bit?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.nn.cache import Cache
from portkit.parity.probe import Pass, Probe


@dataclass(frozen=True)
class PassResult:
    """One pass. Figures are over the logits of its real tokens."""

    name: str
    exact: bool
    num_logits: int
    num_unequal: int
    max_difference: float
    """Largest absolute difference; NaN where one side has NaN and the other has not."""


def port_logits(model: CausalLM, probe: Probe) -> Iterator[Tensor]:
    """Logits (batch, tokens, vocab_size) of each pass in turn, run when it is asked for.

    A pass may be continued once: its cache goes on.
    """
    caches: dict[str, Cache] = {}
    longest = sum(one.input_ids.shape[1] for one in probe)
    for one in probe:
        batch, num_tokens = one.input_ids.shape
        cache = caches.pop(one.continues) if one.continues else model.new_cache(batch, longest)
        # Without a name for the logits: kept here, they would outlive their comparison.
        yield _run(model, one, cache)
        cache.advance(num_tokens)
        caches[one.name] = cache


@torch.no_grad()
def _run(model: CausalLM, one: Pass, cache: Cache) -> Tensor:
    logits: Tensor = model(one.input_ids, one.positions, cache, one.attention_mask)
    return logits


def compare_logits(
    probe: Probe, port: Iterable[Tensor], reference: Iterable[Tensor]
) -> list[PassResult]:
    """Hold the two sides' logits against each other, pass by pass, padded rows left out.

    Of an iterator's logits one pass is held at a time: of a large vocabulary they are gigabytes.
    """
    results = list(map(_compare, probe, port, reference))
    assert len(results) == len(probe), "both sides give the logits of every pass"
    return results


def _compare(one: Pass, port: Tensor, reference: Tensor) -> PassResult:
    assert port.shape == reference.shape, f"{one.name}: {port.shape} against {reference.shape}"
    num_logits, num_unequal, differences = 0, 0, [0.0]
    for row, real in enumerate(one.real):  # one at a time: picking the real tokens copies them
        ours, theirs = port[row, real], reference[row, real]
        num_logits += ours.numel()
        if not torch.equal(ours, theirs):
            num_unequal += int((ours != theirs).sum())
            differences.append(float((ours.double() - theirs.double()).abs().max()))
    # Python's max would pass over NaN.
    difference = float(torch.tensor(differences, dtype=torch.float64).max())
    return PassResult(one.name, len(differences) == 1, num_logits, num_unequal, difference)
