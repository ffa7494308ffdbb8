"""Parity: one probe, both sides, every site; who differs, where first, how much, and how far.

For each pass the reference runs and is recorded; the port runs freely (carried errors) and taught
(local errors); then both run block by block in float64, which gives the truth, the reference's
floor, and whether the two compute the same function at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.loading import LoadedModel
from portkit.nn.cache import Cache
from portkit.parity.judge import Judgement, Verdict, judge, overall
from portkit.parity.ledger import Ledger, PassRecord, SiteAccount, difference, rows
from portkit.parity.local import (
    Calls,
    Taught64,
    Trace,
    block_modules,
    calls_kept,
    looked_at,
    recorder,
    taught,
)
from portkit.parity.precision import UnliftedCast
from portkit.parity.probe import Pass, Probe
from portkit.parity.reference import Reference, additive
from portkit.parity.sites import PortSide, SiteTable, watching

LOGITS = "#logits"
LOGITS_DIMS = "batch position vocabulary"
HEAD = "lm_head"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class NotVerified:
    """What this comparison did not see, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class ParityResult:
    """Everything that one comparison found."""

    verdict: Verdict
    judgements: tuple[Judgement, ...]
    """Every site, in order of execution."""
    accounts: dict[str, SiteAccount]
    not_verified: tuple[NotVerified, ...]
    probe: Probe

    @property
    def culprits(self) -> tuple[Judgement, ...]:
        """Sites that diverged where they are made, in order of execution."""
        return tuple(one for one in self.judgements if one.verdict is Verdict.diverged)

    @property
    def num_exact(self) -> int:
        return sum(one.verdict is Verdict.exact for one in self.judgements)


def compare(
    loaded: LoadedModel,
    reference: Reference,
    probe: Probe,
    tell: Tell = lambda _: None,
) -> ParityResult:
    """Run `probe` on both sides and judge every site. `tell` is given a line for each pass."""
    comparison = _Comparison(loaded.model, SiteTable(loaded.architecture.sites), reference, probe)
    comparison.compare_parameters()
    for one in probe:
        tell(one.name)
        comparison.run(one)
    judgements = tuple(map(judge, comparison.ledger.sites.values()))
    assert judgements, "nothing was compared"
    return ParityResult(
        overall(judgements),
        judgements,
        comparison.ledger.sites,
        tuple(
            NotVerified(f"{name}: the same function", f"the port cannot run in float64: {reason}")
            for name, reason in comparison.unasked.items()
        ),
        probe,
    )


@dataclass
class _Local:
    """What the taught port gave where it was not equal."""

    unequal: Trace = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)


class _Comparison:
    def __init__(
        self, model: CausalLM, table: SiteTable, reference: Reference, probe: Probe
    ) -> None:
        self.model, self.table, self.reference = model, table, reference
        self.port = PortSide(model)
        self.ledger = Ledger()
        self.unasked: dict[str, str] = {}
        """Blocks of the port that cannot be run in float64, and why."""
        self._longest = sum(one.input_ids.shape[1] for one in probe)
        self._reference_caches: dict[str, Any] = {}
        self._free_caches: dict[str, Cache] = {}
        self._taught_caches: dict[str, Cache] = {}
        self._composite = {
            name
            for name, module in self.port.module_sites().items()
            if any(True for _ in module.children())
        }

    @torch.no_grad()
    def compare_parameters(self) -> None:
        """Both sides read the same file, each by its own map: what they hold is compared first."""
        theirs = {
            f"{name}.{own}": parameter
            for name, module in self.reference.module_sites().items()
            for own, parameter in module.named_parameters(recurse=False)
        }
        for name, ours in self.model.named_parameters(remove_duplicate=False):
            account = self.ledger.site(f"{name} (parameter)", "", is_glue=False)
            held = theirs.get(name)
            if held is None:
                account.missing = True
            elif held.shape != ours.shape or held.dtype != ours.dtype:
                account.misshapen = f"{tuple(ours.shape)} {ours.dtype} against {held.dtype}"
            elif not torch.equal(ours, held):
                gap = (ours.double() - held.double()).abs()
                record = PassRecord("as loaded", int((ours != held).sum()), float(gap.max()), [])
                account.unequal.append(record)

    @torch.no_grad()
    def run(self, one: Pass) -> None:
        """One pass: record, run freely, run taught, and hold both against the truth."""
        trace: Trace = {}
        with (
            watching(self.reference, self.table, recorder(trace)),
            calls_kept(self.reference, self.table) as reference_calls,
        ):
            trace[LOGITS] = self.reference.run(one, self._reference_caches)
        self._run_freely(one, trace)
        local = _Local()
        port_calls = self._run_taught(one, trace, local)
        for name in trace:
            account = self._account(name)
            account.missing = account.missing or name not in local.seen
        self._judge_in_float64(one, trace, local, reference_calls, port_calls)

    def _run_freely(self, one: Pass, trace: Trace) -> None:
        def look(name: str, ours: Tensor, theirs: Tensor) -> None:
            account = self._account(name)
            if ours.shape[1:] != theirs.shape[1:]:
                account.carried.append(one.name)
            elif difference(one, account.dims, ours, theirs) is not None:
                account.carried.append(one.name)
                if ours.is_floating_point():
                    gap = rows(ours, account.dims, one).double() - rows(theirs, account.dims, one)
                    account.carried_error.add(gap)

        with watching(self.port, self.table, looked_at(trace, look)):
            logits = self._step(one, self._free_caches)
        look(LOGITS, logits, trace[LOGITS])

    def _run_taught(self, one: Pass, trace: Trace, local: _Local) -> Calls:
        def compare_one(name: str, ours: Tensor, theirs: Tensor) -> None:
            local.seen.add(name)
            account = self._account(name)
            if ours.shape[1:] != theirs.shape[1:] or ours.dtype != theirs.dtype:
                account.misshapen = account.misshapen or (
                    f"{list(ours.shape)} {ours.dtype} against {list(theirs.shape)} {theirs.dtype}"
                )
                return
            record = difference(one, account.dims, ours, theirs)
            if record is not None:
                account.unequal.append(record)
                local.unequal[name] = ours.clone()

        with (
            calls_kept(self.port, self.table) as calls,
            watching(self.port, self.table, taught(trace, compare_one)),
        ):
            logits = self._step(one, self._taught_caches)
        compare_one(LOGITS, logits, trace[LOGITS])
        return calls

    def _step(self, one: Pass, caches: dict[str, Cache]) -> Tensor:
        batch, num_tokens = one.input_ids.shape
        cache = (
            caches.pop(one.continues)
            if one.continues
            else self.model.new_cache(batch, self._longest)
        )
        logits: Tensor = self.model(one.input_ids, one.positions, cache, one.attention_mask)
        cache.advance(num_tokens)
        caches[one.name] = cache
        return logits

    def _judge_in_float64(
        self, one: Pass, trace: Trace, local: _Local, reference_calls: Calls, port_calls: Calls
    ) -> None:
        truth64 = Taught64(self.reference, self.table, trace, reference_calls)
        port64 = Taught64(self.port, self.table, trace, port_calls)
        self._add(one, trace, local, truth64.tables(), port64.tables())
        for name in block_modules(self.reference, self.table):
            if name == HEAD:
                self._add_head(one, trace, local, truth64, port64)
                continue
            truth = truth64.block(name)
            try:
                port = port64.block(name)
            except UnliftedCast as error:  # a question that cannot be asked: the floor decides
                self.unasked[name] = str(error)
                port = {}
            self._add(one, trace, local, truth, port)
            self._add_other_kernels(one, name, trace, truth, reference_calls)

    def _add(self, one: Pass, trace: Trace, local: _Local, truth: Trace, port: Trace) -> None:
        for name, exact in truth.items():
            if name not in trace or not exact.is_floating_point() or name not in local.seen:
                continue
            account = self._account(name)
            held = rows(exact, account.dims, one)
            recorded = rows(trace[name], account.dims, one)
            account.truth.add(held)
            floor = recorded.double() - held
            account.floors.setdefault(self.reference.attention, type(account.truth)()).add(floor)
            ours = local.unequal.get(name)
            account.port.add(
                floor if ours is None else rows(ours, account.dims, one).double() - held
            )
            if name in port and port[name].shape == exact.shape:
                account.function_asked = True
                account.function.add(rows(port[name], account.dims, one) - held)

    def _add_head(
        self, one: Pass, trace: Trace, local: _Local, truth64: Taught64, port64: Taught64
    ) -> None:
        account = self._account(HEAD)
        width = trace[HEAD].shape[-1]
        ours = local.unequal.get(HEAD)
        account.function_asked = True
        pairs = zip(truth64.head_blocks(HEAD), port64.head_blocks(HEAD), strict=True)
        for (channels, exact), (_, port) in pairs:
            held = rows(exact, account.dims, one)
            floor = rows(trace[HEAD][..., channels], account.dims, one).double() - held
            account.truth.add(held, channels, width)
            account.floors.setdefault(self.reference.attention, type(account.truth)()).add(
                floor, channels, width
            )
            gap = floor
            if ours is not None:
                gap = rows(ours[..., channels], account.dims, one).double() - held
            account.port.add(gap, channels, width)
            account.function.add(rows(port, account.dims, one) - held, channels, width)

    def _add_other_kernels(
        self, one: Pass, block: str, trace: Trace, truth: Trace, calls: Calls
    ) -> None:
        """The floor is the largest distance among the reference's own kernels."""
        name = f"{block}.self_attn"
        if f"{name}#context" not in truth:
            return
        account = self._account(f"{name}#context")
        module = self.reference.module_sites()[name]
        query, key, value, mask = (
            trace[f"{name}#{role}"] for role in ("query", "key", "value", "mask")
        )
        for kernel, run in self.reference.kernels().items():
            if kernel == self.reference.attention:
                continue
            given = additive(mask, query.dtype) if kernel == "eager" else mask
            context, _ = run(module, query, key, value, given, scaling=module.scaling, dropout=0.0)
            gap = rows(context, account.dims, one).double() - rows(
                truth[f"{name}#context"], account.dims, one
            )
            account.floors.setdefault(kernel, type(account.truth)()).add(gap)

    def _account(self, name: str) -> SiteAccount:
        if name in self.ledger.sites:
            return self.ledger.sites[name]
        dims = LOGITS_DIMS if name == LOGITS else self.table.dims(name)
        assert dims is not None
        functional = "#" in name and not name.endswith("#context") and "self_attn" in name
        is_glue = ":in" in name or functional or name == LOGITS or name in self._composite
        return self.ledger.site(name, dims, is_glue)
