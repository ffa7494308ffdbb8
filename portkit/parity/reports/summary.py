"""A parity result in words: verdict, a row for each layer, the first culprit, what was not seen.

Layers that are exact stand together in one row; one that is not opens up to its sites. What is
printed is plain text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from portkit.columns import table
from portkit.parity.gradients import GradientParity
from portkit.parity.judging.judge import (
    FLOOR_FACTOR,
    SAME_FUNCTION,
    Judgement,
    Verdict,
    relative,
    worst,
)
from portkit.parity.judging.ledger import SiteAccount, Worst
from portkit.parity.result import Comparison, ParityResult
from portkit.parity.teeth.diagnose import Cause
from portkit.shown import shown

_OPENED_LAYERS, _OPENED_SITES = 3, 4
_LAYER = re.compile(r"(.*\blayers)\.(\d+)\b")
Row = tuple[str, str, str, str, str, str]
HEADINGS: Row = ("where", "sites", "verdict", "local error", "floor", "carried")

KINDS = {
    "function": "it computes another function",
    "care": "the same function, computed with less care than the reference",
    "glue": "the code between modules made it so",
    "shape": "it has another shape",
    "missing": "the port does not have it",
}

_UNASKED = {
    "function": "it is too far off for a lack of care; it could not be asked in float64",
    "care": "further from the truth than the reference is; whether it is the same function could "
    "not be asked in float64",
}

GRADIENT_KINDS = {
    **KINDS,
    "function": "it is the gradient of another function",
    "care": "the same gradient, computed with less care than the reference's",
    "missing": "the reference has no such parameter",
}


def text(result: ParityResult) -> list[str]:
    """What stands below the verdict: counts, layers, the first culprit, what was not seen."""
    lines = [f"  {line}" for line in headline(result)]
    for number, comparison in enumerate(result.comparisons):
        if number == 0 or comparison.verdict is not Verdict.exact:
            lines += ["", *table([HEADINGS, *layer_rows(comparison)]).splitlines()]
    for part in (details(result), caveats(result)):
        if part:
            lines += ["", *part]
    return [shown(line) for line in lines]


def headline(result: ParityResult) -> list[str]:
    """The verdict and the counts behind it."""
    lines = []
    for one in result.comparisons:
        passes, tokens = len(one.probe), sum(each.input_ids.numel() for each in one.probe)
        named = [name for each in one.probe for name in each.inputs or ()]
        what = f"inputs {', '.join(named)}" if named else f"{passes} passes of {tokens:,} tokens"
        lines.append(
            f"{one.dtype}: {one.num_exact:,} of {len(one.judgements):,} sites equal in every bit "
            f"over {what}"
        )
    caught = [] if result.teeth is None else [f"this probe {result.teeth.line}"]
    return [*lines, *_generation(result), *_gradients(result), *caught]


def groups(comparison: Comparison | GradientParity) -> dict[str, list[Judgement]]:
    """The sites of each layer, and of each part around the layers, in order of execution."""
    found: dict[str, list[Judgement]] = {}
    for one in comparison.judgements:
        found.setdefault(_group(one.site), []).append(one)
    return found


def layer_rows(comparison: Comparison) -> list[Row]:
    """A row for each run of layers that are alike; under one that is not exact, its sites."""
    rows, opened = [], 0
    alike_ones = groupby(groups(comparison).items(), lambda it: _alike(comparison, *it))
    for (_, verdict, _), members in alike_ones:
        alike = list(members)
        sites = [one for _, each in alike for one in each]
        rows.append(_row(comparison, _named([name for name, _ in alike]), sites))
        if verdict is not Verdict.exact and opened < _OPENED_LAYERS:
            opened += 1
            rows += _opened(comparison, alike[0][0], alike[0][1])
    return rows


def details(result: ParityResult) -> list[str]:
    """The first culprit of each comparison: what it is, and the values side by side.

    Without one, the first site that is rounding for a known cause: it fails the exact gate.
    """
    lines = []
    for comparison in result.comparisons:
        if not comparison.culprits:
            for one, cause in comparison.rounded[:1]:
                lines.append(f"rounding in {comparison.dtype}, first at {one.site}")
                lines += [f"  {said}" for said in (cause.sentence, *support(cause))]
            continue
        first, others = comparison.culprits[0], len(comparison.culprits) - 1
        lines.append(f"first culprit in {comparison.dtype}: {first.site}")
        if (why := comparison.causes.get(first.site)) is not None:
            lines += [f"  {said}" for said in (why.sentence, *support(why))]
        account = comparison.accounts[first.site]
        lines.append(f"  {first.kind}: {said_kind(account, first)}{evidence(first)}")
        if account.misshapen:
            lines.append(f"  port {account.misshapen} of the reference")
        for record in account.unequal[:1]:
            lines.append(
                f"  {record.name}: {record.num_unequal:,} of {record.num_values:,} values differ; "
                "the largest differences:"
            )
            lines += [f"    {side_by_side(one)}" for one in record.worst]
        if others:
            named = ", ".join(one.site for one in comparison.culprits[1:4])
            lines.append(f"  and {others} more: {named}{', …' if others > 3 else ''}")
    return [*lines, *_gradient_details(result)]


def said_kind(account: SiteAccount, one: Judgement) -> str:
    """A culprit's kind in a sentence, which claims no more than was asked."""
    kind = one.kind or "function"
    refused = account.function_refused and not account.function_asked
    return _UNASKED.get(kind, KINDS[kind]) if refused else KINDS[kind]


def support(cause: Cause) -> list[str]:
    """What speaks for a cause: how much it explains, and what comes next."""
    others = ", ".join(f"{name} {share(explains)}" for name, explains in cause.alternatives[:2])
    if not cause.faults:
        return [f"closest: {others}"] if others else []
    names = " + ".join(one.id for one in cause.faults)
    runner = f"; next: {others}" if others else ""
    return [f"{names} explains {share(cause.explains)} of the difference{runner}"]


def share(explains: float) -> str:
    """`99.98 %`; all of it only where nothing is left."""
    return "100 %" if explains >= 1 else f"{min(100 * explains, 99.9999):.6g} %"


def caveats(result: ParityResult) -> list[str]:
    """What was not verified, and what was done to be able to compare."""
    return [
        *(f"note: {one}" for one in result.notes),
        *(f"not verified: {one.name} ({one.reason})" for one in result.not_verified),
    ]


def figure(value: float | None) -> str:
    """`1.2e-3`, or nothing."""
    return "" if value is None else f"{value:.1e}"


def side_by_side(one: Worst) -> str:
    """A value that differs: its place, and what either side has there."""
    token = "" if one.row is None else f"row {one.row}, position {one.position}, "
    return f"{token}{one.place}: port {one.port:.9g}, reference {one.reference:.9g}"


def in_passes(one: Judgement) -> str:
    """`in long, chunk.1, padded, …`: the first passes in which a site differs."""
    return f"in {', '.join(one.passes[:3])}{', …' if len(one.passes) > 3 else ''}"


def _generation(result: ParityResult) -> Iterator[str]:
    found = result.generation
    if found is None:
        return
    num_tokens = len(found.reference_tokens)
    if found.is_equal:
        yield (
            f"generation: {num_tokens} of {num_tokens} greedy tokens equal, KL at most "
            f"{found.max_kl:.1e}"
        )
        return
    first = found.first_difference
    assert first is not None
    explained = (
        "which rounding explains" if first.is_rounding else "which rounding does not explain"
    )
    yield (
        f"generation: differs at step {first.step}, port {first.port_token} for "
        f"{first.reference_token}, by {max(first.port_gap, first.reference_gap):.3g} in the logits "
        f"(floor {first.floor:.1e}), {explained}; top-1 agreement "
        f"{found.top1_agreement:.0%}, KL at most {found.max_kl:.1e}"
    )


def _gradients(result: ParityResult) -> Iterator[str]:
    found = result.gradients
    if found is None:
        return
    num_parameters = len(found.judgements)
    yield (
        f"gradients: {found.num_exact:,} of {num_parameters:,} parameters' equal in every bit over "
        f"{found.num_tokens:,} tokens; after a step of AdamW {found.num_equal_after_step:,} of "
        f"{num_parameters:,} parameters equal"
    )


def _gradient_details(result: ParityResult) -> Iterator[str]:
    found = result.gradients
    if found is None or not found.culprits:
        return
    first, others = found.culprits[0], len(found.culprits) - 1
    yield f"first wrong gradient: {first.site.removesuffix(' (gradient)')}"
    yield f"  {first.kind}: {GRADIENT_KINDS[first.kind or 'function']}{evidence(first)}"
    if found.places:
        # What is wrong there is how what follows is differentiated.
        named = ", ".join(found.places[:3])
        yield f"  made at {named}{', …' if len(found.places) > 3 else ''}"
    if others:
        yield f"  and {others:,} more parameters, behind it in the backward pass"


def _group(site: str) -> str:
    if site.endswith("(parameter)"):
        return "parameters"
    found = _LAYER.match(site)
    if found:
        return found[0]
    if "#cos" in site or "#sin" in site:
        return "rotary tables"
    return site.partition(":")[0]


def _alike(
    comparison: Comparison, name: str, members: list[Judgement]
) -> tuple[str, Verdict, object]:
    """Exact layers stand together where they are carried alike; everything else alone."""
    found = _LAYER.match(name)
    verdict = worst(one.verdict for one in members)
    if found is None or verdict is not Verdict.exact:
        return name, verdict, None
    return found[1], verdict, (_carried(comparison, members), len(members))


def _carried(comparison: Comparison, members: Iterable[Judgement]) -> bool:
    return any(comparison.accounts[one.site].carried for one in members)


def carried(comparison: Comparison, members: Iterable[Judgement]) -> str:
    """The largest error that the sites carry, as relative RMS; or that there is one, or none."""
    accounts = [comparison.accounts[one.site] for one in members]
    if not any(one.carried for one in accounts):
        return "equal"
    errors = (relative(one.carried_error, one.truth) for one in accounts)
    return figure(max(filter(None, errors), default=None)) or "differs"


def _named(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{names[0]} to {names[-1].rpartition('.')[2]}"


def _row(comparison: Comparison, name: str, members: list[Judgement]) -> Row:
    verdict = worst(one.verdict for one in members)
    floor = max((one.floor for one in members if one.floor is not None), default=None)
    return (
        name,
        f"{len(members):,}",
        str(verdict),
        "",
        figure(floor) if verdict is Verdict.exact else "",
        "" if name == "parameters" else carried(comparison, members),
    )


def _opened(comparison: Comparison, name: str, members: list[Judgement]) -> list[Row]:
    unequal = [one for one in members if one.verdict is not Verdict.exact]
    # What diverged before what is rounding; in the order of execution otherwise.
    unequal.sort(key=lambda one: one.verdict is not Verdict.diverged)
    rows: list[Row] = []
    for one in unequal[:_OPENED_SITES]:
        passes = f" {in_passes(one)}" if one.passes else ""
        where = f"  {one.site.removeprefix(name).lstrip('.')}{passes}"
        said = f"{one.verdict}, {one.kind}" if one.kind else str(one.verdict)
        errors = figure(one.local_error), figure(one.floor), carried(comparison, [one])
        rows.append((where, "", said, *errors))
    if len(unequal) > _OPENED_SITES:
        rows.append((f"  and {len(unequal) - _OPENED_SITES} more", "", "", "", "", ""))
    return rows


def causes(printed: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any] | None]:
    """The causes that a command's object names, by dtype and site."""
    told = (*printed["culprits"], *printed.get("rounded", ()))
    return {(one["dtype"], one["site"]): one["cause"] for one in told}


def said_cause(cause: Mapping[str, Any] | None) -> str:
    """A culprit's cause in a sentence; nothing where none was found."""
    if cause is None:
        return ""
    return str(cause.get("sentence") or cause["fault"])


def evidence(one: Judgement) -> str:
    """By how much a site diverged, in brackets; or nothing."""
    if one.function_error is not None and one.function_error > SAME_FUNCTION:
        return f" ({figure(one.function_error)} apart in float64, {SAME_FUNCTION:.0e} is the same)"
    if one.local_error is not None and one.floor:
        ratio = one.local_error / one.floor
        times = f"{ratio:.3g}" if math.isfinite(ratio) else "not finite, and so any number of"
        return f" ({times} times its distance from the truth, up to {FLOOR_FACTOR} is rounding)"
    return ""
