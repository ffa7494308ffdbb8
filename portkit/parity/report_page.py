"""The page of a parity result: one HTML file that asks for nothing from outside.

Knows what stands where and how large an error looks; `report.html.j2` knows the marks and colours,
and escapes all that it is given. Judges nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from torch import Tensor

from portkit.parity import summary
from portkit.parity.judge import FLOOR_FACTOR, Judgement, Verdict, relative
from portkit.parity.ledger import Distance, PassRecord, SiteAccount
from portkit.parity.probe import Probe
from portkit.parity.result import Comparison, ParityResult

_LEVELS = (FLOOR_FACTOR, 10.0, 1e2, 1e4)
"""Bounds, as multiples of the floor, between the shades of an error."""
_MOST_CULPRITS, _MOST_NAMED, _MOST_RECORDS = 12, 200, 4
_POINTS = 120
"""Of a picture by channel: neighbours are pooled until there are no more."""
_PARAMETER = " (parameter)"
_LAYER = re.compile(r"(.*\blayers\.\d+)\b(.*)")


@dataclass(frozen=True)
class _Cell:
    shade: str
    """Classes: `e`, `r` or `d` and a level for the local error, `q` or `c` and one for carried.
    A parameter has the first alone, in either view."""
    said: str


@dataclass(frozen=True)
class _Map:
    title: str
    columns: tuple[str, ...]
    rows: dict[str, dict[str, _Cell]]


@dataclass(frozen=True)
class _Picture:
    """Distances by channel on a logarithmic scale, in a box of 600 by 120."""

    port: str
    floor: str
    ticks: tuple[tuple[float, str], ...]
    num_channels: int
    pooled: int
    worst: str


@dataclass(frozen=True)
class _Culprit:
    judgement: Judgement
    kind: str
    carried: str
    account: SiteAccount
    records: list[PassRecord]
    picture: _Picture | None


def page(result: ParityResult, repo: str, command: str, printed: Mapping[str, Any]) -> str:
    """The whole file. `printed` is the command's object, of which the surroundings are shown."""
    environment = Environment(
        loader=PackageLoader("portkit.parity", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = lambda value: summary.figure(value) or "none"
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
                "culprits": [_culprit(one, each) for each in one.culprits[:_MOST_CULPRITS]],
                "others": [each.site for each in one.culprits[_MOST_CULPRITS:][:_MOST_NAMED]],
                "passes": list(_passes(one.probe)),
            }
            for one in result.comparisons
        ],
    )


def _maps(comparison: Comparison) -> list[_Map]:
    """Sites as rows and columns: the layers, what is around them, and both as they were loaded."""
    maps: dict[str, dict[str, dict[str, _Cell]]] = {
        "Layers": {},
        "Around the layers": {},
        "Parameters as loaded": {},
    }
    for one in comparison.judgements:
        title, row, column = _place(one.site)
        maps[title].setdefault(row, {})[column] = _cell(one, comparison.accounts[one.site])
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


def _culprit(comparison: Comparison, one: Judgement) -> _Culprit:
    account = comparison.accounts[one.site]
    kind = one.kind or "function"
    carried = summary.figure(relative(account.carried_error, account.truth))
    return _Culprit(
        judgement=one,
        kind=f"{kind}: {summary.KINDS[kind]}{summary.evidence(one)}",
        carried=(carried or "differs") if account.carried else "equal",
        account=account,
        records=account.unequal[:_MOST_RECORDS],
        picture=_picture(account),
    )


def _picture(account: SiteAccount) -> _Picture | None:
    """The port's distance from the truth and the reference's own, by channel; None without them."""
    truth = account.truth.per_channel
    if truth is None or account.port.per_channel is None or not account.floors:
        return None
    pooled = math.ceil(len(truth) / _POINTS)
    port = _by_channel(account.port, truth, pooled)
    floor = torch.stack([_by_channel(o, truth, pooled) for o in account.floors.values()]).amax(0)
    both = torch.cat([port, floor])
    measured = both[both.isfinite() & (both > 0)].log10()
    low = math.floor(float(measured.min())) if len(measured) else -1
    high = max(math.ceil(float(measured.max())) if len(measured) else 0, low + 1)
    ticks = tuple(
        (120 * (high - power) / (high - low), f"1e{power}") for power in sorted({low, high})
    )
    worst = int((port / floor.clamp(min=10.0**low)).nan_to_num(nan=math.inf).argmax())
    last = min(len(truth), (worst + 1) * pooled) - 1
    return _Picture(
        port=_line(port, low, high),
        floor=_line(floor, low, high),
        ticks=ticks,
        num_channels=len(truth),
        pooled=pooled,
        worst=f"{worst * pooled}" if pooled == 1 else f"{worst * pooled} to {last}",
    )


def _by_channel(distance: Distance, truth: Tensor, pooled: int) -> Tensor:
    """Relative RMS of so many neighbouring channels together, (points,)."""
    channels = truth.new_zeros(len(truth)) if distance.per_channel is None else distance.per_channel
    sums, whole = (
        torch.nn.functional.pad(one, (0, -len(one) % pooled)).view(-1, pooled).sum(1)
        for one in (channels, truth)
    )
    return (sums / whole.where(whole > 0, 1.0)).sqrt()


def _line(values: Tensor, low: int, high: int) -> str:
    step = 600 / max(1, len(values) - 1)
    places = values.nan_to_num(nan=math.inf).log10().clamp(low, high)
    heights = (120 * (high - places) / (high - low)).tolist()
    return " ".join(f"{step * i:.0f},{height:.1f}" for i, height in enumerate(heights))


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
