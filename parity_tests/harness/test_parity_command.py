"""`portkit parity`: what it prints, and what it exits with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

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
    assert "far" in [one["name"] for one in printed["probe"]["passes"]]
    assert [one["dtype"] for one in printed["comparisons"]] == ["bfloat16"]
    assert printed["generation"]["equal"]
    assert printed["generation"]["port"] == printed["generation"]["reference"]
    assert printed["not_verified"] == []


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


def test_float32_is_shown_in_bfloat16_too(
    tiny_checkpoint: CheckpointMaker,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A norm that forgets to upcast: in float32 there is nothing to forget."""

    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    monkeypatch.setattr(RMSNorm, "forward", forward)
    folder = str(tiny_checkpoint("qwen3 yarn tempered"))
    code, out = parity(capsys, folder, "--json")
    printed = json.loads(out)
    assert (code, printed["dtype"]) == (1, "float32")
    assert [(one["dtype"], one["verdict"]) for one in printed["comparisons"]] == [
        ("float32", "exact"),
        ("bfloat16", "diverged"),
    ]
    first = printed["first"]
    assert (first["site"], first["dtype"]) == ("model.layers.0.input_layernorm", "bfloat16")
    assert (first["kind"], first["pass"]) == ("care", "short")
    assert first["local_error"] > 1.25 * first["floor"]


def test_a_prompt_of_ones_own_leaves_the_window_unseen(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny_checkpoint("gemma3 shallow", torch.bfloat16))
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("5 17 301 44 8 9 10 11 12 13 14 15\n")
    code, out = parity(capsys, folder, "--tokens", str(tokens), "--json")
    printed = json.loads(out)
    assert (code, printed["verdict"]) == (0, "exact")
    left_out = {one["name"]: one["reason"] for one in printed["not_verified"]}
    assert left_out["sliding window of 24"] == (
        "the tokens probe has no prompt of more than 24 tokens"
    )
    assert printed["generation"]["prompt"] == [5, 17, 301, 44, 8, 9, 10, 11, 12, 13, 14, 15]
    code, out = parity(capsys, folder, "--tokens", str(tokens))
    assert "not verified: sliding window of 24 (" in out


def test_a_result_can_be_replayed(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny_checkpoint("qwen3 yarn tempered", torch.bfloat16))
    _, out = parity(capsys, folder, "--seed", "5", "--json")
    (tmp_path / "parity.json").write_text(out)
    _, again = parity(capsys, folder, "--tokens", str(tmp_path / "parity.json"), "--json")
    assert json.loads(again)["probe"] == json.loads(out)["probe"]
    assert json.loads(again) == json.loads(out)


def test_some_layers_alone(
    tiny_checkpoint: CheckpointMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny_checkpoint("gemma3 shallow", torch.bfloat16))
    code, out = parity(capsys, folder, "--layers", "1-2", "--json")
    printed = json.loads(out)
    assert (code, printed["verdict"], printed["generation"]) == (0, "exact", None)
    assert "everything but the layers 1 to 2" in [o["name"] for o in printed["not_verified"]]
    _, whole = parity(capsys, folder, "--json")
    assert 0 < printed["sites"] * 2 < json.loads(whole)["sites"]


def test_an_ignored_key_is_not_verified(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tiny_checkpoint("qwen3 yarn tempered"), tmp_path, unheard_of=3)
    assert parity(capsys, str(folder), "--quick")[0] == 2
    code, out = parity(capsys, str(folder), "--quick", "--ignore-config", "unheard_of", "--json")
    assert code == 0
    assert "config: unheard_of" in [one["name"] for one in json.loads(out)["not_verified"]]


def test_what_a_complete_probe_was_to_show_and_did_not_is_inconclusive(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A probe that calls itself complete, and lost the passes beyond the window."""
    folder = str(tiny_checkpoint("gemma3 shallow", torch.bfloat16))
    _, out = parity(capsys, folder, "--json")
    probe = json.loads(out)["probe"]
    probe["passes"] = [one for one in probe["passes"] if one["name"] in {"short", "far"}]
    (tmp_path / "probe.json").write_text(json.dumps(probe))
    code, out = parity(capsys, folder, "--tokens", str(tmp_path / "probe.json"))
    assert code == 3
    assert out.startswith("inconclusive: ")


def copied(source: Path, target: Path, **changed: object) -> Path:
    config = json.loads((source / "config.json").read_text()) | changed
    (target / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "model.safetensors", target)
    return target


def test_a_config_that_the_reference_rejects_is_patched_for_it(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours takes a whole number for the base of the rotation, the reference's config does not."""
    folder = copied(tiny_checkpoint("qwen3 yarn tempered"), tmp_path, rms_norm_eps=1)
    code, out = parity(capsys, str(folder), "--quick", "--json")
    assert code == 0
    said = "the reference was given a patched config.json: rms_norm_eps 1 became 1.0"
    assert json.loads(out)["notes"] == [said]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quick", "--thorough"], "choose one"),
        (["--layers", "3-1"], "give a range as 4-7"),
        (["--layers", "0-9"], "the model has 1 layers, 0 to 0"),
        (["--tokens", "FILE:1 2 three"], "holds neither token ids"),
        (["--tokens", "FILE:[1.5]"], "holds neither token ids"),
        (["--tokens", "FILE:"], "at least one token"),
        (["--tokens", "FILE:[[1]]"], "holds neither token ids"),
        (["--tokens", 'FILE:{"passes": 3}'], "no probe that portkit wrote"),
        (["--tokens", "FILE:5 509"], "token 509 is outside a vocabulary of 509"),
        (["--tokens", "FILE:" + "5 " * 4097], "position 4096 is outside a context of 4096"),
        (["--tokens", "nowhere.txt"], "cannot be read"),
        (["--prompt", "hello"], "tokenizer"),
        (["--reference-attention", "flash"], "flash"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str],
    said: str,
    tiny_checkpoint: CheckpointMaker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "tokens"
    file.write_text(arguments[-1].removeprefix("FILE:"))
    given = [str(file) if one.startswith("FILE:") else one for one in arguments]
    with pytest.raises(SystemExit) as exit_:
        main(["parity", str(tiny_checkpoint("qwen3 yarn tempered")), *given])
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("portkit: error: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err


def test_running_out_of_memory_is_said(
    tiny_checkpoint: CheckpointMaker,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RMSNorm, "forward", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(SystemExit) as exit_:
        main(["parity", str(tiny_checkpoint("qwen3 yarn tempered"))])
    assert exit_.value.code == 2
    assert "memory ran out" in capsys.readouterr().err


def test_what_the_reference_cannot_load_is_said(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of how weights were drawn we read nothing; the reference wants a number there."""
    copied(tiny_checkpoint("qwen3 yarn tempered"), tmp_path, initializer_range="small")
    with pytest.raises(SystemExit) as exit_:
        main(["parity", str(tmp_path)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("portkit: error: the reference cannot load")
    assert error.count("\n") == 1
