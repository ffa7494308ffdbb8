"""`portkit parity`: does the port compute what the reference computes, and where not?"""

from __future__ import annotations

import re
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from portkit.cli import options
from portkit.cli.output import print_json, table

if TYPE_CHECKING:
    from portkit.parity.compare import ParityResult
    from portkit.parity.judge import Judgement


class Gate(StrEnum):
    exact = "exact"
    rounding = "rounding"


def command(
    repo: options.Repo,
    revision: options.Revision = None,
    dtype: options.DTypeOption = options.DType.auto,
    attention: options.AttentionOption = options.Attention.sdpa,
    gate: Annotated[
        Gate, typer.Option("--gate", help="exact: equal in every bit; rounding: or as careful.")
    ] = Gate.exact,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="How many threads compute; bits depend on it.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of the probe's token ids.")] = 0,
    json: options.Json = False,
) -> None:
    """Hold every activation of the port against the reference in Transformers."""
    import torch

    from portkit.loading import load
    from portkit.parity.compare import compare
    from portkit.parity.probe import default_probe
    from portkit.parity.reference import load_reference

    torch.set_num_threads(threads)
    loaded = load(repo, revision=revision, dtype=dtype, device="cpu", attention=attention)
    # What was just read lies in one folder, a repository's in the Hub's cache.
    folder = loaded.files.path("config.json").parent
    reference = load_reference(folder, getattr(torch, loaded.report.dtype), attention)
    looked_on = sys.stderr.isatty()

    def tell(name: str) -> None:
        if looked_on:
            print(f"\r\x1b[K{name}", end="", file=sys.stderr, flush=True)

    probe = default_probe(loaded.model, seed)
    result = compare(loaded, reference, probe, tell=tell)
    if looked_on:
        print("\r\x1b[K", end="", file=sys.stderr)
    if json:
        _print_json(result, gate, loaded.report.dtype, threads, seed)
    else:
        print(
            f"{result.verdict}: {repo} in {loaded.report.dtype}, {attention}, {threads} thread(s)"
        )
        print(
            f"{result.num_exact} of {len(result.judgements)} sites exact over {len(probe)} passes\n"
        )
        print(table(_layer_rows(result)))
        for one in result.not_verified:
            print(f"not verified: {one.name} ({one.reason})")
    if result.verdict != "exact" and not (gate == "rounding" and result.verdict == "rounding"):
        raise typer.Exit(1)


def _layer_rows(result: ParityResult) -> list[tuple[str, ...]]:
    """A row for each layer; under one that is not exact, its sites that are not."""
    groups: dict[str, list[Judgement]] = {}
    for one in result.judgements:
        found = re.match(r"(model\.layers\.\d+)\b", one.site)
        groups.setdefault(found[1] if found else one.site.partition(":")[0], []).append(one)
    rows: list[tuple[str, ...]] = [("where", "sites", "verdict", "local error", "floor", "carried")]
    for name, members in groups.items():
        worst = max(members, key=lambda one: ("exact", "rounding", "diverged").index(one.verdict))
        carried = any(result.accounts[one.site].carried for one in members)
        rows.append(
            (name, str(len(members)), str(worst.verdict), "", "", "differs" if carried else "equal")
        )
        for one in members:
            if one.verdict != "exact":
                kind = f", {one.kind}" if one.kind else ""
                error, floor = _figure(one.local_error), _figure(one.floor)
                where = (
                    f"  {one.site.removeprefix(name).lstrip('.')} in {', '.join(one.passes[:3])}"
                )
                rows.append((where, "", f"{one.verdict}{kind}", error, floor, ""))
    return rows


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _print_json(result: ParityResult, gate: Gate, dtype: str, threads: int, seed: int) -> None:
    culprits = [
        {
            "site": one.site,
            "pass": one.passes[0] if one.passes else None,
            "passes": list(one.passes),
            "kind": one.kind,
            "local_error": one.local_error,
            "floor": one.floor,
            "function_error": one.function_error,
            "cause": None,
        }
        for one in result.culprits
    ]
    print_json(
        "parity",
        verdict=result.verdict,
        gate=gate,
        dtype=dtype,
        device="cpu",
        threads=threads,
        probe={"seed": seed, "passes": [one.name for one in result.probe]},
        sites=len(result.judgements),
        exact=result.num_exact,
        culprits=culprits,
        first=culprits[0] if culprits else None,
        not_verified=[vars(one) for one in result.not_verified],
    )
