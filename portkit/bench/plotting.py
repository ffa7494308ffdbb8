"""Speeds as an image: tokens per second by context, a colour for each engine, a stroke for each
size of batch. Knows rows and matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from portkit.bench.decode import Row
from portkit.errors import BenchError


def plot_speeds(rows: Sequence[Row], path: Path) -> None:
    """Write the image; the format is the file name's. Raises BenchError for one unknown."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    batches = list(dict.fromkeys(row.batch for row in rows))
    for number, engine in enumerate(dict.fromkeys(row.engine for row in rows)):
        for batch, style in zip(batches, cycle(("-", "--", ":", "-.")), strict=False):
            mine = [row for row in rows if row.engine == engine and row.batch == batch]
            if mine:
                axes.plot(
                    [row.context for row in mine],
                    [row.tokens_per_s for row in mine],
                    color=f"C{number}",
                    linestyle=style,
                    marker="o",
                    label=engine if batch == 1 else f"{engine}, {batch} rows",
                )
    axes.set_xscale("log", base=2)
    contexts = sorted({row.context for row in rows})
    axes.set_xticks(contexts, labels=[f"{one:,}" for one in contexts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens before it")
    axes.set_ylabel("tokens per second")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise BenchError(f"--plot {path}: {error}") from error
