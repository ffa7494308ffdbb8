"""`portkit load`: plan, load, check, write back; prints what a person wants to know."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portkit.cli import options
from portkit.cli.output import human_bytes, plural, print_json, progress_bar, say
from portkit.columns import table

if TYPE_CHECKING:
    from portkit.loading import Blueprint, LoadedModel
    from portkit.weights import Drop


def command(
    repo: options.Repo,
    revision: options.Revision = None,
    dtype: options.DTypeOption = options.DType.auto,
    device: options.DeviceOption = options.Device.auto,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan as a table; read no tensor.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read every byte: finite values, sha256 of each file.")
    ] = False,
    export_to: Annotated[
        Path | None,
        typer.Option(
            "--export", metavar="DIR", help="Write the loaded model back, text model only."
        ),
    ] = None,
    ignore_config: options.IgnoreConfig = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read a .bin of plain tensors if that is all.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Load a checkpoint into its port: every tensor accounted for."""
    from portkit.checking import check as check_bytes
    from portkit.exporting import export
    from portkit.loading import draw, materialize, open_checkpoint

    if dry_run and (check or export_to is not None):
        raise typer.BadParameter("--dry-run reads no tensor: leave out --check and --export")
    checkpoint = open_checkpoint(repo, revision, allow_pickle)
    blueprint = draw(checkpoint, ignore_config=ignore_config or ())
    num_parameters = len(blueprint.plan.claims)  # a misfit is said before every byte is read
    if dry_run:
        _print_plan(blueprint, json)
        return
    digests = {}
    if check:
        with progress_bar("check", len(checkpoint.tensors)) as advance:
            digests = check_bytes(checkpoint, advance)
    with progress_bar("load", num_parameters) as advance:
        loaded = materialize(blueprint, dtype, device, advance)
    if export_to is not None:
        export(loaded, export_to)
    if json:
        _print_json(loaded, digests, export_to)
    else:
        _print_report(repo, loaded, digests, export_to)


def _print_report(
    repo: str, loaded: LoadedModel, digests: dict[str, str], export_to: Path | None
) -> None:
    report = loaded.report
    rows = [
        ("model", f"{repo}: {loaded.architecture.model_type} ({loaded.architecture.summary})"),
        ("parameters", f"{report.parameters:,}"),
        ("read", f"{plural(report.tensors, 'tensor')}, {human_bytes(report.bytes)}"),
        ("dtype", f"{report.dtype}{_stored(report.stored_dtypes, report.dtype)}"),
        *(("dropped", line) for line in _dropped_lines(report.dropped)),
        *(("tied", f"{tied.parameter} = {tied.to}") for tied in report.tied),
        *(("note", note) for note in report.notes),
        *(
            ("not verified", f"{key} of config.json was ignored")
            for key in loaded.blueprint.ignored
        ),
        *(("checked", f"{name}: all finite, sha256 {digest}") for name, digest in digests.items()),
        ("took", f"{report.seconds * 1000:.0f} ms on {next(loaded.model.parameters()).device}"),
    ]
    if export_to is not None:
        rows.append(("exported", str(export_to)))
    print(table(rows))


def _print_json(loaded: LoadedModel, digests: dict[str, str], export_to: Path | None) -> None:
    report = loaded.report
    print_json(
        "load",
        model_type=loaded.architecture.model_type,
        parameters=report.parameters,
        tensors=report.tensors,
        bytes=report.bytes,
        dtype=report.dtype,
        stored_dtypes=report.stored_dtypes,
        dropped=[{"name": drop.source, "because": drop.because} for drop in report.dropped],
        tied=[{"parameter": tied.parameter, "to": tied.to} for tied in report.tied],
        notes=list(report.notes),
        not_verified=_not_verified(loaded.blueprint),
        sha256=digests,
        exported=str(export_to) if export_to is not None else None,
        seconds=report.seconds,
    )


def _print_plan(blueprint: Blueprint, json: bool) -> None:
    plan, tensors = blueprint.plan, blueprint.checkpoint.tensors
    if json:
        print_json(
            "load",
            dry_run=True,
            model_type=blueprint.architecture.model_type,
            parameters=blueprint.num_parameters,
            tensors=len(plan.sources),
            bytes=sum(tensors[name].num_bytes for name in plan.sources),
            plan=[
                {
                    "parameter": claim.parameter,
                    "rule": type(claim.rule).__name__.lower(),
                    "sources": list(claim.sources),
                    "shape": list(claim.shape),
                    "dtype": tensors[claim.sources[0]].dtype,
                    "files": sorted({tensors[name].file for name in claim.sources}),
                }
                for claim in plan.claims
            ],
            tied=[{"parameter": tied.parameter, "to": tied.to} for tied in plan.tied],
            dropped=[{"name": drop.source, "because": drop.because} for drop in plan.dropped],
            not_verified=_not_verified(blueprint),
        )
        return
    rows: list[tuple[str, ...]] = [("parameter", "rule", "shape", "dtype", "from", "file")]
    for claim in plan.claims:
        infos = [tensors[name] for name in claim.sources]
        source = (
            claim.sources[0] if len(infos) == 1 else f"{len(infos)} tensors, {claim.sources[0]} …"
        )
        rows.append(
            (
                claim.parameter,
                type(claim.rule).__name__.lower(),
                "x".join(map(str, claim.shape)),
                infos[0].dtype,
                "=" if source == claim.parameter else source,
                infos[0].file,
            )
        )
    rows += [(tied.parameter, "tie", "", "", tied.to, "") for tied in plan.tied]
    print(table(rows))
    for line in _dropped_lines(plan.dropped):
        say(f"dropped: {line}")
    say(
        f"complete: {plural(sum(len(claim.sources) for claim in plan.claims), 'tensor')} for "
        f"{blueprint.num_parameters:,} parameters of {blueprint.architecture.model_type}; "
        "nothing was read",
        aside=True,
    )


def _not_verified(blueprint: Blueprint) -> list[dict[str, Any]]:
    return [
        {"name": f"config.json: {key}", "reason": "ignored on request"} for key in blueprint.ignored
    ]


def _dropped_lines(dropped: tuple[Drop, ...]) -> list[str]:
    reasons = dict.fromkeys(drop.because for drop in dropped)
    lines = []
    for reason in reasons:
        names = [drop.source for drop in dropped if drop.because == reason]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{plural(len(names), 'tensor')} ({names[0]}{more}): {reason}")
    return lines


def _stored(stored: dict[str, int], computed: str) -> str:
    words = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    if list(stored) == [words[computed]]:
        return ", as stored"
    return " (stored as " + ", ".join(f"{word} x{count}" for word, count in stored.items()) + ")"
