"""Whatever survives the kill matrix is explained: over all tiny models, dtypes, kernels and gates.

One reference is run and shown to a matrix of each gate. What a smaller probe lets through the
default one catches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parity_tests.checkpoints import TINY
from parity_tests.conftest import CheckpointMaker
from portkit.loading import load
from portkit.parity.judging.local import Trace, recorder
from portkit.parity.probes.probe import Probe
from portkit.parity.probes.probing import default_probe, quick_probe
from portkit.parity.reference import load_reference
from portkit.parity.sides.sites import SiteTable, watching
from portkit.parity.subject.discovery import sites_of
from portkit.parity.teeth.kill import Fate, KillMatrix

GATES = ("exact", "rounding")
DTYPES = [torch.float32, torch.bfloat16]


def fates(folder: Path, dtype: torch.dtype, kernel: str) -> dict[str, dict[str, dict[str, Fate]]]:
    """By probe and gate, the fate of each fault."""
    loaded, reference = load(folder, attention=kernel), load_reference(folder, dtype, kernel)
    table = sites_of(loaded.model)
    found = {}
    for probe in (make(loaded.model) for make in (quick_probe, default_probe)):
        gates = GATES if probe.name == "default" else GATES[:1]
        matrices = {gate: KillMatrix(reference, table, probe, gate) for gate in gates}
        run(reference, table, probe, list(matrices.values()))
        found[probe.name] = {
            gate: {one.fault.id: one for one in matrix.fates()} for gate, matrix in matrices.items()
        }
    return found


def run(reference: Any, table: SiteTable, probe: Probe, matrices: list[KillMatrix]) -> None:
    caches: dict[str, Any] = {}
    for one in probe:
        trace: Trace = {}
        with torch.no_grad(), watching(reference, table, recorder(trace)):
            reference.run(one, caches)
        for matrix in matrices:
            matrix.see(one, trace)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TINY)
def test_every_survivor_is_explained(
    name: str, dtype: torch.dtype, kernel: str, tiny_checkpoint: CheckpointMaker
) -> None:
    found = fates(tiny_checkpoint(name, dtype), dtype, kernel)
    exact, rounding = (found["default"][gate] for gate in GATES)

    assert {one.fault.id: one.survived for one in exact.values() if one.survived} == {}
    for fault, fate in rounding.items():
        assert fate.applies == exact[fault].applies, fault
        if fate.survived is not None:  # the same function, and no less care
            assert fate.survived.startswith("below the floor: "), (fault, fate.survived)
            assert exact[fault].killed_by == "values", fault
    for fault, fate in found["quick"]["exact"].items():
        if fate.survived is not None:
            assert fate.survived.startswith("beyond this probe: "), (fault, fate.survived)
            assert exact[fault].killed, fault
