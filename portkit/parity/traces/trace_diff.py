"""Two traces against each other, whoever wrote them: what differs, where first, and by how much.

Neither model is at hand, so every error is carried. Knows how passes and sites are brought together
and what is then not verified; `carried` judges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from portkit.errors import TraceError
from portkit.parity.judging.carried import CarriedErrors
from portkit.parity.judging.judge import Verdict
from portkit.parity.probes.probe import Pass, Probe
from portkit.parity.result import Comparison, NotVerified, ParityResult
from portkit.parity.traces.trace_file import TraceFile, names

CARRIED = NotVerified(
    "mistakes smaller than what rounding carries",
    "errors are compared as they are carried from the tokens on, not where they are made",
)


@dataclass(frozen=True)
class TraceDiff:
    """The second trace held against the first."""

    result: ParityResult
    first_difference: str | None
    """The first site that is not equal in every bit."""
    only_in_first: tuple[str, ...]
    """Sites, in order of execution."""
    only_in_second: tuple[str, ...]


def diff(first: TraceFile, second: TraceFile) -> TraceDiff:
    """Hold the second trace against the first. Raises `TraceError` where they share nothing."""
    passes = tuple(_common_passes(first, second))
    only_first = tuple(site for site in first.sites if site not in second.sites)
    only_second = tuple(site for site in second.sites if site not in first.sites)
    errors = CarriedErrors()
    for site, dims in first.sites.items():
        if site in only_first:
            continue
        if second.sites[site] != dims:
            account = errors.account(site, dims)
            account.misshapen = f"[{second.sites[site]}] against [{dims}]"
            continue
        for one in passes:
            if first.shape(one, site) and second.shape(one, site):
                errors.hold(one, site, dims, (second.read(one, site), first.read(one, site)))
    if not errors.accounts:
        raise TraceError(
            f"{first} and {second} have no site in common: {names(first.sites)} there, "
            f"{names(second.sites)} here; sites are spelled as docs/traces.md says"
        )
    left_out = [*_left_out(first, second, passes), *_tokens_left_out(errors)]
    floors = second.floors if first.floors is None else first.floors
    source = second if first.floors is None else first
    is_whole = source.is_whole and not left_out
    judgements = errors.judge(floors, is_whole, only_first)
    comparison = Comparison(
        first.provenance.dtype,
        Probe(first.probe.name, passes),
        judgements,
        errors.accounts,
    )
    not_verified = [*_only(first, only_first), *_only(second, only_second), *left_out]
    if any(one.verdict is Verdict.rounding for one in judgements):
        not_verified.append(CARRIED)
    if comparison.verdict is Verdict.inconclusive:
        not_verified.append(_unjudged(floors is None))
    notes = tuple(_notes(first, second, errors))
    return TraceDiff(
        ParityResult((comparison,), None, tuple(not_verified), notes),
        next((name for name, account in errors.accounts.items() if not account.exact), None),
        only_first,
        only_second,
    )


def _common_passes(first: TraceFile, second: TraceFile) -> Iterator[Pass]:
    others = {one.name: one for one in second.probe}
    common = [one for one in first.probe if one.name in others]
    if not common:
        raise TraceError(
            f"{first} and {second} have no pass in common: {_pass_names(first)} there, "
            f"{_pass_names(second)} here; record both on one probe (--tokens FILE)"
        )
    for one in common:
        what = _difference(one, others[one.name])
        if what:
            raise TraceError(
                f"{first} and {second} are of different probes: pass {one.name!r} has other "
                f"{what}; record both on one (--tokens FILE)"
            )
        yield one


def _difference(one: Pass, other: Pass) -> str | None:
    for what in ("input_ids", "positions"):
        ours, theirs = getattr(one, what), getattr(other, what)
        if ours.shape != theirs.shape or not torch.equal(ours, theirs):
            return what
    masks = [
        torch.ones_like(each.input_ids) if each.attention_mask is None else each.attention_mask
        for each in (one, other)
    ]
    tokens = min(mask.shape[1] for mask in masks)  # where there is none, the past is real too
    if not torch.equal(*(mask[:, -tokens:].bool() for mask in masks)):
        return "attention_mask"
    return None if one.continues == other.continues else "passes before it"


def _pass_names(trace: TraceFile) -> str:
    return names(one.name for one in trace.probe)


def _only(trace: TraceFile, sites: tuple[str, ...]) -> Iterator[NotVerified]:
    if sites:
        yield NotVerified(f"sites {names(sites)} ({len(sites)})", f"only {trace} has them")


def _left_out(
    first: TraceFile, second: TraceFile, common: tuple[Pass, ...]
) -> Iterator[NotVerified]:
    known = {one.name for one in common}
    for trace in (first, second):
        alone = [one.name for one in trace.probe if one.name not in known]
        if alone:
            yield NotVerified(f"passes {names(alone)} ({len(alone)})", f"only {trace} has them")


def _tokens_left_out(errors: CarriedErrors) -> Iterator[NotVerified]:
    if errors.shortened:
        yield NotVerified("all but the last tokens", "one of the two traces keeps no others")


def _unjudged(without_floors: bool) -> NotVerified:
    reason = (
        "neither trace has floors: portkit record measures them"
        if without_floors
        else "the floors of the trace do not say how far it was carried from the truth"
    )
    return NotVerified("whether rounding explains the differences", reason, was_meant=True)


def _notes(first: TraceFile, second: TraceFile, errors: CarriedErrors) -> Iterator[str]:
    yield "errors are carried: without the models none can be judged where it is made"
    if errors.mixed_dtypes:
        yield f"{' and '.join(sorted(errors.mixed_dtypes))} are compared in float64"
    digests = first.provenance.config_sha256, second.provenance.config_sha256
    if None not in digests and digests[0] != digests[1]:
        yield "the two were recorded of different config.json files"
