"""Weight maps: rules laid over the names of a checkpoint.

That gives a `Plan`: every parameter claimed by exactly one rule, every tensor read or dropped with
a reason. No tensor byte is read here except through the reader handed to `Claim.assemble`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from portkit.errors import Mismatch
from portkit.shown import listed
from portkit.weights.rules import (
    Drop,
    Moving,
    Placement,
    Reader,
    Rule,
    Shape,
    Slice,
    Tie,
    template,
)

_MOST_MISSING = 10_000
_BODY = "model."
"""What a language model calls itself without its head: saved by itself it has no such prefix."""
_WRAPPERS = {
    "_orig_mod.": "torch.compile put that there: save the model inside, model._orig_mod",
    "module.": "a data-parallel wrapper put that there: save the model inside, model.module",
    "base_model.model.": "PEFT put that there: save what model.merge_and_unload() gives",
}


@dataclass(frozen=True)
class Claim:
    """One parameter, and the tensors that make it up."""

    rule: Moving
    parameter: str
    shape: Shape
    sources: tuple[str, ...]
    """Names as this checkpoint spells them."""
    canonical: tuple[str, ...]
    """Names of the same tensors in an export."""
    source_shapes: tuple[Shape, ...]

    def assemble(self, read: Reader, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The parameter: a view of what was read, where rule, dtype and device let it be one."""
        return self.rule.assemble(read, self.sources, Placement(self.shape, dtype, device))

    def split(self, parameter: Tensor) -> dict[str, Tensor]:
        """Undo `assemble`: the tensors that go to disk, by canonical name."""
        parts = self.rule.split(parameter, self.source_shapes)
        return dict(zip(self.canonical, parts, strict=True))


@dataclass(frozen=True)
class Tied:
    """A parameter that shares another's tensor; `also_on_disk` names a copy of its own there."""

    parameter: str
    to: str
    also_on_disk: str | None


@dataclass(frozen=True)
class Plan:
    """Who claims which tensor. Complete: making it raises where anything is left over."""

    claims: tuple[Claim, ...]
    tied: tuple[Tied, ...]
    dropped: tuple[Drop, ...]
    """Here `source` is the tensor's name."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors that are read, each once."""
        return tuple(dict.fromkeys(name for claim in self.claims for name in claim.sources))

    def split(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that go to disk, by canonical name; a tied one once."""
        tensors: dict[str, Tensor] = {}
        for claim in self.claims:
            tensors |= claim.split(parameters[claim.parameter])
        return tensors


@dataclass(frozen=True)
class WeightMap:
    """Rules in the text model's spelling, and the prefixes under which checkpoints also write it.

    A name may also lack `model.`, or have it once too often, behind a prefix or without one.
    """

    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ()

    def plan(
        self,
        model: nn.Module,
        header: Mapping[str, Shape | None],
        way_out: str = "take config and weights of one release",
    ) -> Plan:
        """Lay the map over a checkpoint's tensor names and shapes (None: not known).

        `model` may be on the meta device. Raises `Mismatch` naming every tensor that is missing,
        unexpected or of another shape, with `way_out` behind it.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        on_disk = self._canonical_names(header)
        ties = self._ties(parameters)
        claims, missing = [], []
        for name, parameter in parameters.items():
            if name not in ties:
                claim, absent = self._claim(name, tuple(parameter.shape), header, on_disk, ties)
                claims += [claim] if not absent else []
                missing += absent
                if len(missing) > _MOST_MISSING:  # of layers times experts only a config claims
                    _refuse(missing, [], [], way_out)
        read = {source for claim in claims for source in claim.sources}
        # What a parameter claims is no leftover: a rule may drop what only some layers have.
        dropped = tuple(one for one in self._dropped(on_disk) if one.source not in read)
        tied = tuple(
            Tied(name, to, copy if (copy := on_disk.get(name)) not in read else None)
            for name, to in ties.items()
        )
        accounted = read | {one.also_on_disk for one in tied} | {one.source for one in dropped}
        unexpected = [name for name in header if name not in accounted]
        wanted: dict[str, Shape] = {}
        for claim in claims:
            for source, shape in zip(claim.sources, claim.source_shapes, strict=True):
                # Of a stack, whose slices are claimed one by one, the longest is the whole.
                wanted[source] = max(wanted.get(source, ()), shape)
        for one in tied:
            if one.also_on_disk:
                wanted[one.also_on_disk] = tuple(parameters[one.to].shape)
        _refuse(missing, unexpected, _misshapen(wanted, header), way_out)
        return Plan(tuple(claims), tied, dropped)

    def _claim(
        self,
        name: str,
        shape: Shape,
        header: Mapping[str, Shape | None],
        on_disk: Mapping[str, str],
        ties: Mapping[str, str],
    ) -> tuple[Claim, list[str]]:
        """A parameter's claim, and what is not on disk of what it reads."""
        (rule, bindings), *stacks = self._claiming(name)
        canonical = rule.sources(bindings, shape)
        held = self._held_by_tie(name, canonical, on_disk, ties)
        if not any(source in on_disk for source in held):
            for stack, bound in stacks:
                if (stacked := stack.sources(bound, shape))[0] in on_disk:
                    rule, held = stack, stacked
        absent = [source for source in held if source not in on_disk]
        sources = tuple(on_disk.get(source, source) for source in held)
        shapes = rule.source_shapes(shape, [header.get(source) for source in sources])
        return Claim(rule, name, shape, sources, canonical, shapes), absent

    def written(self, model: nn.Module) -> Plan:
        """The plan of a model that comes from no checkpoint: for each parameter what is written.

        Parts of a `Fuse` are taken to be of one size.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        ties = self._ties(parameters)
        header: dict[str, Shape | None] = {}
        for name, parameter in parameters.items():
            if name not in ties:
                rule, bindings = self._claiming(name)[0]
                header |= dict.fromkeys(rule.sources(bindings, tuple(parameter.shape)))
        return self.plan(model, header)

    def _canonical_names(self, header: Iterable[str]) -> dict[str, str]:
        """Canonical name to the name on disk; what no rule knows keeps the name that it has."""
        found: dict[str, str] = {}
        any_known = False
        for name in header:
            known = self._spelled(name)
            any_known |= known is not None
            canonical = known or name
            if canonical in found:
                raise Mismatch(
                    f"{name} and {found[canonical]} are two spellings of one tensor: "
                    "save the checkpoint again with one of them"
                )
            found[canonical] = name
        if found and not any_known:
            self._refuse_wrapped(list(found))
        return found

    def _spelled(self, name: str) -> str | None:
        """The spelling in which the rules know a name, or None."""
        for prefix in ("", *self.prefixes):
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                for spelling in (rest, _BODY + rest, rest.removeprefix(_BODY)):
                    if self._known.fullmatch(spelling):
                        return spelling
        return None

    @cached_property
    def _known(self) -> re.Pattern[str]:
        """Every name that a rule reads or drops."""
        spellings = dict.fromkeys(one for rule in self.rules for one in rule.spellings)
        return re.compile("|".join(template(one).pattern for one in spellings))

    def _refuse_wrapped(self, names: Sequence[str]) -> None:
        """Say so where all names have one prefix in front of what would be known without it."""
        first, last = min(names), max(names)
        words = first.split(".")
        shared = [".".join(words[:number]) + "." for number in range(1, len(words))]
        fitting = [
            prefix
            for prefix in shared
            if last.startswith(prefix)
            and any(self._spelled(name.removeprefix(prefix)) for name in names)
        ]
        if fitting:
            prefix = next((one for one in fitting if one in _WRAPPERS), fitting[0])
            reason = _WRAPPERS.get(prefix, "save the model without what is wrapped around it")
            raise Mismatch(
                f"the names of all {len(names)} tensors begin with {prefix!r}: {reason}, or take "
                "that prefix off the names"
            )

    def _dropped(self, on_disk: Mapping[str, str]) -> tuple[Drop, ...]:
        drops = [rule for rule in self.rules if isinstance(rule, Drop)]
        return tuple(
            Drop(name, rule.because)
            for canonical, name in on_disk.items()
            for rule in drops
            if template(rule.source).match(canonical) is not None
        )

    def _ties(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
        return {
            rule.parameter: rule.to
            for rule in self.rules
            if isinstance(rule, Tie) and parameters[rule.parameter] is parameters[rule.to]
        }

    def _held_by_tie(
        self,
        name: str,
        canonical: tuple[str, ...],
        on_disk: Mapping[str, str],
        ties: Mapping[str, str],
    ) -> tuple[str, ...]:
        """The canonical names to read: of a tied pair, whichever half is on disk."""
        if any(source in on_disk for source in canonical):
            return canonical
        return next(
            ((tied,) for tied, to in ties.items() if to == name and tied in on_disk), canonical
        )

    def _claiming(self, name: str) -> list[tuple[Moving, dict[str, str]]]:
        """The rule that a parameter is written by, and behind it those of stacks that may hold it,
        each with its bindings."""
        found = [
            (rule, bindings)
            for rule in self.rules
            if isinstance(rule, Moving)
            and (bindings := template(rule.parameter).match(name)) is not None
        ]
        written = [(rule, bindings) for rule, bindings in found if not isinstance(rule, Slice)]
        assert len(written) == 1, f"{name} is claimed by {len(written)} rules of the weight map"
        stacks = [(rule.at(one), one) for rule, one in found if isinstance(rule, Slice)]
        return [*written, *stacks]


def _misshapen(wanted: Mapping[str, Shape], header: Mapping[str, Shape | None]) -> list[str]:
    return [
        f"{name} is {list(found)} where the config makes it {list(shape)}"
        for name, shape in wanted.items()
        if (found := header[name]) is not None and found != shape
    ]


def _refuse(missing: list[str], unexpected: list[str], misshapen: list[str], way_out: str) -> None:
    complaints = [
        f"{len(names)} {kind}: {listed(names)}"
        for names, kind in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (misshapen, "of another shape"),
        )
        if names
    ]
    if complaints:
        raise Mismatch(
            f"the checkpoint does not fit its config: {'; '.join(complaints)}; {way_out}"
        )
