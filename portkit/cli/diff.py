"""`portkit diff`: two traces against each other, without either model.

Knows options and streams; what they mean is in `portkit.parity.traces.trace_diff`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from portkit.cli import options, parity
from portkit.cli.output import print_json, say
from portkit.shown import shown

Trace = Annotated[Path, typer.Argument(metavar="A", help="The trace that is held to be right.")]
Other = Annotated[Path, typer.Argument(metavar="B", help="The trace that is held against it.")]
Gate = Annotated[
    parity.Gate,
    typer.Option(
        "--gate", help="What passes: equal in every bit, or differences that are rounding."
    ),
]


def command(
    first: Trace,
    second: Other,
    *,
    gate: Gate = parity.Gate.rounding,
    json: options.Json = False,
) -> None:
    """Hold a trace against another, whoever wrote them: what differs first, and by how much."""
    from portkit.parity.reports import schema
    from portkit.parity.traces.trace_diff import diff
    from portkit.parity.traces.trace_file import TraceFile

    traces = TraceFile(first), TraceFile(second)
    found = diff(*traces)
    if json:
        first_of = traces[0].provenance
        print_json(
            "diff",
            gate=gate,
            device=first_of.device,
            threads=first_of.threads,
            **schema.as_fields(found.result),
            traces=[{"file": str(one), **vars(one.provenance)} for one in traces],
            first_difference=found.first_difference,
            only=[found.only_in_first, found.only_in_second],
        )
    else:
        verdict = parity.coloured_verdict(found.result.verdict)
        print(f"{verdict}: {shown(f'{second} against {first}')}")
        for name, one in zip("AB", (each.provenance for each in traces), strict=True):
            say(f"  {name}: {one.model} by {one.engine} in {one.dtype}")
        if found.first_difference:
            say(f"  the first site that differs is {found.first_difference}")
        parity.print_report(found.result)
    parity.exit_by(found.result.verdict, gate)
