"""A run's figures in TensorBoard or trackio as well, for whoever has one of them installed.

`run.jsonl` is written in any case and holds more. Knows how each of the two takes a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from portkit.errors import TrainingError

_NOT_FIGURES = {"event", "step", "steps"}


class TrackerName(StrEnum):
    tensorboard = "tensorboard"
    trackio = "trackio"


def open_tracker(name: TrackerName, run: Path) -> Callable[[Mapping[str, Any]], None]:
    """What puts the figures of each record under `event/figure`, at its step.

    Raises TrainingError where the package is not installed.
    """
    try:
        match name:
            case TrackerName.tensorboard:
                log = _tensorboard(run / "tensorboard")
            case TrackerName.trackio:
                log = _trackio(run)
    except ImportError as error:
        raise TrainingError(
            f"{name} is not installed ({error}): pip install {name}, or leave out --track"
        ) from error

    def watch(record: Mapping[str, Any]) -> None:
        figures = {
            f"{record['event']}/{key}": float(value)
            for key, value in record.items()
            if key not in _NOT_FIGURES and isinstance(value, int | float)
        }
        if record["event"] in ("step", "evaluation"):
            log(figures, record["step"])

    return watch


def _tensorboard(folder: Path) -> Callable[[dict[str, float], int], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder))

    def log(figures: dict[str, float], step: int) -> None:
        for key, value in figures.items():
            writer.add_scalar(key, value, step)

    return log


def _trackio(run: Path) -> Callable[[dict[str, float], int], None]:
    import trackio  # type: ignore[import-not-found]  # optional, and not in the constraints

    trackio.init(project="portkit", name=run.resolve().name)

    def log(figures: dict[str, float], step: int) -> None:
        trackio.log(figures, step=step)

    return log
