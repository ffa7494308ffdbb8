"""`portkit parity --decode`: what it prints, and what it exits with."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import portkit
from parity_tests.conftest import CheckpointMaker
from parity_tests.harness.test_parity_command import parity
from portkit.cli import main

DEMO = str(Path(portkit.__file__).parent / "demo_checkpoint")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PORTKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


@pytest.mark.usefixtures("no_compiler")
def test_the_demo_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = parity(capsys, DEMO, "--decode")
    lines = out.splitlines()
    assert code == 0
    assert lines[2] == "bfloat16: a prompt of 40 tokens and 40 more, across a window of 48"
    ways = {line[2:36].rstrip(): line[38:] for line in lines[4:15]}
    assert ways["prefill"].split()[:2] == ["A", "equal"]
    # Whether sums come out equal is the machine's; what differs has its reasons below the table.
    told = set()
    for way, line in ways.items():
        if way.startswith("fast path"):
            row = re.search(
                r"(equal|differs) .* (\d+) of \2  (?:(exact)|rounding ((?:\[\d\])+))$", line
            )
            assert row, line
            assert (row[1] == "equal") == (row[3] == "exact")
            assert row[2] == ("32" if "ring" in way else "41")
            told |= set(re.findall(r"\[\d\]", row[4] or ""))
    assert told == {line[2:5] for line in lines[15:] if line.startswith("  [")}
    assert lines[0].startswith(f"{'rounding' if told else 'exact'}: decoding ")
    said = "decoding without compiled regions: no C++ compiler was found"
    assert f"not run: {said}" in ways["compiled, decoded behind a prompt"]


@pytest.mark.usefixtures("no_compiler")
def test_the_object_follows_the_schema(
    tiny_checkpoint: CheckpointMaker, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(tiny_checkpoint("qwen3 yarn tempered"))
    code, out = parity(capsys, folder, "--decode", "--json")
    printed = json.loads(out)
    schema = json.loads((files("portkit.parity") / "parity.schema.json").read_text("utf-8"))
    Draft202012Validator(schema).validate(printed)
    assert code == 0
    assert printed["gate"] == "exact"
    assert [one["dtype"] for one in printed["decode"]] == ["float32", "bfloat16"]
    assert (printed["sites"], printed["culprits"]) == (18, [])
    ways = {one["way"]: one for one in printed["decode"][0]["ways"]}
    assert ways["prefill"]["bits"] == 0
    assert ways["prefill"]["error"] <= ways["prefill"]["floor"] < 1e-5
    fast = [one for each in printed["decode"] for one in each["ways"] if "fast path" in one["way"]]
    fast = [one for one in fast if one["not_run"] is None]
    assert len(fast) == 6
    for one in fast:  # exact or for a reason, as the machine has it
        assert one["verdict"] == ("rounding" if one["reasons"] else "exact")
        assert one["equals_reference"] == (one["reasons"] == [])
        assert one["function_error"] < 1e-13
    assert printed["verdict"] == max((one["verdict"] for one in fast), key=len)
    unseen = {one["name"] for one in printed["not_verified"]}
    assert unseen == {"fast path, ring after it wrapped", "compiled, decoded behind a prompt"}
    again = tmp_path / "parity.json"
    again.write_text(out)
    _, out = parity(capsys, folder, "--decode", "--json", "--tokens", str(again))
    assert json.loads(out)["decode"] == printed["decode"]


@pytest.mark.usefixtures("no_compiler")
def test_a_wrong_fast_path_is_no(
    tiny_checkpoint: CheckpointMaker,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from portkit.decoding import session

    monkeypatch.setattr(session._Step, "_show_tables", _stale_tables(session._Step._show_tables))
    folder = str(tiny_checkpoint("qwen3 yarn tempered"))
    code, out = parity(capsys, folder, "--decode", "--gate", "rounding", "--json")
    printed = json.loads(out)
    assert code == 1
    assert printed["verdict"] == "diverged"
    assert printed["first"]["site"] == "#logits, fast path, decoded behind a prompt"
    assert printed["first"]["kind"] == "function"
    assert len(printed["culprits"]) == 6


def _stale_tables(own):
    """Every token is rotated as the one before."""
    return lambda self, past: own(self, past - 1)


def test_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("[]")
    for options, said in (
        (["--thorough"], "leave --thorough out"),
        (["--port", "a:b"], "leave --port out"),
        (["--golden", "x.safetensors"], "leave --golden out"),
        (["--out", "report"], "leave --out out"),
        (["--tokens", str(empty)], "an empty prompt"),
        (["--prompt", "Once " * 3000], "outside a context of 256"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["parity", DEMO, "--decode", *options])
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
