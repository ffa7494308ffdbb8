"""What a pass must have to show some faults, and which passes of a probe have it.

Knows how passes are fed, and no fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from portkit.parity.faults.scene import Facts
from portkit.parity.probes.probe import Pass, Probe


@dataclass(frozen=True)
class Fed:
    """How a pass is fed, as far as faults depend on it."""

    one: Pass
    past: int
    window: int | None
    """The smallest there is."""

    @property
    def end(self) -> int:
        return self.past + self.one.num_tokens


@dataclass(frozen=True)
class Need:
    """Something that a pass must have to show some faults."""

    said: str
    is_met: Callable[[Fed], bool]
    behind_window: int | None = None
    """So many tokens more than the window it takes; None: two tokens, whatever the window is."""

    def least(self, window: int | None) -> int:
        """How many tokens there must be room for."""
        return 2 if self.behind_window is None else (window or 0) + self.behind_window


NEEDS: dict[str, Need] = {
    "several tokens": Need("several tokens", lambda fed: fed.one.num_tokens > 1),
    "later tokens": Need("a token that is not the first", lambda fed: fed.end > 1),
    "window crossed": Need(
        "more tokens than the window",
        lambda fed: fed.window is None or fed.end > fed.window + 1,
        behind_window=2,
    ),
    "window decoded": Need(
        "one token behind a full window",
        lambda fed: fed.window is None or (fed.past >= fed.window and fed.one.num_tokens == 1),
        behind_window=1,
    ),
    "left padding": Need("a left-padded row", lambda fed: not bool(fed.one.real.all())),
    "continued": Need("a past that it goes on from", lambda fed: fed.past > 0),
    "decoding": Need(
        "one token behind others", lambda fed: fed.past > 0 and fed.one.num_tokens == 1
    ),
}


class Feeding:
    """How a probe feeds a model, as far as faults depend on it."""

    def __init__(self, facts: Facts, probe: Probe) -> None:
        self._window, self._context = min(facts.windows(), default=None), facts.context
        self._fed = {one.name: Fed(one, probe.past(one), self._window) for one in probe}

    def lacks(self, needs: Iterable[str]) -> str | None:
        """The first need that no pass meets, in words; None where the context has no room for it:
        what would need it decides nothing there."""
        asked = [NEEDS[one] for one in needs]
        if any(one.least(self._window) > self._context for one in asked):
            return None
        unmet = (one for one in asked if not any(map(one.is_met, self._fed.values())))
        return next((one.said for one in unmet), None)

    def passes_with(self, needs: Iterable[str]) -> set[str]:
        """The passes that meet all of them."""
        asked = [NEEDS[one].is_met for one in needs]
        return {name for name, fed in self._fed.items() if all(has(fed) for has in asked)}
