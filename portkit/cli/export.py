"""`portkit export`: a checkpoint in another shape.

The language model of a multimodal one, or a smaller model out of a larger one. Knows how widths and
layers are spelled; what a slice is `portkit.slicing` knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from portkit.cli import options
from portkit.cli.output import human_bytes, plural, print_json, progress_bar, say


def command(
    repo: options.Repo,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder, new or empty.")],
    revision: options.Revision = None,
    dtype: options.DTypeOption = options.DType.auto,
    matformer: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHS",
            help="Feed-forward widths of the slice: one, or one a layer, as in 8192x10,4096x20.",
        ),
    ] = None,
    drop_layers: Annotated[
        str | None,
        typer.Option(metavar="LAYERS", help="Layers that the slice leaves out, as in 20-24."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Write a checkpoint in another shape: the text model alone, or a MatFormer slice of it."""
    from portkit.exporting import export, exported_config
    from portkit.loading import draw, materialize, open_checkpoint
    from portkit.slicing import slice_of

    if drop_layers is not None and matformer is None:
        raise typer.BadParameter("--drop-layers goes with --matformer WIDTHS")
    widths = () if matformer is None else _widths(matformer)
    dropped = frozenset() if drop_layers is None else _layers(drop_layers)
    blueprint = draw(open_checkpoint(repo, revision))
    with progress_bar("load", len(blueprint.plan.claims)) as advance:
        loaded = materialize(blueprint, dtype, "cpu", advance)
    if widths:
        loaded = slice_of(loaded, widths, dropped)
    export(loaded, directory)
    num_bytes = sum(one.nbytes for one in loaded.model.parameters())
    written = exported_config(loaded)["model_type"]  # of a multimodal one the text model's
    if json:
        print_json(
            "export",
            model_type=written,
            parameters=loaded.report.parameters,
            bytes=num_bytes,
            dtype=loaded.report.dtype,
            layers=loaded.config.num_hidden_layers,
            directory=str(directory),
        )
        return
    say(
        f"wrote  {directory}: {written}, "
        f"{plural(loaded.config.num_hidden_layers, 'layer')}, "
        f"{loaded.report.parameters:,} parameters, {human_bytes(num_bytes)}"
    )


def _widths(text: str) -> tuple[int, ...]:
    """`8192` or `8192x10,4096x20`: each width, as often as it says."""
    found: list[int] = []
    for part in text.split(","):
        width, _, times = part.strip().partition("x")
        if not (width.isdecimal() and (times or "1").isdecimal() and 0 < int(width) < 2**24):
            raise typer.BadParameter(f"--matformer {text}: give widths as in 8192x10,4096x20")
        found += [int(width)] * min(int(times or 1), 4096)
    return tuple(found)


def _layers(text: str) -> frozenset[int]:
    """`20-24` or `3,7,20-24`, counted from 0."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise typer.BadParameter(f"--drop-layers {text}: give layers as in 3,20-24")
        found.update(range(int(first), min(int(last or first), 4096) + 1))
    return frozenset(found)
