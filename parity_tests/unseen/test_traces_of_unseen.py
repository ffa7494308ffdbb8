"""Recordings of families that have no port of ours: sites without tokens or rows, rows merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from parity_tests.unseen.conftest import UnseenMaker
from portkit.cli import app
from portkit.errors import TraceError, UnsupportedConfig
from portkit.parity.traces.trace_file import TraceFile

FAST = ("gpt2", "mamba")
NAMES = (*FAST, "deepseek_v3", "qwen3_next", "falcon_h1", "gpt_oss", "bloom", "mpt")


def asked(*words: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in words])


@pytest.mark.parametrize(
    "name", [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in NAMES]
)
def test_recorded_and_held_against_another(
    name: str, unseen_checkpoint: UnseenMaker, tmp_path: Path
) -> None:
    folder, files = unseen_checkpoint(name), (tmp_path / "a", tmp_path / "b")
    for file, further in zip(files, ((), ("--last-tokens", 2)), strict=True):
        answer = asked("record", folder, "-o", file, "--quick", *further)
        assert answer.exit_code == 0, answer.output
    whole = TraceFile(files[0])
    assert whole.floors is not None
    floors = [one.carried for one in whole.floors.values() if one.carried is not None]
    assert len(floors) > len(whole.sites) / 2
    assert 0 < max(floors) < 1e-5  # of float32

    answer = asked("diff", *files, "--json", "--gate", "exact")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["verdict"] == "exact"
    assert found["first_difference"] is None

    last = {"norm", "norm_f", "ln_f", "final_layernorm"}
    changed = next(one for one in whole.sites if one.rpartition(".")[2] in last)
    with safe_open(files[0], "pt") as held:
        tensors = {one: held.get_tensor(one) for one in held.keys()}  # noqa: SIM118
        metadata = held.metadata()
    key = next(one for one in tensors if one.endswith(f"/{changed}"))
    tensors[key] = tensors[key] * 1.5
    save_file(tensors, files[1], metadata)
    found = json.loads(asked("diff", *files, "--json").stdout)
    assert (found["verdict"], found["first_difference"]) == ("diverged", changed)


def test_a_recording_is_no_reference_where_there_is_no_port(
    unseen_checkpoint: UnseenMaker, tmp_path: Path
) -> None:
    folder = unseen_checkpoint("mamba")
    asked("record", folder, "-o", tmp_path / "a", "--quick", "--no-floors")
    answer = asked("parity", folder, "--golden", tmp_path / "a")
    assert isinstance(answer.exception, UnsupportedConfig)
    assert "there is no port here to hold against a recording" in str(answer.exception)


@pytest.mark.parametrize(
    ("dims", "shape", "said"),
    [
        ("batch position query", (2, 3, 3), "more than one of"),
        ("channel channel", (2, 3), "each there once"),
        ("", (2,), "each there once"),
        ("batch position channel", (7, 4), "not made of these"),
        ("head stream channel", (6, 4), "not made of these"),
        ("batch position channel", (8, 4), "the pass has 3 tokens"),
        ("batch channel", (4, 2, 2), "not made of these"),
    ],
)
def test_dims_are_checked(dims: str, shape: tuple[int, ...], said: str, tmp_path: Path) -> None:
    answer = _diff_of(dims, shape, tmp_path / "a")
    assert isinstance(answer.exception, TraceError)
    assert said in str(answer.exception)


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        ("batch position channel", (6, 4)),
        ("batch position channel", (2, 3, 4)),
        ("batch channel", (2, 4)),
        ("stream batch position channel", (5, 2, 3, 4)),
        ("batch head position", (8, 3)),
        ("length", (5, 7)),
        ("head channel", (5, 7)),
    ],
)
def test_whatever_a_site_is_made_of(dims: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    answer = _diff_of(dims, shape, tmp_path / "a")
    assert answer.exit_code == 0, answer.output


def _diff_of(dims: str, shape: tuple[int, ...], file: Path) -> Result:
    """A recording of one site, held against itself."""
    import torch

    ids = [[1, 2, 3], [4, 5, 6]]
    trace = {
        "format": 1,
        "model": "mine",
        "engine": "numpy",
        "dtype": "float32",
        "passes": [{"name": "short", "input_ids": ids, "positions": [[0, 1, 2]] * 2}],
        "sites": [{"name": "layer", "dims": dims}],
    }
    tensors = {"short/layer": torch.arange(float(torch.Size(shape).numel())).view(shape)}
    save_file(tensors, file, {"portkit.trace": json.dumps(trace)})
    return asked("diff", file, file, "--gate", "exact")
