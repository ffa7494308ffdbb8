"""`portkit train` and `portkit plot` as processes: what they print, write and refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from parity_tests.training.conftest import Write, recipe
from portkit.cli import main
from portkit.errors import TrainingError
from portkit.training.plotting import plot
from portkit.training.recipe import Habits
from portkit.training.run import Inputs, train
from portkit.training.tracking import TrackerName, open_tracker

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--steps", "12", "--context", "20", "--batch-size", "4", "--device", "cpu"]
SETTINGS = [*SMALL, "--tokenizer", "characters"]


def portkit(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "portkit", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def in_process(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments)])
    code = caught.value.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


@pytest.fixture
def asked(text: Path, config_file: Write) -> list[str | Path]:
    return ["train", config_file(), "--data", text, *SETTINGS]


def test_train_then_everything_else(
    asked: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    code, out, err = in_process(capsys, *asked, "--out", run, "--json", "--eval-every", "6")
    assert code == 0, err
    told = json.loads(out)
    assert (told["command"], told["model"], told["steps"]) == ("train", str(run / "model"), 12)
    assert 1 < told["bits_per_byte"] < 8
    assert "step 6: held out" in err
    code, out, err = in_process(capsys, "inspect", told["model"], "--json")
    assert json.loads(out)["parameters"] == told["parameters"]
    code, out, err = in_process(capsys, "parity", told["model"], "--json")
    assert (code, json.loads(out)["verdict"]) == (0, "exact"), err
    asked_for = ("-p", "Lily", "--greedy", "--max-new-tokens", "5", "--json")
    code, out, err = in_process(capsys, "generate", told["model"], *asked_for)
    assert (code, len(json.loads(out)["token_ids"])) == (0, 5), err
    code, out, err = in_process(capsys, "plot", run)
    assert (code, out) == (0, f"wrote {run / 'curves.png'}\n"), err
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_sigterm_saves_and_the_same_command_goes_on(
    asked: list[str | Path], tmp_path: Path
) -> None:
    run, settings = tmp_path / "run", ["--steps", "3000", "--save-every", "1000"]
    process = portkit(*asked, *settings, "--out", run)
    deadline = time.monotonic() + 100
    while not (run / "run.jsonl").exists() or (run / "run.jsonl").stat().st_size < 500:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "portkit: error: interrupted"
    step = int((run / "steps" / "LATEST").read_text().strip().removeprefix("step-"))
    assert 0 < step < 1000
    process = portkit(*asked, *settings, "--out", run)
    assert process.stderr is not None
    assert f"note: going on from step {step} of 3000\n" in iter(process.stderr.readline, "")
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--final-rate", "1"], "the final rate 1 must lie between 0 and the peak"),
        (["--warmup-steps", "13"], "optimizer steps are counted"),
        (["--tokenizer", "bpe", "--vocab-size", "99"], "choose 512 to 32768"),
        (["--vocab-size", "999"], "--vocab-size goes with --tokenizer bpe"),
        (["--context", "65"], "max_position_embeddings 64"),
        (["--data", "nowhere.txt"], "there is no text at 'nowhere.txt'"),
        (["--held-out", "nowhere.txt"], "there is no text at 'nowhere.txt'"),
        (["--tokenizer", "./nowhere"], "nowhere"),
        (["--track", "trackio"], "pip install trackio"),
    ],
)
def test_bad_settings_are_one_line(
    more: list[str],
    complaint: str,
    asked: list[str | Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = in_process(capsys, *asked, "--out", tmp_path / "run", *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("portkit: error: ")
    assert complaint in err


def test_an_unknown_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--data", "x", "--out", tmp_path / "run", "--steps", "1")
    code, _, err = in_process(capsys, "train", "gpt5", *settings)
    assert code == 2
    assert "llama-1m" in err
    code, out, _ = in_process(capsys, "list", "--json")
    assert "llama-1m" in json.loads(out)["variants"]


def test_plot_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = in_process(capsys, "plot", tmp_path)
    assert code == 2
    assert "holds no steps to draw" in err


def test_plot_refuses_an_image_it_cannot_write(inputs: Inputs, tmp_path: Path) -> None:
    train(inputs, recipe(steps=3), tmp_path / "run", Habits(eval_every=0))
    for image in (tmp_path / "nowhere" / "a.png", tmp_path / "a.docx"):
        with pytest.raises(TrainingError, match=r"name a \.png, \.svg or \.pdf"):
            plot(tmp_path / "run", image)
    assert plot(tmp_path / "run", tmp_path / "a.svg").read_text().startswith("<?xml")


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A stand-in that remembers what it was told."""
    told: list[tuple[str, Any]] = []
    module = ModuleType("trackio")
    module.init = lambda **given: told.append(("init", given))  # type: ignore[attr-defined]
    module.log = lambda figures, step: told.append(("log", (step, figures)))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    return told


def test_figures_go_to_a_tracker(
    trackio: list[tuple[str, Any]], inputs: Inputs, tmp_path: Path
) -> None:
    watch = open_tracker(TrackerName.trackio, tmp_path / "run")
    records: list[Mapping[str, Any]] = []

    def both(record: Mapping[str, Any]) -> None:
        records.append(record)
        watch(record)

    train(inputs, recipe(steps=3), tmp_path / "run", Habits(eval_every=2), both)
    assert trackio[0] == ("init", {"project": "portkit", "name": "run"})
    logged = [one for kind, one in trackio if kind == "log"]
    losses = [(r["step"], r["loss"]) for r in records if r["event"] == "step"]
    assert [(s, f["step/loss"]) for s, f in logged if "step/loss" in f] == losses
    assert [s for s, f in logged if "evaluation/bits_per_byte" in f] == [2, 3]


def test_tensorboard(inputs: Inputs, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    watch = open_tracker(TrackerName.tensorboard, tmp_path / "run")
    train(inputs, recipe(steps=3), tmp_path / "run", Habits(), watch)
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.*"))
