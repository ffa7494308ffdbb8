"""Two processes under FSDP2 train as one does: each loss within rounding, whoever goes on.

They talk through gloo on the CPU; what is tested is what does not depend on the device.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from parity_tests.training.conftest import CONFIG, recipe, same_weights, weights
from portkit.errors import TrainingError
from portkit.loading import load
from portkit.parity.reference import load_reference
from portkit.training import journal
from portkit.training.beginnings import build
from portkit.training.loop import Trainer
from portkit.training.ranks import Ranks
from portkit.training.recipe import Habits, OptimizerName, Recipe
from portkit.training.run import Inputs, train

HABITS = Habits(eval_every=6, save_every=100)
STOP = 5

ROOT = Path(__file__).resolve().parents[2]
Runs = list[tuple[Path, Recipe, int]]


def with_two_ranks(inputs: Inputs, runs: Runs) -> None:
    told = [(str(run), asdict(recipe), stop) for run, recipe, stop in runs]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [
            *launch,
            "-m",
            "parity_tests.training.on_every_rank",
            json.dumps([asdict(inputs), asdict(HABITS), told]),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def losses(run: Path) -> list[float]:
    found = journal.series(journal.read_lines(run), "step", "loss")
    assert [step for step, _ in found] == list(range(1, 13))
    return [loss for _, loss in found]


def stop(record: Mapping[str, Any]) -> None:
    if record["event"] == "step" and record["step"] == STOP:
        os.kill(os.getpid(), signal.SIGTERM)


def test_two_ranks_train_as_one_does(inputs: Inputs, tmp_path: Path) -> None:
    plain = recipe()
    one, one_to_two = tmp_path / "one", tmp_path / "one-to-two"
    two, two_to_two = tmp_path / "two", tmp_path / "two-to-two"
    train(inputs, plain, one, HABITS)
    with pytest.raises(KeyboardInterrupt):
        train(inputs, plain, one_to_two, HABITS, stop)
    two_to_one = tmp_path / "two-to-one"
    with_two_ranks(
        inputs,
        [
            (two, plain, 0),
            (two_to_one, plain, STOP),
            (two_to_two, plain, STOP),
            (two_to_two, plain, 0),
            (one_to_two, plain, 0),
        ],
    )
    train(inputs, plain, two_to_one, HABITS)

    expected = losses(one)
    for run in (two, one_to_two, two_to_one):
        assert losses(run) == pytest.approx(expected, rel=2e-6), run.name
    assert losses(two)[:STOP] == losses(two_to_one)[:STOP]
    assert losses(one)[:STOP] == losses(one_to_two)[:STOP]
    assert same_weights(two, two_to_two)
    for name, tensor in weights(two).items():
        torch.testing.assert_close(tensor, weights(one)[name], rtol=1e-3, atol=1e-4)
    evaluations = [
        journal.series(journal.read_lines(run), "evaluation", "bits_per_byte") for run in (one, two)
    ]
    assert evaluations[1] == [
        (step, pytest.approx(bits, rel=1e-5)) for step, bits in evaluations[0]
    ]

    ids = torch.arange(20)[None]
    ours = load(two / "model", device="cpu").model(ids)
    theirs = load_reference(two / "model", torch.float32).model(input_ids=ids).logits
    assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_so_they_do_with_muon_and_accumulation(inputs: Inputs, tmp_path: Path) -> None:
    """Muon works on whole matrices, in bfloat16: the ranks have to gather them."""
    muon = recipe(optimizer=OptimizerName.muon, accumulation=2)
    train(inputs, muon, tmp_path / "one", HABITS)
    with_two_ranks(inputs, [(tmp_path / "two", muon, 0)])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    model = build(CONFIG, 0, torch.device("cpu"))
    with pytest.raises(TrainingError, match="make --batch-size a multiple of 6"):
        Trainer(model, recipe(accumulation=2), None, Ranks(0, 3, torch.device("cpu")))  # type: ignore[arg-type]
