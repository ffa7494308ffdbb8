"""What the demo shows: the shipped port proven, and a mistake that everyday gates let through.

Knows one mistake, where it is planted, and what other checks would have said of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.loading import LoadedModel, load
from portkit.parity.comparing import compare
from portkit.parity.generation import NUM_TOKENS, GenerationParity, compare_generation
from portkit.parity.logits import run_all
from portkit.parity.probes.probe import Probe
from portkit.parity.probes.probing import default_probe
from portkit.parity.reference import Reference, load_reference
from portkit.parity.result import Comparison, ParityResult
from portkit.parity.sides.port import PortSide
from portkit.parity.subject.discovery import sites_between

SITE = "model.layers.3.self_attn.q_norm"
"""Where the mistake is planted."""
EPSILON = 1e-5
"""What its norm is given."""
COSINE, TOP1, DIFFERENCE = 0.999, 1.0, 1e-3
"""What everyday gates ask of logits: a similarity, an agreement, a largest difference."""


@dataclass(frozen=True)
class Gates:
    """What checks of logits alone see, over all that a probe reads."""

    cosine: float
    """The smallest similarity of a token's logits."""
    top1: float
    """Share of the tokens of which both sides expect the same to follow."""
    max_difference: float

    @property
    def pass_it(self) -> bool:
        """All three let the port through."""
        return self.cosine >= COSINE and self.top1 >= TOP1 and self.max_difference <= DIFFERENCE


@dataclass(frozen=True)
class Found:
    """A faulty port, as everyday gates see it and as it is."""

    gates: Gates
    result: ParityResult


def prove_shipped(folder: Path, dtype: str, kernel: str) -> Comparison:
    """Every activation of the port against the reference, on the default probe."""
    loaded = load(folder, dtype=dtype, device="cpu", attention=kernel)
    reference = load_reference(folder, getattr(torch, dtype), kernel)
    return _compare(loaded, reference, default_probe(loaded.model))


def find_planted(folder: Path, prompt: Iterable[int]) -> Found:
    """Plant the mistake in a float32 port; hold it against the reference, and generate."""
    loaded = load(folder, dtype="float32", device="cpu")
    plant(loaded.model)
    reference = load_reference(folder, torch.float32, "sdpa")
    probe = default_probe(loaded.model)
    ours = run_all(PortSide(loaded.model, probe.longest), probe)
    gates = gates_of(probe, ours, run_all(reference, probe))
    comparison = _compare(loaded, reference, probe)
    return Found(gates, ParityResult((comparison,), _generation(loaded, reference, [*prompt])))


def epsilon(model: CausalLM) -> float:
    """What the norm has before the mistake is planted."""
    norm: Any = model.get_submodule(SITE)
    return float(norm.eps)


def plant(model: CausalLM) -> None:
    """Give one norm another epsilon."""
    assert epsilon(model) != EPSILON, "the mistake is no mistake here"
    norm: Any = model.get_submodule(SITE)
    norm.eps = EPSILON


def gates_of(probe: Probe, port: Iterable[Tensor], reference: Iterable[Tensor]) -> Gates:
    """Compare logits as everyday gates do, at every real token."""
    cosine, differing, num_tokens, furthest = 1.0, 0, 0, 0.0
    for one, ours, theirs in zip(probe, port, reference, strict=True):
        a, b = (each[one.real_logits].double() for each in (ours, theirs))
        cosine = min(cosine, float(torch.cosine_similarity(a, b, dim=-1).min()))
        differing += int((a.argmax(-1) != b.argmax(-1)).sum())
        num_tokens += len(a)
        furthest = max(furthest, float((a - b).abs().max()))
    return Gates(cosine, 1 - differing / num_tokens, furthest)


def _compare(loaded: LoadedModel, reference: Reference, probe: Probe) -> Comparison:
    port = PortSide(loaded.model, probe.longest)
    table = sites_between(port, reference)
    return compare(port, reference, table, probe)


def _generation(loaded: LoadedModel, reference: Reference, prompt: list[int]) -> GenerationParity:
    port = PortSide(loaded.model, len(prompt) + NUM_TOKENS)
    return compare_generation(port, reference, prompt)
