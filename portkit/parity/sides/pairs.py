"""Site pairs: which module of a foreign port stands for which site of the reference.

A table has one line for one kind of module, the port's name and then the site's, templates in the
weight map's language:

    blocks.{layer}.attn.wq   = model.layers.{layer}.self_attn.q_proj
    blocks.{layer}.attn.wkv  = model.layers.{layer}.self_attn.{proj=k|v}_proj
    blocks.{layer}.attn.norm = model.layers.{layer}.self_attn.q_norm  [batch position head channel]

A list of words that the port's name does not bind are sites side by side, in this order, in the
module's output; the word `_` is a part that no site stands for. Dimensions in brackets are the
port's, where it orders them otherwise; `[output]` says that what goes into the module is no site,
as of an identity. A module that no line names goes by its own name. Knows names; runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product

from portkit.errors import SiteError
from portkit.parity.sides.sites import SiteTable
from portkit.weights import Template

_LINE = re.compile(r"(?P<port>\S+)\s*=\s*(?P<site>\S+)(?:\s+\[(?P<dims>[a-z ]+)\])?")
_TAKES = re.compile(r"takes\s*=\s*(.+)")
_WORDS = re.compile(r"\{([a-z_]+)=([^{}]+)\}")
_NEAR = 3
LEFT_OUT, BY_OUTPUT = "_", "output"
"""A part that no site stands for; a module of which only the output is one."""


@dataclass(frozen=True)
class Paired:
    """What a module's output is: one site, or several side by side in its last dimension."""

    sites: tuple[str | None, ...]
    """None: a part that is left out."""
    dims: tuple[str, ...] | None = None
    """The port's order of dimensions; None: the site's."""
    by_output: bool = False
    """What goes into the module is no site."""

    @property
    def is_plain(self) -> bool:
        """Its output as it is is the output of one module of the reference."""
        alone = len(self.sites) == 1 and self.dims is None and not self.by_output
        return alone and "#" not in (self.sites[0] or "#")


@dataclass(frozen=True)
class _Rule:
    line: str
    port: Template
    site: str
    dims: tuple[str, ...] | None
    by_output: bool

    def sites(self, bindings: Mapping[str, str]) -> tuple[str | None, ...]:
        """The sites of a module under the bindings of its name, in the order of their words."""
        open_words = [
            (name, words.split("|"))
            for name, words in _WORDS.findall(self.site)
            if name not in bindings
        ]
        template = Template(self.site)
        names = [name for name, _ in open_words]
        return tuple(
            None
            if LEFT_OUT in words
            else template.fill({**bindings, **dict(zip(names, words, strict=True))})
            for words in product(*(words for _, words in open_words))
        )


class SitePairs:
    """A table of pairs, read. Raises `SiteError` on a line that is none."""

    def __init__(self, text: str = "") -> None:
        lines = [line.strip() for line in text.splitlines()]
        told = [read[1] for line in lines if (read := _TAKES.fullmatch(line))]
        if len(told) > 1:
            raise SiteError("site pairs: takes = … stands twice: leave one out")
        self.takes = told[0] if told else None
        """What the port is given, under its own names, where the table says so."""
        pairs = (line for line in lines if line and not _TAKES.fullmatch(line))
        self._rules = tuple(_rule(line) for line in pairs if not line.startswith("#"))

    @property
    def has_lines(self) -> bool:
        """Whether it pairs anything at all."""
        return bool(self._rules)

    def laid_over(
        self, modules: Collection[str], table: SiteTable, known: Collection[str]
    ) -> dict[str, Paired]:
        """The port's modules that stand for a site, each with what it stands for.

        `known` are the reference's modules. Raises `SiteError` where a line names no module of the
        port or no site of the reference, or two name the same.
        """
        found: dict[str, Paired] = {}
        taken: dict[str, str] = {}
        for rule in self._rules:
            bound = {name: b for name in modules if (b := rule.port.match(name)) is not None}
            if not bound:
                raise SiteError(
                    f"site pairs: {rule.line!r}: the port has no module {rule.port.text}"
                    f"{near(rule.port.text, modules)}"
                )
            for name, bindings in bound.items():
                sites = _filled(rule, bindings)
                for site in filter(None, sites):
                    _check_site(rule, site, table, known)
                    if site in taken:
                        raise SiteError(
                            f"site pairs: {site} is both {taken[site]} and {name}: leave one out"
                        )
                    taken[site] = name
                if name in found:
                    raise SiteError(f"site pairs: two lines name {name}: {rule.line!r} is one")
                found[name] = Paired(sites, rule.dims, rule.by_output)
        for name in modules:
            if name and name in known and name not in found and name not in taken:
                found[name] = Paired((name,))
        return found


def near(name: str, names: Iterable[str]) -> str:
    """`; near: a, b`, the names that are most like one that was not found, numbers left open."""
    kinds = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=[.#]|$)", "{layer}", one) for one in names if one)
    close = get_close_matches(name, kinds, _NEAR, 0.5) or list(kinds)[:_NEAR]
    return f"; near: {', '.join(close)}" if close else ""


def _rule(line: str) -> _Rule:
    read = _LINE.fullmatch(line)
    if read is None:
        raise SiteError(
            f"site pairs: {line!r:.120} is no pair: write PORT = SITE, as in "
            "blocks.{layer}.attn.wq = model.layers.{layer}.self_attn.q_proj"
        )
    try:
        port, _ = Template(read["port"]), Template(read["site"])
    except ValueError as error:
        raise SiteError(f"site pairs: {error}") from error
    words = (read["dims"] or "").split()
    dims = tuple(one for one in words if one != BY_OUTPUT)
    return _Rule(line, port, read["site"], dims or None, BY_OUTPUT in words)


def _filled(rule: _Rule, bindings: Mapping[str, str]) -> tuple[str | None, ...]:
    try:
        sites = rule.sites(bindings)
        if sites.count(None) > 1 or not any(sites):
            raise SiteError(f"site pairs: {rule.line!r}: one part may be left out, and not all")
        return sites
    except KeyError as error:
        raise SiteError(
            f"site pairs: {rule.line!r}: {{{error.args[0]}}} stands on the right alone"
        ) from error


def _check_site(rule: _Rule, site: str, table: SiteTable, known: Collection[str]) -> None:
    dims = table.dims(site)
    if dims is None and site in known and rule.dims is None:
        return  # rotary tables are sites of another name; of what never runs there are parameters
    base = site.partition("#")[0]
    if dims is None or ":" in site or base not in known:
        raise SiteError(
            f"site pairs: {rule.line!r}: the reference has no site {site}"
            f"{near(rule.site, (*table.names, *known))}"
        )
    if rule.dims is not None and sorted(rule.dims) != sorted(dims.split()):
        raise SiteError(f"site pairs: {rule.line!r}: the dimensions of {site} are {dims}")
