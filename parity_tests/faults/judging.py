"""Planting a fault and asking the harness: was it caught, and was it found where it was made?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from parity_tests.checkpoints import save_tiny
from parity_tests.faults.planted.planting import Planting
from parity_tests.faults.stages import OWN, Stage
from portkit.loading import LoadedModel, load
from portkit.parity.comparing import compare
from portkit.parity.judging.judge import Judgement, Verdict
from portkit.parity.probes.probe import Probe
from portkit.parity.probes.probing import default_probe, quick_probe
from portkit.parity.reference import Reference, load_reference
from portkit.parity.result import Comparison
from portkit.parity.sides.port import PortSide
from portkit.parity.subject.discovery import sites_between


@dataclass(frozen=True)
class Finding:
    """What the harness said of planted faults, and where each was to be found."""

    expected: tuple[str, ...]
    comparison: Comparison

    @property
    def first(self) -> Judgement | None:
        """The first site that the strict gate does not pass."""
        return next((j for j in self.comparison.judgements if j.verdict is not Verdict.exact), None)

    @property
    def caught(self) -> bool:
        return self.comparison.verdict is not Verdict.exact

    @property
    def placed(self) -> bool:
        return self.first is not None and self.first.site == self.expected[0]


class Judging:
    """Loads checkpoints and references, each once, and holds planted ports against them."""

    def __init__(self, folder: Callable[[str, str], Path]) -> None:
        self.folder = folder
        self.reference: Callable[[str, str, str], Reference] = cache(self._reference)

    def _reference(self, checkpoint: str, dtype: str, kernel: str) -> Reference:
        return load_reference(self.folder(checkpoint, dtype), getattr(torch, dtype), kernel)

    def judge(self, stage: Stage, *others: Planting) -> Finding:
        """The fault of a stage, and others with it, in a port loaded for the purpose.

        The probe is the default one of the port as it should be: its own mistake is not to choose
        what it is asked. What is loaded wrong is found where parameters are compared, whatever runs
        then: there a quick probe will do.
        """
        loaded = self.load(stage.checkpoint, stage.dtype, stage.planting.kernel)
        quick = stage.planting.fault.startswith("loader.") and not others
        probe = (quick_probe if quick else default_probe)(loaded.model)
        expected = plant(loaded, (stage.planting, *others))
        reference = self.reference(stage.checkpoint, stage.dtype, stage.planting.kernel)
        return Finding(expected, hold_against(reference, loaded, probe))

    def clean(self, checkpoint: str, dtype: str, kernel: str) -> Comparison:
        """A port in which nothing is planted, with the default probe."""
        loaded = self.load(checkpoint, dtype, kernel)
        reference = self.reference(checkpoint, dtype, kernel)
        return hold_against(reference, loaded, default_probe(loaded.model))

    def load(self, checkpoint: str, dtype: str, kernel: str) -> LoadedModel:
        return load(self.folder(checkpoint, dtype), dtype=dtype, attention=kernel)


def hold_against(reference: Reference, loaded: LoadedModel, probe: Probe) -> Comparison:
    table = sites_between(PortSide(loaded.model), reference)
    return compare(PortSide(loaded.model, probe.longest), reference, table, probe)


def plant(loaded: LoadedModel, plantings: Iterable[Planting]) -> tuple[str, ...]:
    """Make the mistakes in a loaded model; return where each must be found first."""
    with torch.no_grad():
        return tuple(one.plant(loaded.model) for one in plantings)


def checkpoints_in(root: Path) -> Callable[[str, str], Path]:
    """The tiny checkpoints below a folder, each made when it is first asked for."""

    def folder(name: str, dtype: str) -> Path:
        made = root / f"{name.replace(' ', '-')}-{dtype}"
        if not (made / "config.json").exists():
            made.mkdir(parents=True, exist_ok=True)
            save_tiny(OWN[name], made, getattr(torch, dtype))
        return made

    return folder
