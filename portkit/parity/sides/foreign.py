"""A foreign side: somebody else's callable in the place of the port, or of the reference.

Knows what it may not do, and where it can be watched: at modules that are paired with the
reference's, and at the points that it records itself. How it is called `calling` knows. What it is
made of is its own affair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from portkit.errors import PortError, PortkitError, SiteError
from portkit.parity.judging.precision import ran_out_of_memory
from portkit.parity.probes.probe import Pass
from portkit.parity.sides.calling import PAST, Answer, calling, is_harness, said
from portkit.parity.sides.compiled import reachable
from portkit.parity.sides.experts import plain_experts
from portkit.parity.sides.keeping import Kept, KeptState
from portkit.parity.sides.pairs import Paired, SitePairs, near
from portkit.parity.sides.points import listening
from portkit.parity.sides.returned import Returned
from portkit.parity.sides.roles import Roles, Visit, visit_value
from portkit.parity.sides.routing import routing_as, routing_of, visit_routing
from portkit.parity.sides.sites import (
    AGAIN,
    CannotRun,
    SiteTable,
    watch_tables_of,
    weights_of,
)


@dataclass(frozen=True)
class Surroundings:
    """What a foreign side is held against."""

    table: SiteTable
    """All sites of the family."""
    modules: Mapping[str, nn.Module]
    """Modules of the text-only reference, or as many as it has, on whatever device."""
    vocab_size: int
    inputs: Collection[str] | None = None
    """Of a model that is called by named inputs: their names."""


@dataclass(frozen=True)
class Left:
    """What a pass left for those that go on from it."""

    cache: Any = None
    num_tokens: int = 0
    kept: Kept | None = None


class ForeignSide:
    """A callable that somebody else wrote. `origin` is what it is called in messages."""

    attention = "its own"
    is_partial = True

    def __init__(
        self,
        call: Callable[..., Any],
        dtype: torch.dtype,
        pairs: SitePairs,
        around: Surroundings,
        origin: str,
    ) -> None:
        self.call, self.origin = call, origin
        self.dtype, self._around = dtype, around
        model = call if isinstance(call, nn.Module) else getattr(call, "__self__", None)
        self.model = model if isinstance(model, nn.Module) else None
        self.notes: list[str] = []
        self._returned = Returned()
        self._calling = calling(call, origin, pairs.takes, around.inputs)
        if self._calling.left:
            named = ", ".join(self._calling.left)
            self._note(f"{origin} takes {named} too: left as it is by default")
        if self._calling.keeps_within and self.model is None:
            raise PortError(f"{origin} is no module: what it keeps within cannot be carried")
        self._kept = None if self.model is None else KeptState(self.model)
        within = {} if self.model is None else reachable(self.model)
        paired = pairs.laid_over(within, around.table, around.modules)
        self._paired = [
            (module, replace(pair, by_output=True) if isinstance(module, nn.Identity) else pair)
            for module, pair in ((within[name], pair) for name, pair in paired.items())
        ]
        self.paired = tuple(paired) if pairs.has_lines else ()
        """Its modules that stand for a site, where a table says which."""
        self._running: list[str] = []
        """Names of the paired modules that are running, the innermost last."""
        self.counts_real = False
        """Without positions given, it counts real tokens in a padded row, and no padding."""

    @property
    def takes_positions(self) -> bool:
        return self._calling.takes("positions")

    @property
    def takes_mask(self) -> bool:
        return self._calling.takes("attention_mask")

    @torch.no_grad()
    def run(self, one: Pass, caches: dict[str, Any]) -> Tensor:
        """Raises `CannotRun` where it refuses the pass, `PortError` where it breaks its word."""
        if one.inputs is not None:
            return self._returned.of(self.call, one.inputs, self._held_in).clone()
        before = self._before(one, caches)
        if not (self.takes_positions or one.counts_on or (self.counts_real and one.counts_real)):
            raise CannotRun("it takes no positions")
        if not self.takes_mask and not bool(one.real.all()):
            raise CannotRun("it takes no attention_mask")
        if self._kept is not None:
            self._kept.restore(before.kept)
        answer = self._called(one, before)
        kept = None if self._kept is None else self._kept.save()
        after = Left(answer.cache, before.num_tokens + one.num_tokens, kept)
        if answer.cache is not None or self._calling.keeps_within:
            caches[one.name] = after
        elif before.cache is not None:
            raise PortError(
                f"{self.origin} was given a cache in the pass {one.name} and returned none: it "
                "returns (logits, cache)"
            )
        logits = self._checked(one, answer.logits)[:, -(one.num_logits or one.num_tokens) :]
        return logits.clone()  # it may be a part of what the next pass is written into

    def _before(self, one: Pass, caches: dict[str, Any]) -> Left:
        """What the pass goes on from."""
        if one.continues is None:
            return Left()
        if not (self._calling.takes("cache") or self._calling.keeps_within):
            raise CannotRun("it takes no cache")
        if one.continues not in caches:
            raise CannotRun(f"it left no cache behind the pass {one.continues}")
        before: Left = caches.pop(one.continues)
        return before

    def _called(self, one: Pass, before: Left) -> Answer:
        given = {
            "input_ids": one.input_ids,
            "positions": one.positions,
            "attention_mask": one.attention_mask,
        }
        own = {name: None if each is None else each.clone() for name, each in given.items()}
        values = {**own, "cache": before.cache, PAST: before.num_tokens}
        self._running.clear()
        try:
            answer = self._calling(self.call, values)
        except (PortkitError, MemoryError):
            raise
        except (Exception, SystemExit) as error:  # it leaves, and not we
            if ran_out_of_memory(error) or is_harness(error):
                raise
            raise CannotRun(f"it raised {said(error)}") from error
        for name, untouched in given.items():
            if untouched is not None and not _equal(own[name], untouched):
                raise PortError(
                    f"{self.origin} changed its {name} in place in the pass {one.name}: have it "
                    "write to a copy"
                )
        return answer

    def _checked(self, one: Pass, logits: Any) -> Tensor:
        where = f"{self.origin} returned"
        if not isinstance(logits, Tensor):
            raise PortError(
                f"{where} {_a(type(logits).__name__)} in the pass {one.name}: it returns logits, a "
                "tensor, or (logits, cache)"
            )
        due = [*one.input_ids.shape, self._around.vocab_size]
        if list(logits.shape) != due:
            raise PortError(
                f"{where} logits of shape {list(logits.shape)} in the pass {one.name}, where "
                f"{due} (batch, tokens, vocab_size) are due"
            )
        if not logits.is_floating_point():
            raise PortError(f"{where} logits in {logits.dtype}: they are floating-point numbers")
        if logits.dtype not in (self.dtype, torch.float64):
            self._note(f"{where} logits in {_word(logits)}; they were compared in {_word(self)}")
            return logits.to(self.dtype)
        return logits

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def unlike(self) -> str:
        """`; near: …`, names of its modules that are most like what was paired in vain."""
        names = () if self.model is None else reachable(self.model)
        return near(self.paired[0], [one for one in names if one not in self.paired])

    @property
    def _held_in(self) -> torch.dtype:
        """What its parameters are in at the moment: for the truth they are float64."""
        held = () if self.model is None else self.model.parameters()
        return next((one.dtype for one in held if one.is_floating_point()), self.dtype)

    @property
    def device(self) -> torch.device:
        held = None if self.model is None else next(self.model.parameters(), None)
        return torch.device("cpu") if held is None else held.device

    def points_of(self, name: str) -> bool:
        return False

    def module_sites(self) -> Mapping[str, nn.Module]:
        """Those that are called as the reference's are; the others are watched by themselves."""
        plain = ((pair.sites[0], module) for module, pair in self._paired if pair.is_plain)
        return {site: module for site, module in plain if site is not None}

    def visit_output(self, name: str, output: Any, visit: Visit) -> Any:
        """A router's parts by what they are; of anything else each tensor."""
        routing = routing_of(output)
        if routing is None:
            return visit_value(name, output, visit)
        return routing_as(output, visit_routing(name, visit, routing), routing)

    def parameters(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        held = weights_of(self)
        return {name: held[name] for name in names if name in held}

    def plain_experts(self) -> Any:
        return plain_experts(self.model)

    @contextmanager
    def watch_attention(self, visit: Visit) -> Iterator[None]:
        """The points that the port records, and modules whose output is more than one site's."""
        numbered = _numbered(visit)
        with ExitStack() as stack:
            for module, pair in self._paired:
                for handle in self._hooks(module, pair, visit):
                    stack.callback(handle.remove)
            stack.enter_context(listening(lambda name, tensor: numbered(self._full(name), tensor)))
            stack.enter_context(self._returned.shown_to(visit))
            yield

    def _hooks(self, module: nn.Module, pair: Paired, visit: Visit) -> Iterator[Any]:
        name = next(filter(None, pair.sites)).partition("#")[0]
        roles, inputs, outputs = Roles(module), _numbered(visit), _numbered(visit)

        def visit_input(role: str, tensor: Tensor) -> Tensor:
            if role:
                return tensor
            for site in pair.sites:
                if site is not None and "#" not in site:
                    tensor = self._laid(pair, f"{site}:in", tensor, inputs)
            return tensor

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._running.append(name)
            if pair.is_plain or pair.by_output:
                return None
            return roles.visit(args, kwargs, visit_input)

        def behind(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            self._running.pop()
            if pair.is_plain:
                return output
            return self.visit_output(
                name, output, lambda _, tensor: self._parts(pair, tensor, outputs)
            )

        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(behind)

    def _laid(self, pair: Paired, site: str, tensor: Tensor, visit: Visit) -> Tensor:
        """Visit a site whose dimensions the port orders as the table says, where it has those."""
        declared = (self._around.table.dims(site) or "").split()
        fits = tensor.dim() == len(declared)
        if pair.dims is None or sorted(pair.dims) != sorted(declared) or not fits:
            return visit(site, tensor)
        order = [pair.dims.index(name) for name in declared]
        seen = visit(site, tensor.permute(order))
        return seen.permute([order.index(i) for i in range(len(order))])

    def _parts(self, pair: Paired, output: Tensor, visit: Visit) -> Tensor:
        """Visit the sites that lie side by side in an output; what they came to be, as one."""
        if len(pair.sites) == 1 and pair.sites[0] is not None:
            return self._laid(pair, pair.sites[0], output, visit)
        parts = torch.split(output, self._widths(pair, output.shape[-1]), dim=-1)
        seen_parts = [
            part if site is None else visit(site, part)
            for site, part in zip(pair.sites, parts, strict=True)
        ]
        if all(new is old for new, old in zip(seen_parts, parts, strict=True)):
            return output
        return torch.cat(seen_parts, -1)

    def _widths(self, pair: Paired, width: int) -> list[int]:
        """Of each part; the one that is left out has what remains."""
        sites = [site for site in pair.sites if site is not None]
        modules = [self._around.modules[site] for site in sites]
        widths = [len(m.weight) for m in modules if isinstance(m, nn.Linear)]
        rest = width - sum(widths)
        if len(widths) < len(sites) or rest < 0 or bool(rest) == (None not in pair.sites):
            raise SiteError(
                f"site pairs: {', '.join(sites)} do not lie side by side in {width} channels "
                f"of {self.origin}: they have {', '.join(map(str, widths))}"
            )
        known = iter(widths)
        return [rest if site is None else next(known) for site in pair.sites]

    def _full(self, name: str) -> str:
        """A recorded name as the reference spells it: whole, or behind a module that runs."""
        table = self._around.table
        if name[:1] not in {"#", "."}:
            if table.dims(name) is not None:
                return name
        else:
            for running in reversed(self._running):
                if table.dims(running + name) is not None:
                    return running + name
        if name[:1] in {"#", "."} and not self._running:
            raise SiteError(
                f"{self.origin} records {name!r} in no module that stands for one of the "
                "reference's: pair that (--sites), or record the whole name"
            )
        within = f" within {self._running[-1]}" if self._running else ""
        raise SiteError(
            f"{self.origin} records {name!r}{within}, and there is no such site"
            f"{near(name, _endings(name, table.names))}"
        )

    def table_modules(self) -> Mapping[str, nn.Module]:
        plain = self.module_sites()
        return {name: one for name, one in plain.items() if self._around.table.has_tables(name)}

    def watch_tables(self, visit: Visit) -> Any:
        return watch_tables_of(self.table_modules(), visit)

    def kernels(self) -> Mapping[str, Callable[..., Any]]:
        return {}

    def other_kernel(self) -> Any:
        return nullcontext()


def _numbered(visit: Visit) -> Visit:
    """The same visitor; what it is shown again in a pass is its second call, `name@2`."""
    times: Counter[str] = Counter()

    def numbered(name: str, tensor: Tensor) -> Tensor:
        times[name] += 1
        base, colon, role = name.partition(":")
        again = f"{AGAIN}{times[name]}" if times[name] > 1 else ""
        return visit(f"{base}{again}{colon}{role}", tensor)

    return numbered


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is None or b is None or torch.equal(a, b)


def _endings(name: str, templates: tuple[str, ...]) -> list[str]:
    """Declared names as far as they can be meant by one that is relative."""
    if name[:1] == "#":
        return ["#" + one.partition("#")[2] for one in templates if "#" in one]
    return list(templates)


def _word(of: Any) -> str:
    return str(of.dtype).removeprefix("torch.")


def _a(noun: str) -> str:
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"
