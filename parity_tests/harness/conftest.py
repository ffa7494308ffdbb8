"""A proof that found a fault, for the tests of what is reported of it; and recorded traces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parity_tests.conftest import CheckpointMaker
from portkit.cli import main
from portkit.loading import load
from portkit.parity.comparing import compare
from portkit.parity.probes.probing import quick_probe
from portkit.parity.reference import load_reference
from portkit.parity.reports import report
from portkit.parity.reports.schema import as_fields
from portkit.parity.result import NotVerified, ParityResult
from portkit.parity.sides.port import PortSide
from portkit.parity.subject.discovery import sites_between

CULPRIT = "model.layers.3.self_attn#context"


def asked(result: ParityResult, repo: str = "a/model") -> report.Asked:
    around = {"versions": {"torch": "2.x"}, "gate": "exact", "device": "cpu", "threads": 1}
    return report.Asked(repo, f"portkit parity {repo}", {**around, **as_fields(result)})


@pytest.fixture(scope="session")
def diverged(tiny_checkpoint: CheckpointMaker) -> ParityResult:
    """Layer 3's kernel scaled, in bfloat16; something else was meant to be seen and was not."""
    torch.set_num_threads(1)
    folder = tiny_checkpoint("gemma3 shallow", torch.bfloat16)
    loaded = load(folder)
    loaded.model.model.layers[3].self_attn.attend.scale *= 1.01
    probe = quick_probe(loaded.model)
    reference = load_reference(folder, torch.bfloat16, "sdpa")
    table = sites_between(PortSide(loaded.model), reference)
    found = compare(PortSide(loaded.model, probe.longest), reference, table, probe)
    left_out = NotVerified("left padding", "no row of it"), NotVerified("far", "none", True)
    return ParityResult((found,), None, left_out, ("a note",))


Run = Callable[..., tuple[int, str, str]]
Recorder = Callable[..., Path]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: exit code, stdout and stderr of portkit in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # of recordings before
        with pytest.raises(SystemExit) as exit_:
            main([str(one) for one in arguments])
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def recorded(
    tiny_checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory
) -> Recorder:
    """`recorded(name, dtype, *options)`: a trace, recorded once and not to be changed."""
    made: dict[tuple[object, ...], Path] = {}

    def make(name: str, dtype: torch.dtype, *options: str) -> Path:
        if (name, dtype, options) not in made:
            path = tmp_path_factory.mktemp("trace") / "recorded.safetensors"
            with pytest.raises(SystemExit) as exit_:
                main(["record", str(tiny_checkpoint(name, dtype)), "-o", str(path), *options])
            assert exit_.value.code == 0
            made[name, dtype, options] = path
        return made[name, dtype, options]

    return make
