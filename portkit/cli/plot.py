"""`portkit plot`: the curves of a training run as an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from portkit.cli import options
from portkit.cli.output import print_json, say


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The --out folder of a run.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="IMAGE", help="A .png, .svg or .pdf; else RUN/curves.png."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Draw loss, learning rate, gradient norm and throughput of a run."""
    from portkit.training.plotting import plot

    image = plot(run, out or run / "curves.png")
    if json:
        print_json("plot", image=str(image))
    else:
        say(f"wrote {image}")
