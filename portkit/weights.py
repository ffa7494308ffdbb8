"""Weight maps: which tensor of a checkpoint becomes which parameter, as data.

A rule is one line for one kind of tensor, in the checkpoint's own spelling. Rules move values and
never compute them, so each can be undone. Laid over the names of a checkpoint a map gives a `Plan`:
every parameter claimed by exactly one rule, every tensor read exactly once or dropped with a
reason. No tensor byte is read here except through the reader handed to `Claim.assemble`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from portkit.errors import Mismatch

Reader = Callable[[str], Tensor]
Shape = tuple[int, ...]

_PLACEHOLDER = re.compile(r"\{([a-z_]+)(?:=([^{}]+))?\}|\{\*\}$")
_NUMBER = "0|[1-9][0-9]*"
_MOST_MISSING = 100_000
_LISTED = 4  # how many names an error spells out


class Template:
    """A name with placeholders: matching binds them, filling puts the bindings back.

    `{layer}` stands for a number, `{proj=q|k|v}` for one of the words listed, and `{*}` at the very
    end for any remainder. Nothing matches more than it says.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        pattern, end, bound = "", 0, set()
        for found in _PLACEHOLDER.finditer(text):
            name, words = found.groups()
            if name in bound:
                raise ValueError(f"template {text!r}: {{{name}}} stands twice")
            bound.add(name)
            choice = "|".join(map(re.escape, words.split("|"))) if words else _NUMBER
            pattern += re.escape(text[end : found.start()])
            pattern += f"(?P<{name}>{choice})" if name else ".+"
            end = found.end()
        literal = _PLACEHOLDER.sub("", text)
        if "{" in literal or "}" in literal:
            raise ValueError(
                f"template {text!r}: a placeholder is {{name}}, {{name=a|b}}, or {{*}} at the end"
            )
        self._pattern = re.compile(pattern + re.escape(text[end:]))

    def match(self, name: str) -> dict[str, str] | None:
        """The bindings under which this template reads `name`, or None."""
        found = self._pattern.fullmatch(name)
        return found.groupdict() if found else None

    def fill(self, bindings: Mapping[str, str]) -> str:
        """The name under `bindings`, which must hold every placeholder."""
        return _PLACEHOLDER.sub(lambda found: bindings[found[1]], self.text)


@dataclass(frozen=True)
class Placement:
    """What a parameter must be when it is in place."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Copy:
    """One tensor is one parameter; `source` where the checkpoint spells it differently."""

    parameter: str
    source: str | None = None

    def sources(self, bindings: Mapping[str, str], shape: Shape) -> tuple[str, ...]:
        return (_template(self.source or self.parameter).fill(bindings),)

    def source_shapes(self, shape: Shape, found: Sequence[Shape | None]) -> tuple[Shape, ...]:
        return (shape,)

    def assemble(self, read: Reader, sources: Sequence[str], into: Placement) -> Tensor:
        return read(sources[0]).to(into.device, into.dtype)

    def split(self, parameter: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        return (parameter,)


@dataclass(frozen=True)
class Fuse:
    """Tensors laid one after the other along `dim` are one parameter."""

    parameter: str
    parts: tuple[str, ...]
    dim: int = 0

    def sources(self, bindings: Mapping[str, str], shape: Shape) -> tuple[str, ...]:
        return tuple(_template(part).fill(bindings) for part in self.parts)

    def source_shapes(self, shape: Shape, found: Sequence[Shape | None]) -> tuple[Shape, ...]:
        lengths = [part[self.dim] for part in found if part and len(part) == len(shape)]
        if len(lengths) < len(found) or sum(lengths) != shape[self.dim]:
            lengths = [shape[self.dim] // len(found)] * len(found)
        return tuple((*shape[: self.dim], n, *shape[self.dim + 1 :]) for n in lengths)

    def assemble(self, read: Reader, sources: Sequence[str], into: Placement) -> Tensor:
        fused, start = into.empty(), 0
        for name in sources:
            part = read(name)
            fused.narrow(self.dim, start, part.shape[self.dim]).copy_(part)
            start += part.shape[self.dim]
        return fused

    def split(self, parameter: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        return torch.split(parameter, [shape[self.dim] for shape in shapes], self.dim)


@dataclass(frozen=True)
class Stack:
    """Tensors numbered by the placeholder `over` are the slices of one parameter along `dim`."""

    parameter: str
    source: str
    over: str
    dim: int = 0

    def sources(self, bindings: Mapping[str, str], shape: Shape) -> tuple[str, ...]:
        template = _template(self.source)
        return tuple(
            template.fill({**bindings, self.over: str(number)}) for number in range(shape[self.dim])
        )

    def source_shapes(self, shape: Shape, found: Sequence[Shape | None]) -> tuple[Shape, ...]:
        return ((*shape[: self.dim], *shape[self.dim + 1 :]),) * len(found)

    def assemble(self, read: Reader, sources: Sequence[str], into: Placement) -> Tensor:
        stacked = into.empty()
        for name, part in zip(sources, stacked.unbind(self.dim), strict=True):
            part.copy_(read(name))
        return stacked

    def split(self, parameter: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        return parameter.unbind(self.dim)


@dataclass(frozen=True)
class Drop:
    """A tensor that the port has no use for, and why."""

    source: str
    because: str


@dataclass(frozen=True)
class Tie:
    """Where the model shares these two parameters, one tensor on disk serves both."""

    parameter: str
    to: str


Moving = Copy | Fuse | Stack


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

    def split(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that go to disk, by canonical name; a tied one once."""
        tensors: dict[str, Tensor] = {}
        for claim in self.claims:
            tensors |= claim.split(parameters[claim.parameter])
        return tensors


@dataclass(frozen=True)
class WeightMap:
    """Rules in the text model's spelling, and the prefixes under which checkpoints also write it.

    `prefixes` says what a prefix on disk stands for, as in `{"language_model.model.": "model."}`;
    the longest that fits is taken.
    """

    rules: tuple[Moving | Drop | Tie, ...]
    prefixes: Mapping[str, str] = field(default_factory=dict)

    def plan(self, model: nn.Module, header: Mapping[str, Shape | None]) -> Plan:
        """Lay the map over a checkpoint's tensor names and shapes (None: not known).

        `model` may be on the meta device. Raises `Mismatch` naming every tensor that is missing,
        unexpected or of another shape.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        on_disk = self._canonical_names(header)
        ties = self._ties(parameters)
        claims, missing = [], []
        for name, parameter in parameters.items():
            if name in ties:
                continue
            shape = tuple(parameter.shape)
            rule, bindings = self._claiming(name)
            canonical = rule.sources(bindings, shape)
            held = self._held_by_tie(name, canonical, on_disk, ties)
            absent = [source for source in held if source not in on_disk]
            missing += absent
            if len(missing) > _MOST_MISSING:  # of layers times experts that only a config claims
                _refuse(missing, [], [])
            if not absent:
                sources = tuple(on_disk[source] for source in held)
                shapes = rule.source_shapes(shape, [header[source] for source in sources])
                claims.append(Claim(rule, name, shape, sources, canonical, shapes))
        read = {source for claim in claims for source in claim.sources}
        # What a parameter claims is no leftover: a rule may drop what only some layers have.
        dropped = tuple(one for one in self._dropped(on_disk) if one.source not in read)
        tied = tuple(
            Tied(name, to, copy if (copy := on_disk.get(name)) not in read else None)
            for name, to in ties.items()
        )
        accounted = read | {one.also_on_disk for one in tied} | {one.source for one in dropped}
        unexpected = [name for name in header if name not in accounted]
        wanted = {
            name: shape
            for claim in claims
            for name, shape in zip(claim.sources, claim.source_shapes, strict=True)
        }
        for one in tied:
            if one.also_on_disk:
                wanted[one.also_on_disk] = tuple(parameters[one.to].shape)
        _refuse(missing, unexpected, _misshapen(wanted, header))
        return Plan(tuple(claims), tied, dropped)

    def written(self, model: nn.Module) -> Plan:
        """The plan of a model that comes from no checkpoint: for each parameter what is written.

        Parts of a `Fuse` are taken to be of one size.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        ties = self._ties(parameters)
        header: dict[str, Shape | None] = {}
        for name, parameter in parameters.items():
            if name not in ties:
                rule, bindings = self._claiming(name)
                header |= dict.fromkeys(rule.sources(bindings, tuple(parameter.shape)))
        return self.plan(model, header)

    def _canonical_names(self, header: Iterable[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        longest_first = sorted(self.prefixes, key=len, reverse=True)
        for name in header:
            prefix = next((p for p in longest_first if name.startswith(p)), "")
            canonical = self.prefixes.get(prefix, "") + name.removeprefix(prefix)
            if canonical in found:
                raise Mismatch(f"{name} and {found[canonical]} are two spellings of one tensor")
            found[canonical] = name
        return found

    def _dropped(self, on_disk: Mapping[str, str]) -> tuple[Drop, ...]:
        drops = [rule for rule in self.rules if isinstance(rule, Drop)]
        return tuple(
            Drop(name, rule.because)
            for canonical, name in on_disk.items()
            for rule in drops
            if _template(rule.source).match(canonical) is not None
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

    def _claiming(self, name: str) -> tuple[Moving, dict[str, str]]:
        found = [
            (rule, bindings)
            for rule in self.rules
            if isinstance(rule, Moving)
            and (bindings := _template(rule.parameter).match(name)) is not None
        ]
        assert len(found) == 1, f"{name} is claimed by {len(found)} rules of the weight map"
        return found[0]


@cache
def _template(text: str) -> Template:
    return Template(text)


def _misshapen(wanted: Mapping[str, Shape], header: Mapping[str, Shape | None]) -> list[str]:
    return [
        f"{name} is {list(found)} where the config makes it {list(shape)}"
        for name, shape in wanted.items()
        if (found := header[name]) is not None and found != shape
    ]


def _refuse(missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    complaints = [
        f"{len(names)} {kind}: {_listed(names)}"
        for names, kind in (
            (missing, "missing"),
            (unexpected, "unexpected"),
            (misshapen, "of another shape"),
        )
        if names
    ]
    if complaints:
        raise Mismatch(
            f"the checkpoint does not fit its config: {'; '.join(complaints)}; take config and "
            "weights of one release"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
