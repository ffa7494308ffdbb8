"""The page of a parity result: one HTML file that asks for nothing from outside.

Knows what stands where and how large an error looks; `report.html.j2` knows the marks and colours,
and escapes all that it is given. Judges nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import Environment, PackageLoader

from portkit.parity.judging.judge import FLOOR_FACTOR, Judgement, Verdict, relative
from portkit.parity.judging.ledger import PassRecord, SiteAccount
from portkit.parity.probes.probe import Probe
from portkit.parity.reports import summary
from portkit.parity.reports.detail import (
    MOST_DETAILED,
    ChannelError,
    Distribution,
    distribution,
    worst_channels,
)
from portkit.parity.reports.pictures import Bars, Lines, bars, lines
from portkit.parity.result import Comparison, ParityResult
from portkit.shown import shown

_LEVELS = (FLOOR_FACTOR, 10.0, 1e2, 1e4)
"""Bounds, as multiples of the floor, between the shades of an error."""
_MOST_NAMED, _MOST_RECORDS = 200, 4
_PARAMETER = " (parameter)"
_LAYER_ROW = re.compile(r"^.*\blayers\.(?=\d+$)")
_LAYER = re.compile(r"(.*\blayers\.\d+)\b(.*)")


@dataclass(frozen=True)
class _Cell:
    shade: str
    """Classes: `e`, `r` or `d` and a level for the local error, `q` or `c` and one for carried.
    A parameter has the first alone, in either view."""
    said: str
    anchor: str = ""
    """Where more is told of it; empty where nothing is."""


@dataclass(frozen=True)
class _Map:
    title: str
    columns: tuple[str, ...]
    rows: dict[str, dict[str, _Cell]]


@dataclass(frozen=True)
class _Culprit:
    judgement: Judgement
    anchor: str
    cause: Mapping[str, Any] | None
    kind: str
    carried: str
    account: SiteAccount
    records: list[PassRecord]
    distribution: Distribution | None
    bars: Bars | None
    channels: list[ChannelError]
    lines: Lines | None


def page(result: ParityResult, repo: str, command: str, printed: Mapping[str, Any]) -> str:
    """The whole file. `printed` is the command's object, of which the surroundings are shown."""
    environment = Environment(
        loader=PackageLoader("portkit.parity.reports", "."),
        autoescape=True,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["label"] = lambda row: _LAYER_ROW.sub("layer ", row)
    environment.filters["figure"] = lambda value: summary.figure(value) or "none"
    environment.filters["said_cause"] = summary.said_cause
    causes = summary.causes(printed)
    return environment.get_template("report.html.j2").render(
        result=result,
        repo=repo,
        command=command,
        printed=printed,
        headline=summary.headline(result),
        comparisons=[
            {
                "found": one,
                "maps": _maps(one),
                "culprits": [
                    _culprit(one, each, causes.get((one.dtype, each.site)))
                    for each in one.culprits[:MOST_DETAILED]
                ],
                "others": [each.site for each in one.culprits[MOST_DETAILED:][:_MOST_NAMED]],
                "passes": list(_passes(one.probe)),
            }
            for one in result.comparisons
        ],
    )


def _printable(value: Any) -> Any:
    """Foreign words as they are shown everywhere; what is markup already stays."""
    return shown(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _maps(comparison: Comparison) -> list[_Map]:
    """Sites as rows and columns: the layers, what is around them, and both as they were loaded."""
    maps: dict[str, dict[str, dict[str, _Cell]]] = {
        "Layers": {},
        "Around the layers": {},
        "Parameters as loaded": {},
    }
    told = {one.site: _anchor(comparison, one) for one in comparison.culprits[:MOST_DETAILED]}
    for one in comparison.judgements:
        title, row, column = _place(one.site)
        cell = _cell(one, comparison.accounts[one.site])
        maps[title].setdefault(row, {})[column] = replace(cell, anchor=told.get(one.site, ""))
    return [
        _Map(title, tuple(dict.fromkeys(column for row in rows.values() for column in row)), rows)
        for title, rows in maps.items()
        if rows
    ]


def _place(site: str) -> tuple[str, str, str]:
    name = site.removesuffix(_PARAMETER)
    layer = _LAYER.fullmatch(name)
    if name != site:
        row, column = (layer[1], layer[2]) if layer else (name.rpartition(".")[0], ".weight")
        return "Parameters as loaded", row, column if layer else name[len(row) :]
    if layer:
        return "Layers", layer[1], layer[2]
    row = re.split("[:#]", name)[0]
    return "Around the layers", row, name[len(row) :]


def _cell(one: Judgement, account: SiteAccount) -> _Cell:
    local = {Verdict.exact: "e", Verdict.rounding: "r"}.get(one.verdict, "d")
    said = [f"{one.verdict}, {one.kind}" if one.kind else str(one.verdict)]
    if local != "e":
        local += f" l{_level(one.local_error, one.floor)}"
        said.append(f"error {summary.figure(one.local_error) or 'without a figure'}")
    if one.floor is not None:
        said.append(f"floor {summary.figure(one.floor)}")
    if one.passes:
        said.append(summary.in_passes(one))
    if one.site.endswith(_PARAMETER):  # which is not run, so nothing is carried to it
        return _Cell(local, "; ".join(said))
    if not account.carried:
        return _Cell(f"{local} q", "; ".join(said))
    carried = relative(account.carried_error, account.truth)
    said.append(f"carried {summary.figure(carried) or 'differs'}")
    return _Cell(f"{local} c k{_level(carried, one.floor)}", "; ".join(said))


def _level(error: float | None, floor: float | None) -> int:
    """0 within what is rounding, up to 4; what has no measure is the darkest."""
    if error is None or not floor or not math.isfinite(error):
        return len(_LEVELS)
    return sum(error / floor > bound for bound in _LEVELS)


def _culprit(comparison: Comparison, one: Judgement, cause: Mapping[str, Any] | None) -> _Culprit:
    account = comparison.accounts[one.site]
    kind = one.kind or "function"
    carried = summary.figure(relative(account.carried_error, account.truth))
    spread = distribution(account)
    return _Culprit(
        judgement=one,
        anchor=_anchor(comparison, one),
        cause=cause,
        kind=f"{kind}: {summary.said_kind(account, one)}{summary.evidence(one)}",
        carried=(carried or "differs") if account.carried else "equal",
        account=account,
        records=account.unequal[:_MOST_RECORDS],
        distribution=spread,
        bars=None if spread is None else bars(spread),
        channels=worst_channels(account),
        lines=lines(account),
    )


def _anchor(comparison: Comparison, one: Judgement) -> str:
    """What a site's cell points at; names of sites are foreign, so their number stands for them."""
    return f"{comparison.dtype}-{comparison.culprits.index(one)}"


def _passes(probe: Probe) -> Iterator[dict[str, Any]]:
    for one in probe:
        yield {
            "name": one.name,
            "continues": one.continues or "",
            "rows": len(one.input_ids),
            "tokens": one.num_tokens,
            "past": probe.past(one),
            "positions": f"{int(one.positions.min())} to {int(one.positions.max())}",
            "padding": int((~one.real).sum()),
            "logits": one.num_logits or one.num_tokens,
        }
