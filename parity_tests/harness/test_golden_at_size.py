"""A recording at a released size: small enough to keep beside a port's code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.harness.conftest import Run
from portkit.parity.traces.trace_file import TraceFile

MAKE_CHECKPOINT = Path(__file__).resolve().parents[2] / "tools" / "make_checkpoint.py"


@pytest.mark.slow
def test_the_last_tokens_of_270m_stay_under_40_mb(
    data_folder: Path, tmp_path: Path, run: Run
) -> None:
    """The default probe over random weights of Gemma 3 270M; replayed in every bit."""
    config = data_folder / "configs" / "google__gemma-3-270m-it"
    subprocess.run([sys.executable, MAKE_CHECKPOINT, config, tmp_path / "model"], check=True)
    trace = tmp_path / "golden.safetensors"
    code, out, _ = run("record", tmp_path / "model", "--last-tokens", "1", "-o", trace, "--json")
    printed = json.loads(out)
    assert code == 0
    assert printed["bytes"] == trace.stat().st_size < 40_000_000
    assert 0.9 < printed["expected_bytes"] / printed["bytes"] < 1.1
    assert TraceFile(trace).probe.longest > 512
    code, out, _ = run("parity", tmp_path / "model", "--golden", trace, "--json")
    assert (code, json.loads(out)["verdict"]) == (0, "exact")
