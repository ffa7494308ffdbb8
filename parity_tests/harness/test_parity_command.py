"""`portkit parity`: what it prints, and what it exits with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parity_tests.conftest import CheckpointMaker
from portkit.cli import main
from portkit.nn.norms import RMSNorm


def parity(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["parity", *arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, capsys.readouterr().out


def test_a_right_port_is_exact(
    tiny_checkpoint: CheckpointMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny_checkpoint("qwen3 yarn tempered", torch.bfloat16))
    code, out = parity(capsys, folder, "--json")
    printed = json.loads(out)
    assert code == 0
    assert printed["verdict"] == "exact"
    assert printed["exact"] == printed["sites"] > 30
    assert printed["culprits"] == []
    assert printed["first"] is None
    assert "far" in printed["probe"]["passes"]


def test_a_wrong_port_is_not(
    tiny_checkpoint: CheckpointMaker,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every norm of the port forgets the epsilon: no gate lets that through."""
    own = RMSNorm.__init__
    monkeypatch.setattr(RMSNorm, "__init__", lambda self, size, eps: own(self, size, eps * 1e-3))
    folder = str(tiny_checkpoint("qwen3 yarn tempered"))
    code, out = parity(capsys, folder, "--gate", "rounding", "--json")
    first = json.loads(out)["first"]
    assert code == 1
    assert first["site"] == "model.layers.0.input_layernorm"
    assert first["kind"] == "function"
    assert first["function_error"] > 1e-13
    code, out = parity(capsys, folder)
    assert code == 1
    assert out.startswith("diverged: ")
    assert "input_layernorm" in out


def test_what_the_reference_cannot_load_is_said(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key that our config accepts as a number and the reference wants as a float."""
    source = tiny_checkpoint("qwen3 yarn tempered")
    config = json.loads((source / "config.json").read_text()) | {"rms_norm_eps": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        load_file(source / "model.safetensors"),
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(SystemExit) as exit_:
        main(["parity", str(tmp_path)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("portkit: error: the reference cannot load")
    assert error.count("\n") == 1
