"""Bad traces: each is refused in one line that helps, with the exit code of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parity_tests.conftest import CheckpointMaker
from parity_tests.harness.bad_traces import DIFF, GOLDEN, UNREADABLE, Bad
from parity_tests.harness.conftest import Recorder, Run
from parity_tests.harness.test_trace_files import parts, written

NAME, DTYPE = "gemma3 shallow", torch.bfloat16
Damaged = Callable[[Bad], Path]


@pytest.fixture(scope="session")
def sound(recorded: Recorder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of one pass of twelve tokens in two rows."""
    probe = tmp_path_factory.mktemp("probe") / "probe.json"
    one = {
        "name": "short",
        "input_ids": [[*range(5, 17)], [*range(40, 52)]],
        "positions": [[*range(12)]] * 2,
    }
    probe.write_text(json.dumps({"name": "mine", "passes": [one]}))
    return recorded(NAME, DTYPE, "--engine", "portkit", "--no-floors", "--tokens", str(probe))


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Damaged:
    def make(bad: Bad) -> Path:
        tensors, described = parts(sound)
        bad.change(tensors, described)
        path = written(tmp_path / "damaged.safetensors", tensors, described)
        path.write_bytes(bad.spoil(path.read_bytes()))
        return path

    return make


def refused(answer: tuple[int, str, str], said: str) -> None:
    code, out, err = answer
    assert (code, out) == (2, ""), err
    assert err.startswith("portkit: error: ")
    assert len(err.splitlines()) == 1
    assert said in err


@pytest.mark.parametrize("bad", UNREADABLE, ids=lambda bad: bad.name)
def test_what_is_no_trace(bad: Bad, damaged: Damaged, sound: Path, run: Run) -> None:
    path = damaged(bad)
    refused(run("diff", sound, path), f"{path}{bad.said if bad.said[0] == ':' else f' {bad.said}'}")


@pytest.mark.parametrize("bad", [*GOLDEN, *UNREADABLE[:1]], ids=lambda bad: bad.name)
def test_what_no_port_is_held_against(
    bad: Bad, damaged: Damaged, run: Run, tiny_checkpoint: CheckpointMaker
) -> None:
    refused(run("parity", tiny_checkpoint(NAME, DTYPE), "--golden", damaged(bad)), bad.said)


@pytest.mark.parametrize("bad", DIFF, ids=lambda bad: bad.name)
def test_what_is_not_compared(bad: Bad, damaged: Damaged, sound: Path, run: Run) -> None:
    refused(run("diff", sound, damaged(bad)), bad.said)


def test_files_that_are_not_there(sound: Path, tmp_path: Path, run: Run) -> None:
    said = "is no file: give a trace that portkit record, or you, wrote"
    refused(run("diff", sound, tmp_path / "nowhere"), f"{tmp_path / 'nowhere'} {said}")
    refused(run("diff", tmp_path, sound), f"{tmp_path} {said}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--quick"], "leave --quick out"),
        (["--seed", "3"], "leave --seed out"),
        (["--port", "a:b"], "leave --port out"),
        (["--reference-attention", "eager"], "leave --reference-attention out"),
        (["--dtype", "float32"], "was recorded in bfloat16: leave --dtype float32 out"),
        (["--layers", "0-9"], "the model has 4 layers, 0 to 3"),
    ],
)
def test_options_that_a_recording_has_answered(
    options: list[str], said: str, sound: Path, run: Run, tiny_checkpoint: CheckpointMaker
) -> None:
    folder = tiny_checkpoint(NAME, DTYPE)
    refused(run("parity", folder, "--golden", sound, *options), said)


def test_inputs_take_all_sites_and_tokens(
    tmp_path: Path, run: Run, tiny_checkpoint: CheckpointMaker
) -> None:
    folder = tiny_checkpoint(NAME, DTYPE)
    for option in (["--last-tokens", "1"], ["--sites", "*"]):
        answer = run("record", folder, "-o", tmp_path / "trace", "--inputs", *option)
        refused(answer, "--inputs is for judging every site where it is made")
    assert not (tmp_path / "trace").exists()


def test_a_site_of_another_shape_is_a_finding(
    damaged: Damaged, run: Run, tiny_checkpoint: CheckpointMaker
) -> None:
    """The port computes something else there: that is an answer, and no bad input."""

    def narrower(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
        name = "short/model.layers.1.mlp"
        tensors[name] = tensors[name][..., :-1].contiguous()

    path = damaged(Bad("narrower", "", narrower))
    folder = tiny_checkpoint(NAME, DTYPE)
    code, out, _ = run("parity", folder, "--golden", path, "--json")
    first = json.loads(out)["first"]
    assert (code, first["site"], first["kind"]) == (1, "model.layers.1.mlp", "shape")
    assert first["misshapen"].startswith("[2, 12, 320] bfloat16 against [2, 12, 319] bfloat16")
