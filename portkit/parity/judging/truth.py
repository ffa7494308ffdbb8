"""Both sides in float64, block by block, on what was recorded in the dtype under test.

The reference's result is the truth: how far its own kernels are from it in the dtype is the floor,
how far the port is decides about its care, and the port in float64 tells whether it computes the
same function. Embedding, each layer, norm and head are held in float64 one at a time, a large head
in blocks of its rows, once for all the recordings of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from portkit.parity.judging.distances import Distances
from portkit.parity.judging.heap import release_freed_memory
from portkit.parity.judging.ledger import Ledger, SiteAccount, squares_of
from portkit.parity.judging.local import Call, Calls, Recording, Trace, block_modules, recorder
from portkit.parity.judging.once import ComputedOnce
from portkit.parity.judging.precision import (
    casts_lifted,
    held_in_float64,
    rows_in_float64,
)
from portkit.parity.sides.attention import QKV, additive
from portkit.parity.sides.roles import Visit
from portkit.parity.sides.sites import Side, SiteTable, watching
from portkit.parity.subject.dims import rows

Look = Callable[[str, Tensor], None]
HEAD = "lm_head"
HEAD_ROWS = 32_768
"""Rows of a large head that are held in float64 at a time."""


class Truth:
    """Holds recordings against the truth and writes the distances into the ledger."""

    def __init__(self, port: Side, reference: Side, table: SiteTable, ledger: Ledger) -> None:
        self.port, self.reference, self.table, self.ledger = port, reference, table, ledger
        self.distances = Distances(ledger, reference.attention)
        self.unasked: dict[str, str] = {}
        """Blocks of the port that cannot be run in float64, and why."""
        self.notes: list[str] = []
        self._ours, self._theirs = block_modules(port, table), block_modules(reference, table)

    @torch.no_grad()
    def judge(self, recordings: Sequence[Recording]) -> None:
        """Add all sites of these passes; each block is upcast once for all of them."""
        for one in recordings:
            self._judge_tables(one)
        with self.reference.plain_experts():
            self._judge_blocks(recordings)
        self.distances.close(recordings)

    def _judge_blocks(self, recordings: Sequence[Recording]) -> None:
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

    def _judge_tables(self, one: Recording) -> None:
        port = _tables(self.port, one.port_calls)
        for name, truth in _tables(self.reference, one.reference_calls).items():
            self.distances.hold(one, name, truth)
            self.distances.ask(one, name, truth, port.get(name))

    def _judge_embedding(self, name: str, one: Recording) -> None:
        truth = embed_in_float64(self._theirs[name], one.reference_calls.blocks[name].args[0])
        self.distances.hold(one, name, truth)
        if name in one.port_calls.blocks:
            with self._asking(name):
                port = embed_in_float64(self._ours[name], one.port_calls.blocks[name].args[0])
                self.distances.ask(one, name, truth, port)

    def _judge_block(self, name: str, one: Recording) -> None:
        truth: Trace = {}
        upcasts, once = _Upcasts(), ComputedOnce(truth)
        calls = one.reference_calls.blocks[name]
        with casts_lifted(once):
            self._run_block((self.reference, name), calls, one, upcasts, truth.__setitem__)
        for site, exact in truth.items():
            is_recorded = upcasts.is_of(exact, one.trace.get(site))
            self.distances.hold(one, site, exact, is_recorded=is_recorded)
        self._add_other_kernels(one, f"{name}.self_attn", truth)

        def ask(site: str, port: Tensor) -> None:
            with _disable_current_modes():  # nothing here is the model's to be watched
                self.distances.ask(one, site, truth.pop(site, None), port)  # and let go of it

        if name in one.port_calls.blocks:
            calls = one.port_calls.blocks[name]
            with self._asking(name), casts_lifted(once):
                self._run_block((self.port, name), calls, one, upcasts, ask)

    def _judge_head(self, recordings: Sequence[Recording]) -> None:
        theirs, ours = self._theirs[HEAD], self._ours[HEAD]
        assert isinstance(theirs, nn.Linear), "the reference's head is one matrix"
        width = len(theirs.weight)
        weights = [one.weight for one in (theirs, ours) if isinstance(one, nn.Linear)]
        release_freed_memory()  # of the layers: the head's blocks are the largest tensors of all
        for start in range(0, width, HEAD_ROWS):
            channels = slice(start, min(start + HEAD_ROWS, width))
            with rows_in_float64(channels, *weights):
                for one in recordings:
                    hidden = one.trace[f"{HEAD}:in"].double()
                    with casts_lifted(ComputedOnce()):
                        truth, port = theirs(hidden), ours(hidden)
                    self.distances.hold(one, HEAD, truth, channels)
                    self.distances.ask(one, HEAD, truth, port, channels)

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """A block that cannot be run in float64 leaves the question unasked: the floor decides."""
        try:
            yield
        except (RuntimeError, TypeError) as error:
            self.unasked[name] = str(error).partition("\n")[0]

    def _run_block(
        self, block: tuple[Side, str], call: Call, one: Recording, upcasts: _Upcasts, look: Look
    ) -> None:
        """Have `look` see what every site within a side's block makes of the recorded inputs."""
        side, name = block
        past = _TaughtCache(name, one.trace, one.num_past)

        def visit(site: str, tensor: Tensor) -> Tensor:
            look(site, tensor)
            recorded = one.trace.get(site)
            wide = tensor if recorded is None else upcasts.of(recorded)
            # What a block returns as it got it, another may add to in place.
            return wide.clone() if wide is tensor and ":in" not in site else wide

        def given(key: str, value: Any) -> Any:
            is_cache = hasattr(value, "update") or (key == "past_key_values" and value is not None)
            return past if is_cache else _upcast(value)

        args = tuple(given("", value) for value in call.args)
        kwargs = {key: given(key, value) for key, value in call.kwargs.items()}
        within = _Within(side, name)
        with watching(within, self.table, visit):
            within.module_sites()[name](*args, **kwargs)

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
                gap = squares_of(rows(context, account.dims, one.run), held)
                account.floors[kernel].add(gap, len(held))


class _Within:
    """A side of which only the modules of one block are watched."""

    def __init__(self, side: Side, block: str) -> None:
        self._modules = {
            name: module
            for name, module in side.module_sites().items()
            if name == block or name.startswith(f"{block}.")
        }
        self.watch_attention, self.visit_output = side.watch_attention, side.visit_output
        self.points_of = side.points_of

    def module_sites(self) -> Mapping[str, nn.Module]:
        return self._modules

    def table_modules(self) -> Mapping[str, nn.Module]:
        return {}

    @contextmanager
    def watch_tables(self, _: Visit) -> Iterator[None]:
        yield


class _TaughtCache:
    """Stands in for either side's cache: gives back the recorded past, followed by what is new.

    Also for where a side keeps what a layer shows to later ones that have no keys of their own: a
    mapping, or our `SharedKeys`. What such a layer reads is all recorded.
    """

    def __init__(self, block: str, trace: Trace, num_past: int) -> None:
        self._num_past = num_past
        # Upcast before casts are watched: it is not the model that does it.
        self._key, self._value = (
            None if (held := trace.get(f"{block}.self_attn#{role}")) is None else held.double()
            for role in QKV[1:]
        )

    def get_seq_length(self, *_: Any) -> int:
        return self._num_past

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self._key is not None, "a layer with a cache has keys"
        assert self._value is not None, "a layer with a cache has values"
        past = self._key.shape[2] - key.shape[2]
        return (
            torch.cat((self._key[:, :, :past], key), 2),
            torch.cat((self._value[:, :, :past], value), 2),
        )

    def shown(self) -> tuple[Tensor, Tensor]:
        assert self._key is not None, "a layer that shares keys has seen them"
        assert self._value is not None, "a layer that shares values has seen them"
        return self._key, self._value

    def __getitem__(self, _: Any) -> tuple[Tensor, Tensor]:
        return self.shown()

    def __setitem__(self, _: Any, __: Any) -> None:
        """What is shown to later layers is theirs to be given."""


class _Upcasts:
    """Recorded tensors in float64, as long as somebody holds them: one is often several sites.

    A copy that somebody has changed in place is not given again.
    """

    def __init__(self) -> None:
        self._made: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def of(self, recorded: Tensor) -> Tensor:
        if not recorded.is_floating_point():
            return recorded
        wide = self._made.get(id(recorded))
        if wide is None or wide._version:
            wide = self._made[id(recorded)] = recorded.double()
        return wide

    def is_of(self, wide: Tensor, recorded: Tensor | None) -> bool:
        """Whether `wide` is the very copy that was made of `recorded`."""
        return recorded is not None and self._made.get(id(recorded)) is wide


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


def embed_in_float64(
    module: nn.Module, input_ids: Tensor, run: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """An embedding in float64 of the rows that are used: the whole would be gigabytes.

    `run` runs it where calling the module would be seen.
    """
    assert isinstance(module, nn.Embedding), "an embedding is one table of rows"
    used, places = torch.unique(input_ids, return_inverse=True)
    padding_idx = module.padding_idx
    try:
        module.padding_idx = None
        # The rows are float64 by then: what is left to upcast are the buffers.
        with rows_in_float64(used, module.weight), held_in_float64(module), casts_lifted():
            embedded: Tensor = (run or module)(places)
            return embedded
    finally:
        module.padding_idx = padding_idx


def _upcast(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, tuple):
        return tuple(map(_upcast, value))
    return value
