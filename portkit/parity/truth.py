"""Both sides in float64, block by block, on what was recorded in the dtype under test.

The reference's result is the truth: how far its own kernels are from it in the dtype is the floor,
how far the port is decides about its care, and the port in float64 tells whether it computes the
same function. Embedding, each layer, norm and head are held in float64 one at a time, a large head
in blocks of its rows, once for all the recordings of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from portkit.parity.judge import SAME_FUNCTION
from portkit.parity.ledger import Ledger, SiteAccount, picked, rows, squares_of
from portkit.parity.local import Call, Calls, Trace, block_modules, recorder
from portkit.parity.precision import (
    casts_lifted,
    held_in_float64,
    release_freed_memory,
    rows_in_float64,
)
from portkit.parity.probe import Pass
from portkit.parity.reference import Reference, additive
from portkit.parity.sites import QKV, Side, SiteTable, Visit, watching
from portkit.parity.spread import token_sums

Look = Callable[[str, Tensor], None]
HEAD = "lm_head"
HEAD_ROWS = 32_768
"""Rows of a large head that are held in float64 at a time."""


@dataclass
class Recording:
    """One pass: what the reference had, and where the taught port had something else."""

    run: Pass
    trace: Trace
    reference_calls: Calls
    port_calls: Calls
    unequal: Trace = field(default_factory=dict)
    misshapen: Trace = field(default_factory=dict)
    """What the taught port had in another shape or dtype."""
    apart: Trace = field(default_factory=dict)
    """Some rows of the port in float64, where nothing but float64 shows that it differs."""
    seen: set[str] = field(default_factory=set)
    """Sites that the port has too."""
    by_token: Trace = field(default_factory=dict)
    """`token_sums` of the sites in `unequal`, as far as they were held against the truth."""


class Truth:
    """Holds recordings against the truth and writes the distances into the ledger."""

    def __init__(self, port: Side, reference: Reference, table: SiteTable, ledger: Ledger) -> None:
        self.port, self.reference, self.table, self.ledger = port, reference, table, ledger
        self.unasked: dict[str, str] = {}
        """Blocks of the port that cannot be run in float64, and why."""
        self._ours, self._theirs = block_modules(port, table), block_modules(reference, table)

    @torch.no_grad()
    def judge(self, recordings: Sequence[Recording]) -> None:
        """Add all sites of these passes; each block is upcast once for all of them."""
        for one in recordings:
            self._judge_tables(one)
        for name, theirs in self._theirs.items():
            ours = self._ours.get(name)
            if isinstance(theirs, nn.Embedding):
                for one in recordings:
                    self._judge_embedding(name, one)
            elif name == HEAD:
                self._judge_head(recordings)
            else:
                with held_in_float64(*filter(None, (theirs, ours))):
                    for one in recordings:
                        self._judge_block(name, one)
            release_freed_memory()
        for one in recordings:
            for site, sums in one.by_token.items():
                self.ledger.add_tokens(site, one.run, sums, one.trace[site])

    def _judge_tables(self, one: Recording) -> None:
        port = _tables(self.port, one.port_calls)
        for name, truth in _tables(self.reference, one.reference_calls).items():
            self._hold(one, name, truth)
            self._ask(one, name, truth, port.get(name))

    def _judge_embedding(self, name: str, one: Recording) -> None:
        truth = _embed(self._theirs[name], one.reference_calls.blocks[name].args[0])
        self._hold(one, name, truth)
        if name in one.port_calls.blocks:
            with self._asking(name):
                port = _embed(self._ours[name], one.port_calls.blocks[name].args[0])
                self._ask(one, name, truth, port)

    def _judge_block(self, name: str, one: Recording) -> None:
        truth: Trace = {}
        calls = one.reference_calls.blocks[name]
        self._run_block(self.reference, name, calls, one, truth.__setitem__)
        for site, exact in truth.items():
            self._hold(one, site, exact)
        self._add_other_kernels(one, f"{name}.self_attn", truth)

        def ask(site: str, port: Tensor) -> None:
            self._ask(one, site, truth.pop(site, None), port)  # and let go of the truth

        if name in one.port_calls.blocks:
            with self._asking(name):
                calls = one.port_calls.blocks[name]
                self._run_block(self.port, name, calls, one, ask)

    def _judge_head(self, recordings: Sequence[Recording]) -> None:
        theirs, ours = self._theirs[HEAD], self._ours[HEAD]
        assert isinstance(theirs, nn.Linear), "the reference's head is one matrix"
        width = len(theirs.weight)
        weights = [one.weight for one in (theirs, ours) if isinstance(one, nn.Linear)]
        for start in range(0, width, HEAD_ROWS):
            channels = slice(start, min(start + HEAD_ROWS, width))
            with rows_in_float64(channels, *weights):
                for one in recordings:
                    hidden = one.trace[f"{HEAD}:in"].double()
                    with casts_lifted():
                        truth, port = theirs(hidden), ours(hidden)
                    self._hold(one, HEAD, truth, channels)
                    self._ask(one, HEAD, truth, port, channels)

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """A block that cannot be run in float64 leaves the question unasked: the floor decides."""
        try:
            yield
        except (RuntimeError, TypeError) as error:
            self.unasked[name] = str(error).partition("\n")[0]

    def _run_block(self, side: Side, name: str, call: Call, one: Recording, look: Look) -> None:
        """Have `look` see what every site within a block makes of the recorded inputs."""
        past = _TaughtCache(name, one.trace)

        def visit(site: str, tensor: Tensor) -> Tensor:
            look(site, tensor)
            recorded = one.trace.get(site)
            return tensor if recorded is None else _upcast(recorded)

        def given(key: str, value: Any) -> Any:
            is_cache = hasattr(value, "update") or (key == "past_key_values" and value is not None)
            return past if is_cache else _upcast(value)

        args = tuple(given("", value) for value in call.args)
        kwargs = {key: given(key, value) for key, value in call.kwargs.items()}
        within = _Within(side, name)
        with watching(within, self.table, visit), casts_lifted():
            within.module_sites()[name](*args, **kwargs)

    def _hold(
        self, one: Recording, name: str, truth: Tensor, channels: slice | None = None
    ) -> None:
        """Add a site's truth, and how far both sides are from it in the dtype under test."""
        if name not in one.seen or not truth.is_floating_point():
            return
        account, whole = self.ledger.site(name), one.trace[name]
        held = rows(truth, account.dims, one.run)

        def distance(recorded: Tensor) -> Tensor:
            part = recorded if channels is None else recorded[..., channels]
            return rows(part, account.dims, one.run).double() - held

        block = (channels or slice(None), whole.shape[-1] if channels else None)
        own, unequal = distance(whole), one.unequal.get(name)
        ours = own if unequal is None else distance(unequal)
        account.truth.add(squares_of(held), len(held), *block)
        account.floors[self.reference.attention].add(squares_of(own), len(held), *block)
        account.port.add(squares_of(ours), len(held), *block)
        if unequal is not None:
            account.spread.add(ours)
            account.floor_spread.add(own)
            sums = token_sums(ours, own, held)
            before = one.by_token.get(name)
            one.by_token[name] = sums if before is None else before + sums

    def _ask(
        self,
        one: Recording,
        name: str,
        truth: Tensor | None,
        port: Tensor | None,
        channels: slice | None = None,
    ) -> None:
        """Add how far the port is from the truth where both are computed in float64."""
        if truth is None or port is None or name not in one.seen or port.shape != truth.shape:
            return
        if not truth.is_floating_point():  # a mask
            return
        account = self.ledger.site(name)
        account.function_asked = True
        ours, held = (rows(each, account.dims, one.run) for each in (port, truth))
        gap = held.new_zeros(held.shape[1])
        if not torch.equal(port, truth):
            gap = squares_of(ours - held)
            account.function_spread.add(ours - held)
            if name not in one.unequal and channels is None:
                apart = float(gap.sum()) > SAME_FUNCTION**2 * float(squares_of(held).sum())
                one.apart.update({name: picked(ours)} if apart else {})
        width = one.trace[name].shape[-1] if channels else None
        account.function.add(gap, len(held), channels or slice(None), width)

    def _add_other_kernels(self, one: Recording, name: str, truth: Trace) -> None:
        """The floor is the largest distance among the reference's own kernels."""
        site = f"{name}#context"
        if site not in truth or site not in one.seen:
            return
        account: SiteAccount = self.ledger.site(site)
        held = rows(truth[site], account.dims, one.run)
        module = self.reference.module_sites()[name]
        query, key, value, mask = (one.trace[f"{name}#{role}"] for role in (*QKV, "mask"))
        for kernel, run in self.reference.kernels().items():
            if kernel != self.reference.attention:
                given = additive(mask, query.dtype) if kernel == "eager" else mask
                context, _ = run(
                    module, query, key, value, given, scaling=module.scaling, dropout=0.0
                )
                gap = rows(context, account.dims, one.run).double() - held
                account.floors[kernel].add(squares_of(gap), len(held))


class _Within:
    """A side of which only the modules of one block are watched."""

    def __init__(self, side: Side, block: str) -> None:
        self._modules = {
            name: module
            for name, module in side.module_sites().items()
            if name == block or name.startswith(f"{block}.")
        }
        self.run, self.watch_attention = side.run, side.watch_attention
        self.table_modules = side.table_modules

    def module_sites(self) -> Mapping[str, nn.Module]:
        return self._modules

    @contextmanager
    def watch_tables(self, _: Visit) -> Iterator[None]:
        yield


class _TaughtCache:
    """Stands in for either side's cache: gives back the recorded past, followed by what is new."""

    def __init__(self, block: str, trace: Trace) -> None:
        # Upcast before casts are watched: it is not the model that does it.
        self._key, self._value = (
            None if (held := trace.get(f"{block}.self_attn#{role}")) is None else held.double()
            for role in QKV[1:]
        )

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self._key is not None, "a layer with a cache has keys"
        assert self._value is not None, "a layer with a cache has values"
        past = self._key.shape[2] - key.shape[2]
        return (
            torch.cat((self._key[:, :, :past], key), 2),
            torch.cat((self._value[:, :, :past], value), 2),
        )


def _tables(side: Side, calls: Calls) -> Trace:
    """The rotary tables in float64, from the frequencies as held."""
    found: Trace = {}
    with side.watch_tables(recorder(found)):
        for module, call in calls.tables:
            args = tuple(map(_upcast, call.args))
            kwargs = {key: _upcast(one) for key, one in call.kwargs.items()}
            with held_in_float64(module), casts_lifted():
                module(*args, **kwargs)
    return found


def _embed(module: nn.Module, input_ids: Tensor) -> Tensor:
    """An embedding in float64 of the rows that are used: the whole would be gigabytes."""
    assert isinstance(module, nn.Embedding), "an embedding is one table of rows"
    used, places = torch.unique(input_ids, return_inverse=True)
    padding_idx = module.padding_idx
    try:
        module.padding_idx = None
        # The rows are float64 by then: what is left to upcast are the buffers.
        with rows_in_float64(used, module.weight), held_in_float64(module), casts_lifted():
            embedded: Tensor = module(places)
            return embedded
    finally:
        module.padding_idx = padding_idx


def _upcast(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, tuple):
        return tuple(map(_upcast, value))
    return value
