"""The rules of a weight map: how tensors of a checkpoint and parameters of a model stand together.

A rule is one line for one kind of tensor, in the checkpoint's own spelling. Rules move values and
never compute them, so each can be undone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

Reader = Callable[[str], Tensor]
Shape = tuple[int, ...]
_ALIGNED_BYTES = 16
"""Where a matrix begins at no multiple of it, torch multiplies one row by another kernel."""

_PLACEHOLDER = re.compile(r"\{([a-z_]+)(?:=([^{}]+))?\}|\{\*\}$")
_NUMBER = "0|[1-9][0-9]*"


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

    @property
    def pattern(self) -> str:
        """A regular expression of the same names, without the bindings."""
        return re.sub(r"\?P<[a-z_]+>", "?:", self._pattern.pattern)

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

    @property
    def spellings(self) -> tuple[str, ...]:
        return (_worded(self.source or self.parameter, self.parameter),)

    def sources(self, bindings: Mapping[str, str], shape: Shape) -> tuple[str, ...]:
        return (template(self.source or self.parameter).fill(bindings),)

    def source_shapes(self, shape: Shape, found: Sequence[Shape | None]) -> tuple[Shape, ...]:
        return (shape,)

    def assemble(self, read: Reader, sources: Sequence[str], into: Placement) -> Tensor:
        return read(sources[0]).to(into.device, into.dtype)

    def split(self, parameter: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        return (parameter,)


@dataclass(frozen=True)
class CopyOfOne(Copy):
    """The same, of one of several that the reference stacks in memory of its own.

    Left a view of the file it may begin at any byte, and a single row's float32 product then sums
    in another order than the reference's: such a view is copied.
    """

    def assemble(self, read: Reader, sources: Sequence[str], into: Placement) -> Tensor:
        found = super().assemble(read, sources, into)
        begins_anywhere = found.dtype is torch.float32 and found.data_ptr() % _ALIGNED_BYTES
        return found.clone() if begins_anywhere else found


@dataclass(frozen=True)
class Fuse:
    """Tensors laid one after the other along `dim` are one parameter."""

    parameter: str
    parts: tuple[str, ...]
    dim: int = 0

    @property
    def spellings(self) -> tuple[str, ...]:
        return tuple(_worded(part, self.parameter) for part in self.parts)

    def sources(self, bindings: Mapping[str, str], shape: Shape) -> tuple[str, ...]:
        return tuple(template(part).fill(bindings) for part in self.parts)

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

    @property
    def spellings(self) -> tuple[str, ...]:
        return (_worded(self.source, self.parameter),)

    def sources(self, bindings: Mapping[str, str], shape: Shape) -> tuple[str, ...]:
        numbers = range(shape[self.dim])
        return tuple(
            template(self.source).fill({**bindings, self.over: str(one)}) for one in numbers
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
class Slice:
    """Where a tensor holds several parameters in a stack: this is one of them.

    It stands behind the rule that a parameter is written by, and is taken where the checkpoint has
    the stack instead. `over` is the placeholder that numbers the stack along its first dimension;
    each of its slices holds `blocks` blocks of one size, one after the other, of which this is
    number `block`.
    """

    parameter: str
    source: str
    over: str
    block: int = 0
    blocks: int = 1
    number: int = 0
    """Which slice: bound by `at`."""

    @property
    def spellings(self) -> tuple[str, ...]:
        return (_worded(self.source, self.parameter),)

    def at(self, bindings: Mapping[str, str]) -> Slice:
        return replace(self, number=int(bindings[self.over]))

    def sources(self, bindings: Mapping[str, str], shape: Shape) -> tuple[str, ...]:
        return (template(self.source).fill(bindings),)

    def source_shapes(self, shape: Shape, found: Sequence[Shape | None]) -> tuple[Shape, ...]:
        """The stack as far as it is known to reach from here."""
        return ((self.number + 1, self.blocks * shape[0], *shape[1:]),)

    def assemble(self, read: Reader, sources: Sequence[str], into: Placement) -> Tensor:
        block = read(sources[0])[self.number].chunk(self.blocks)[self.block]
        return block.to(into.device, into.dtype)

    def split(self, parameter: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        return (parameter,)


@dataclass(frozen=True)
class Drop:
    """A tensor that the port has no use for, and why."""

    source: str
    because: str

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Tie:
    """Where the model shares these two parameters, one tensor on disk serves both."""

    parameter: str
    to: str

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.parameter, self.to)


Moving = Copy | Fuse | Stack | Slice
Rule = Moving | Drop | Tie


@cache
def template(text: str) -> Template:
    return Template(text)


def _worded(source: str, parameter: str) -> str:
    """A source's template with the words that the parameter's lists for the same placeholders."""
    listed = {name: words for name, words in _PLACEHOLDER.findall(parameter) if words}
    for name, words in listed.items():
        source = source.replace(f"{{{name}}}", f"{{{name}={words}}}")
    return source
