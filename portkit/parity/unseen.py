"""What a comparison with a foreign side saw, and so what it did not.

Passes that a side refused, sites that it does not show, parameters that it lays out in its own way.
Knows names; judges nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from portkit.parity.probes.probe import Pass, Probe
from portkit.parity.result import NotVerified
from portkit.parity.sides.roles import Visit
from portkit.parity.sides.sites import CannotRun, kind_of

_TOLD = 3


class Unseen:
    """Keeps count while a comparison runs; `not_verified` says it."""

    def __init__(self) -> None:
        self.refused: dict[str, list[str]] = {}
        """Who did not run it and why, and the passes."""
        self.trace_sites: dict[str, None] = {}
        self.port_sites: dict[str, None] = {}
        self.widened: dict[str, None] = {}
        self.misfits: dict[str, str] = {}
        """Kinds of sites that fit in no way, and what either side has there."""
        self.parameters = 0, 0
        """How many of the reference's have an equal of that name in the port, and all."""
        self._num_passes = 0

    def passed(self, trace: Mapping[str, Tensor]) -> None:
        """A pass was run on both sides, the reference's sites being those of `trace`."""
        self._num_passes += 1
        self.trace_sites |= dict.fromkeys(trace)

    def refuse(self, who: str, one: Pass, reason: CannotRun, put: str | None = None) -> None:
        """`put`: the site at which the reference's tensor was put in place last, if any was."""
        told = f"the {who} does not run it: {reason}"
        if put is not None:
            told = (
                f"by itself the {who} runs it; the reference's {put} was put in place, and {reason}"
            )
        self.refused.setdefault(told, []).append(one.name)

    def misfit(self, name: str, port: Tensor, reference: Tensor) -> None:
        """A site that neither is compared nor put in place."""
        if ":in." in name:
            return  # rotary tables that a module is given in another form are its own affair
        ours, theirs = (f"{list(one.shape)} {_word(one.dtype)}" for one in (port, reference))
        self.misfits.setdefault(kind_of(name), f"the port has {ours} there, the reference {theirs}")

    def of_port(self, visit: Visit) -> Visit:
        """The visitor, and the names that it is shown."""

        def noted(name: str, tensor: Tensor) -> Tensor:
            self.port_sites[name] = None
            return visit(name, tensor)

        return noted

    def widen(self, name: str, dtype: torch.dtype) -> None:
        self.widened[
            f"{kind_of(name)} is {_word(dtype)} in the port; it was compared rounded once"
        ] = None

    def not_verified(self, probe: Probe) -> Iterator[NotVerified]:
        """Passes first, then sites by their kind."""
        for reason, passes in self.refused.items():
            more = f" and {len(passes) - _TOLD} more" if len(passes) > _TOLD else ""
            named = f"pass {', '.join(passes[:_TOLD])}{more}"
            yield NotVerified(named, reason, probe.is_complete)
        if self._num_passes and self.shows_logits_alone:
            yield NotVerified(
                "where errors are made",
                "one side shows nothing but its logits: errors are carried there from the tokens; "
                "a table (--sites) that pairs its modules with the reference's places them",
            )
        held, count = self.parameters
        if self._num_passes and held < count:
            yield NotVerified(
                f"{count - held} of {count} parameters by themselves",
                "no equal one has that name in the other; what modules make of them is compared",
            )
        pairs = (
            (self.trace_sites, self.port_sites, "the port does not show it: pair or record it"),
            (self.port_sites, self.trace_sites, "the reference does not show it"),
        )
        for there, here, reason in pairs if self._num_passes else ():
            for within, kinds in _lacking(there, here).items():
                yield NotVerified(f"{within}{', '.join(kinds)}", reason)

        for kind, reason in self.misfits.items():
            yield NotVerified(f"{kind}: not compared", reason)

    @property
    def shows_logits_alone(self) -> bool:
        """One of the sides, beside what it returns."""
        within = (
            [one for one in sites if one.partition("#")[0]]
            for sites in (self.trace_sites, self.port_sites)
        )
        return not all(within)

    def nothing_ran(self) -> str | None:
        """Why no pass was run on both sides, where that is so."""
        return None if self._num_passes else next(iter(self.refused), "the probe is empty")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _lacking(there: Mapping[str, None], here: Mapping[str, None]) -> dict[str, list[str]]:
    """Kinds of sites that are there and not here, by the module that they are in.

    Of inputs nothing is said: what goes into a module came out of another, or is out of sight.
    """
    lacking: dict[str, int] = {}
    for name in there:
        if name not in here and ":in" not in name:
            lacking[kind_of(name)] = lacking.get(kind_of(name), 0) + 1
    found: dict[str, list[str]] = {}
    for kind, count in lacking.items():
        within, mark, last = kind.rpartition("#" if "#" in kind else ".")
        if last == "*":
            within, mark, last = "", "", kind
        whole = sum(kind_of(name) == kind for name in there)
        share = "" if count == whole else f" ({count} of {whole})"
        named = f"{mark.strip('.')}{last}{share}"
        found.setdefault(f"{within}: " if within else "", []).append(named)
    return found
