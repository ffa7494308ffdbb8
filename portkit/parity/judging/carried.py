"""Judging by carried errors: two recordings, or a free run and one, where no truth is at hand.

A recording says how far its own model had come from the truth at a site. Whoever is as careful may
have come as far in another direction, so the two may be apart by the sum; and no further. What is
smaller than that may hide a mistake: of that whoever judges here has to speak. At the first site
that differs nothing was carried yet, if all before it was seen: there the site's own floor counts,
which is much less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from portkit.parity.judging.judge import CHANNEL_FACTOR, FLOOR_FACTOR, Judgement, Verdict, relative
from portkit.parity.judging.ledger import Distance, SiteAccount, difference, squares_of
from portkit.parity.judging.tables import is_table, within_frequencies
from portkit.parity.probes.probe import Pass
from portkit.parity.subject.dims import apart, rows, same_shape, token_dim
from portkit.parity.traces.trace_file import RecordedFloor

Floors = Mapping[str, RecordedFloor]


class CarriedErrors:
    """Accounts of sites, in order of execution: one side's tensors held against a recording's."""

    def __init__(self) -> None:
        self.accounts: dict[str, SiteAccount] = {}
        self.shortened = False
        """Whether one side had more tokens of a site than the other."""
        self.mixed_dtypes: set[str] = set()
        self._turned: set[str] = set()
        """Rotary tables that are further apart than rounded frequencies make them."""

    def account(self, site: str, dims: str) -> SiteAccount:
        return self.accounts.setdefault(site, SiteAccount(site, dims, is_glue=":in" in site))

    def hold(self, one: Pass, site: str, dims: str, pair: tuple[Tensor, Tensor]) -> None:
        """Add a site of a pass: ours and the recorded one, at the tokens that both have."""
        account, place = self.account(site, dims), token_dim(dims)
        pair = apart(pair[0], dims, one), apart(pair[1], dims, one)
        kinds = [each.is_floating_point() for each in pair]
        if len({each.dim() for each in pair}) > 1 or kinds[0] != kinds[1]:
            self._misshapen(account, one, pair)
            return
        ours, theirs = pair
        if place is not None:
            kept = min(each.shape[place] for each in pair)
            self.shortened |= any(each.shape[place] > kept for each in pair)
            ours, theirs = (each.narrow(place, each.shape[place] - kept, kept) for each in pair)
        if not same_shape(dims, ours, theirs):
            self._misshapen(account, one, pair)
            return
        if ours.dtype != theirs.dtype:
            self.mixed_dtypes.update(_word(each) for each in pair)
            wide = torch.promote_types(ours.dtype, theirs.dtype)  # which holds the values of both
            ours, theirs = ours.to(wide), theirs.to(wide)
        found = difference(one, dims, ours, theirs)
        if found is not None and is_table(site) and not within_frequencies(one, ours, theirs):
            self._turned.add(site)
        if found is not None:
            account.unequal.append(found)
            account.carried.append(one.name)
        if all(kinds):
            a, b = rows(ours, dims, one), rows(theirs, dims, one)
            _add(account, a, b, is_equal=found is None)

    def _is_near(self, account: SiteAccount) -> bool:
        """A table that differs, and by no more than another rounding of its frequencies."""
        name = account.name
        compared = account.misshapen is None and not account.missing and not account.exact
        return compared and is_table(name) and name not in self._turned

    def _misshapen(self, account: SiteAccount, one: Pass, pair: tuple[Tensor, Tensor]) -> None:
        ours, theirs = (f"{list(each.shape)} {_word(each)}" for each in pair)
        account.misshapen = account.misshapen or f"{ours} against {theirs} in {one.name}"
        account.carried.append(one.name)

    def judge(
        self, floors: Floors | None, is_whole: bool, left_out: Iterable[str] = ()
    ) -> tuple[Judgement, ...]:
        """Judge every site. `is_whole`: nothing was left out before one, but the sites `left_out`:
        what they would have shown is in doubt within the modules that they are parts of.
        """
        doubtful = {site.partition(":")[0].rpartition(".")[0] for site in left_out}
        found: list[Judgement] = []
        for account in self.accounts.values():
            before = {one.verdict for one in found}
            floor = (floors or {}).get(account.name)
            if Verdict.diverged in before and not account.exact:
                found.append(_judgement(account, Verdict.inconclusive))
            elif floor is not None and self._is_near(account):
                found.append(_judgement(account, Verdict.rounding, None, floor.rms))
            else:
                is_sure = is_whole and not _is_within(account.name, doubtful)
                found.append(_judge(account, floor, is_sure and before <= {Verdict.exact}))
        return tuple(found)


def _is_within(site: str, modules: Iterable[str]) -> bool:
    return any(
        site == one or site.startswith((f"{one}." if one else "", f"{one}#", f"{one}:"))
        for one in modules
    )


def _judge(account: SiteAccount, floor: RecordedFloor | None, is_first: bool) -> Judgement:
    if account.exact:
        return _judgement(account, Verdict.exact)
    error = carried_error(account)
    if account.missing or account.misshapen is not None:
        kind = "missing" if account.missing else "shape"
        return _judgement(account, Verdict.diverged, kind)
    kind = "glue" if account.is_glue else "function"
    if error is None or math.isinf(error):  # a mask, or NaN on one side
        return _judgement(account, Verdict.diverged, kind)
    measure = None if floor is None else floor.rms if is_first else floor.carried
    if floor is None or measure is None:
        return _judgement(account, Verdict.inconclusive)
    within = error <= allowed(measure) and (not is_first or _within_channels(account, floor))
    if within:
        return _judgement(account, Verdict.rounding, None, measure)
    return _judgement(account, Verdict.diverged, kind, measure)


def allowed(floor: float) -> float:
    """How far two that are both careful may be apart: one by the floor, one by what is rounding."""
    return (1 + FLOOR_FACTOR) * floor


def carried_error(account: SiteAccount) -> float | None:
    """Relative RMS of the difference; None where nothing was measured."""
    return relative(account.carried_error, account.truth)


def _judgement(
    account: SiteAccount, verdict: Verdict, kind: str | None = None, floor: float | None = None
) -> Judgement:
    passes = tuple(one.name for one in account.unequal)
    return Judgement(account.name, verdict, kind, None, floor, None, None, passes)


def _within_channels(account: SiteAccount, floor: RecordedFloor) -> bool:
    """Each channel is within its own floor and twice the larger of it and the site's."""
    if floor.channels is None or floor.rms is None:
        return True
    gap, length = (_pooled(one, floor.pooled) for one in (account.carried_error, account.truth))
    own = torch.tensor(floor.channels, dtype=torch.float64)
    most = own + CHANNEL_FACTOR * own.clamp(min=floor.rms)
    return bool((gap <= most * most * length).all())


def _pooled(distance: Distance, width: int) -> Tensor:
    assert distance.per_channel is not None, "asked of a site that was measured"
    channels = distance.per_channel
    padded = torch.nn.functional.pad(channels, (0, -len(channels) % width))
    return padded.view(-1, width).sum(1)


def _add(account: SiteAccount, ours: Tensor, theirs: Tensor, is_equal: bool) -> None:
    """Add the squares of (rows, channels)."""
    length = squares_of(theirs)
    account.truth.add(length, len(theirs))
    gap = torch.zeros_like(length) if is_equal else squares_of(ours, theirs)
    account.carried_error.add(gap, len(theirs))


def _word(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
