"""The page of the benchmarks: every figure of a run is on it, and what was not run is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "write_benchmarks.py"
FOLDER = "parity_tests/benchmarks"
STEP = {
    "what": "a training step",
    "against": "the same in `Trainer`",
    "target": 1 / 1.3,
    "ours_s": 0.9,
    "theirs_s": 1.0,
    "ratio": 0.9,
}
DECODING = {
    "what": "decode 16 tokens, compiled",
    "against": "the readable model",
    "target": 0.48,
    "ours_s": 0.25,
    "theirs_s": 1.0,
    "ratio": 0.25,
}


def save(run_file: Path, found: dict[str, dict[str, Any]], cores: int = 3) -> Path:
    """A run with these benchmarks, as pytest-benchmark writes it."""
    run = {
        "machine_info": {
            "usable_cores": cores,
            "system": "Linux",
            "machine": "x86_64",
            "versions": {"torch": "2.0"},
        },
        "benchmarks": [
            {"fullname": f"{FOLDER}/{name}", "extra_info": info} for name, info in found.items()
        ],
    }
    run_file.write_text(json.dumps(run))
    return run_file


def written(tmp_path: Path, *runs: dict[str, dict[str, Any]]) -> str:
    """The page that the tool makes of these runs."""
    saved = [save(tmp_path / f"{number}.json", found) for number, found in enumerate(runs)]
    made = tmp_path / "page.md"
    subprocess.run([sys.executable, TOOL, *saved, "--out", made], check=True)
    return made.read_text()


def test_what_was_run_is_a_row_and_what_was_not_is_named(tmp_path: Path) -> None:
    page = written(
        tmp_path,
        {
            "test_training.py::test_a_training_step": STEP,
            "test_decoding.py::test_decoding[mode1]": DECODING,
            "test_proving.py::test_memory_of_a_proof": {
                "proof_bytes": 2_000_000_001,
                "proof_target_bytes": 2_180_257_196,
            },
        },
    )
    assert "- machine: 3 cores, Linux x86_64\n- versions: torch 2.0\n" in page
    assert (
        "| a training step | 0.900 s | the same in `Trainer` | 1.000 s | 0.90 (missed) | 0.77 |\n"
        "| decode 16 tokens, compiled | 0.250 s | the readable model | 1.000 s | 0.25 | 0.48 |\n"
    ) in page
    assert "adds 2,000,000,001 bytes at its peak. The target is\n2,180,257,196:" in page
    left_out = page.partition("Not measured:\n\n")[2].splitlines()
    assert f"- `{FOLDER}/test_proving.py::test_a_proof_against_its_bare_forwards`" in left_out
    assert f"- `{FOLDER}/test_opening.py::test_opening_copies_nothing`" in left_out
    assert not any("test_decoding`" in line or "test_a_training_step`" in line for line in left_out)


def test_a_run_of_the_memory_alone_has_no_table(tmp_path: Path) -> None:
    opening = {"added_bytes": 50, "file_bytes": 1_000, "target": 0.05}
    page = written(tmp_path, {"test_opening.py::test_opening_copies_nothing": opening})
    assert "adds 50 bytes to the process's anonymous memory, 5.00% of\nthe file of 1,000;" in page
    assert "| what |" not in page


def test_of_several_runs_each_benchmark_counts_as_it_was_measured_last(tmp_path: Path) -> None:
    step, table = "test_training.py::test_a_training_step", "test_table_on_disk.py::test_a_table"
    page = written(
        tmp_path,
        {step: STEP, "test_decoding.py::test_decoding[mode1]": DECODING},
        {step: {**STEP, "ratio": 0.5}},
        {table: {"table_bytes": 5_000_000, "read_bytes": 70_000, "num_tokens": 8}},
    )
    assert "| 0.50 | 0.77 |" in page
    assert "(missed)" not in page
    assert "| decode 16 tokens, compiled |" in page
    assert "by layer, 5,000,000 bytes in the mapped file, a pass of\n8 tokens makes 70,000" in page


def test_runs_of_two_machines_are_not_mixed(tmp_path: Path) -> None:
    runs = save(tmp_path / "a.json", {}), save(tmp_path / "b.json", {}, cores=4)
    ran = subprocess.run(
        [sys.executable, TOOL, *runs, "--out", tmp_path / "page.md"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (1, "write_benchmarks: runs differ in usable_cores: 3\n")
    assert not (tmp_path / "page.md").exists()
