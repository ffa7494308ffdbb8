"""What is asked of a comparison: of whom, in which dtype and on which kernels, by which probe.

Knows what may be asked, and nothing of how it is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from portkit.checkpoint import Files
from portkit.errors import PortkitError
from portkit.parity.probes.probe import Probe
from portkit.parity.probes.probing import default_probe
from portkit.parity.sides.factories import Factory
from portkit.parity.subject.traits import Traits

Given = str | Factory | None
"""`module:factory`, or a factory itself; None: ours, or Transformers."""


@dataclass(frozen=True)
class Question:
    """What is to be proven. Words are the command's."""

    repo: str | Path
    revision: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    attention: str = "sdpa"
    reference_attention: str | None = None
    """None: the same as the port's."""
    layers: range | None = None
    """The layers to hold against the truth; None: all, and what is around them."""
    ignore_config: tuple[str, ...] = ()
    backward: bool = False
    """Compare gradients as well."""
    gate: str = "exact"
    """By which the faults of the catalogue are judged."""
    faults: str = "full"
    """How many of them are tried: full, sampled or off."""
    choose_probe: Callable[[Traits, Files | None], Probe] = lambda traits, _: default_probe(traits)
    """Of the subject's traits, and the files beside it, as its tokenizer's; None beside a model."""
    port: Given = None
    reference: Given = None
    sites: str | None = None
    """A table of site pairs, for the port, or for the reference where that alone is foreign."""
    subject: Any = None
    """What is held to be right, a model or another callable at hand: there is no checkpoint."""
    inputs: Mapping[str, Tensor] | None = None
    """Of a model that is no causal language model: what it is called with, by name."""
    trust_remote_code: bool = False
    """Code that the checkpoint brings may run, as the reference's."""
    is_made: bool = False
    """The foreign side is made already, in one dtype: it cannot be had in another."""


def check_layers(question: Question, num_layers: int) -> None:
    """Raise `PortkitError` where the model has no such layers."""
    if question.layers is not None and question.layers.stop > num_layers:
        raise PortkitError(
            f"--layers {question.layers.start}-{question.layers.stop - 1}: the model has "
            f"{num_layers} layers, 0 to {num_layers - 1}"
        )
