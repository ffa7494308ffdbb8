"""`portkit bench`: rows with their proof beside them, and clear words where it cannot measure."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
import torch

import portkit
from parity_tests.conftest import CheckpointMaker
from portkit.bench.roofline import bytes_per_token
from portkit.cli import bench, main
from portkit.loading import load

DEMO = Path(portkit.__file__).parent / "demo_checkpoint"
KEYS = {
    "engine", "dtype", "batch", "context", "rounds", "tokens_per_s", "ms_per_token", "prefill_ms",
    "compile_s", "peak_rss_bytes", "peak_device_bytes", "bytes_per_token",
    "bandwidth_fraction", "same_tokens", "first_difference", "compared", "verdict", "loss",
}  # fmt: skip


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["bench", *arguments])
    return int(left.value.code or 0)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiling takes minutes; what is measured then is the same."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


@pytest.mark.usefixtures("no_compiler")
def test_decode_measures_each_engine_and_says_whether_it_is_right(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    image = tmp_path / "speeds.svg"
    asked = ("--context", "9", "--batch", "1,2", "--tokens", "6", "--rounds", "1", "--threads", "1")
    others = ("--against", "transformers", "--plot", str(image), "--compare", "40")
    assert run("decode", str(DEMO), *asked, *others, "--json") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["command"] == "bench decode"
    assert found["complete"] is True
    assert found["bandwidth_bytes_per_s"] > 1e8
    assert "cores" in found["hardware"]
    rows = {(row["engine"], row["batch"]): row for row in found["results"]}
    assert {engine for engine, _ in rows} == {
        "readable", "fast, not compiled", "transformers", "transformers, static cache",
    }  # fmt: skip
    for row in rows.values():
        assert set(row) == KEYS
        assert row["same_tokens"] is True
        assert row["loss"] is None
        assert row["compared"]["num_tokens"] == 40
        assert row["compared"]["same_tokens"] is True
        assert row["tokens_per_s"] == pytest.approx(1000 * row["batch"] / row["ms_per_token"])
    assert rows["readable", 1]["verdict"] == "exact"
    assert rows["fast, not compiled", 1]["verdict"] in ("exact", "rounding")
    assert rows["transformers", 1]["verdict"] is None
    assert rows["transformers", 1]["first_difference"] is None, "the readable model is its equal"
    row = rows["readable", 1]
    seconds = row["ms_per_token"] / 1000
    share = row["bytes_per_token"] / seconds / found["bandwidth_bytes_per_s"]
    assert row["bandwidth_fraction"] == pytest.approx(share)
    assert "no C++ compiler" in said.err
    assert "<svg" in image.read_text()
    lines = said.err.splitlines()
    assert sum("round 1 of 1: " in line and " tokens/s, " in line for line in lines) == len(rows)
    assert any("1 rounds and 40 tokens to compare, as asked for" in line for line in lines)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.slow
@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("name", ["qwen3 moe", "gemma3n plain"])
def test_decode_measures_other_wirings(
    name: str, tiny_checkpoint: CheckpointMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts, and several streams: whichever engines take them are right."""
    folder = tiny_checkpoint(name, torch.float32)
    capsys.readouterr()
    asked = ("--context", "9", "--tokens", "6", "--rounds", "1", "--threads", "1", "--json")
    assert run("decode", str(folder), *asked) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert "readable" in {row["engine"] for row in rows}
    assert all(row["tokens_per_s"] > 0 and row["same_tokens"] is not False for row in rows)
    assert {row["verdict"] for row in rows} <= {"exact", "rounding", None}


def test_what_was_measured_is_kept_when_it_is_interrupted(tmp_path: Path) -> None:
    """Rows are told as they are measured, without a terminal too; SIGTERM leaves the object."""
    asked = ["--rounds", "100000", "--tokens", "4", "--context", "9", "--threads", "1", "--json"]
    with Popen(
        [sys.executable, "-m", "portkit", "bench", "decode", str(DEMO), *asked],
        stdout=PIPE,
        stderr=PIPE,
        text=True,
        env={**os.environ, "PATH": str(tmp_path)},
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "fast, not compiled, context 9, round 2 of 100000: " in line:
                break
        running.terminate()
        out, err = running.communicate()
    assert running.returncode == 130
    assert "portkit: error: interrupted" in err
    found = json.loads(out)
    assert found["complete"] is False
    rows = {row["engine"]: row for row in found["results"]}
    assert set(rows) == {"readable", "fast, not compiled"}
    for row in rows.values():
        assert set(row) == KEYS
        assert row["rounds"] >= 2
        assert row["tokens_per_s"] == pytest.approx(1000 / row["ms_per_token"])
        assert (row["same_tokens"], row["verdict"], row["compared"]) == (None, None, None)


def test_prefill_and_load_are_tables_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prefill", str(DEMO), "--context", "5,30", "--rounds", "1", "--threads", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["readable", "5", "1"],
        ["readable", "30", "1"],
    ]
    assert run("load", str(DEMO), "--rounds", "1", "--threads", "1", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert row["engine"] == "readable"
    assert 0 < row["load_s"] < row["seconds"]


def test_the_ceiling_counts_what_a_token_reads() -> None:
    model = load(DEMO).model
    config = model.config
    scale = 2  # of the embedding, a bfloat16 beside the parameters
    weights = sum(one.numel() for one in model.parameters()) * 2 + scale
    own_row = config.hidden_size * 2
    behind = model.new_cache(1, 101).num_bytes(100, 2)
    assert bytes_per_token(model, 100, 1) == weights + own_row + behind
    head = config.vocab_size * config.hidden_size
    assert bytes_per_token(model, 100, 1, int8_head=True) == weights - head + own_row + behind
    assert bytes_per_token(model, 100, 3) == weights + 3 * (own_row + behind)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "100000"], "exceed the model's context of"),
        (["--batch", "33"], "batches of 1 to 32"),
        (["--batch", "two"], "--batch two: give whole numbers above 0, separated by commas"),
        (["--context", "0"], "whole numbers above 0"),
        (["--against", "llama.cpp"], "--against llama.cpp: it is missing"),
        (["--against", "mlx"], "mlx"),
        (["--gguf", "no.gguf"], "--gguf no.gguf: there is no such file"),
    ],
)
def test_what_cannot_be_measured(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = bench.find_spec
    monkeypatch.setattr(
        bench, "find_spec", lambda name: None if name == "llama_cpp" else found(name)
    )
    assert run("decode", str(DEMO), *options) == 2
    assert message in capsys.readouterr().err


def test_extras_that_are_missing_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda _: None)
    for options, message in (
        (["--plot", "x.png"], "pip install 'portkit[plot]'"),
        (["--against", "transformers"], "pip install 'portkit[parity]'"),
    ):
        assert run("decode", str(DEMO), *options) == 2
        assert message in capsys.readouterr().err


def test_an_engine_that_cannot_start_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("decode", str(DEMO), "--threads", "1", "--dtype", "float64") == 2
    assert "float64" in capsys.readouterr().err
