"""A run's curves as one image: loss, learning rate, gradient norm, throughput over steps.

Reads `run.jsonl`; draws with matplotlib, which is an optional extra and imported only here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from portkit.errors import TrainingError
from portkit.training.journal import read_lines, series

_PANELS = (
    ("loss", "nats per token"),
    ("learning_rate", "learning rate"),
    ("gradient_norm", "gradient norm"),
    ("tokens_per_s", "tokens per second"),
)


def plot(run: Path, image: Path) -> Path:
    """Draw the run in the folder `run` into `image` (.png, .svg, .pdf, as its name ends).

    Raises TrainingError where there is nothing to draw, nothing to draw with, or nowhere to put it.
    """
    records = read_lines(run)
    if not series(records, "step", "loss"):
        raise TrainingError(f"{run} holds no steps to draw: give the --out folder of a run")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrainingError("matplotlib is not installed: pip install 'portkit[plot]'") from error
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        _line(axes, series(records, "step", key), key, color="C0")
        if key == "loss":
            _line(axes, series(records, "evaluation", "nats_per_token"), "held out", color="C1")
            axes.set_yscale("log")
            axes.legend()
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.suptitle(run.name)
    try:
        figure.savefig(image)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{image} cannot be written ({error}): name a .png, .svg or .pdf somewhere else"
        ) from error
    return image


def _line(axes: Any, points: Sequence[tuple[int, float]], label: str, color: str) -> None:
    steps, values = zip(*points, strict=True) if points else ((), ())
    alone = "o" if len(points) == 1 else None  # a single point is no line
    axes.plot(steps, values, color=color, label=label, linewidth=1, marker=alone)
