"""Speeds as an image: tokens per second by context, a line an engine. Knows rows and matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from portkit.bench.decode import Row
from portkit.errors import BenchError


def plot_speeds(rows: Sequence[Row], path: Path) -> None:
    """Write the image; the format is the file name's. Raises BenchError for one unknown."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for engine in dict.fromkeys(row.engine for row in rows):
        for batch in dict.fromkeys(row.batch for row in rows):
            mine = [row for row in rows if row.engine == engine and row.batch == batch]
            label = engine if batch == 1 else f"{engine}, {batch} rows"
            speeds = [row.tokens_per_s for row in mine]
            axes.plot([row.context for row in mine], speeds, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens before it")
    axes.set_ylabel("tokens per second")
    axes.legend()
    try:
        figure.savefig(path)
    except ValueError as error:
        raise BenchError(f"--plot {path}: {error}") from error
