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


NEEDS: dict[str, tuple[str, Callable[[Fed], bool]]] = {
    "several tokens": ("several tokens", lambda fed: fed.one.num_tokens > 1),
    "later tokens": ("a token that is not the first", lambda fed: fed.end > 1),
    "window crossed": (
        "more tokens than the window",
        lambda fed: fed.window is None or fed.end > fed.window + 1,
    ),
    "window decoded": (
        "one token behind a full window",
        lambda fed: fed.window is None or (fed.past >= fed.window and fed.one.num_tokens == 1),
    ),
    "left padding": ("a left-padded row", lambda fed: not bool(fed.one.real.all())),
    "continued": ("a past that it goes on from", lambda fed: fed.past > 0),
    "decoding": ("one token behind others", lambda fed: fed.past > 0 and fed.one.num_tokens == 1),
}
"""What a pass must have to show some faults: in words, and as a question."""


class Feeding:
    """How a probe feeds a model, as far as faults depend on it."""

    def __init__(self, facts: Facts, probe: Probe) -> None:
        window = min(facts.windows(), default=None)
        self._fed = {one.name: Fed(one, probe.past(one), window) for one in probe}

    def lacks(self, needs: Iterable[str]) -> str | None:
        """The first need that no pass meets, in words."""
        met = (NEEDS[one] for one in needs)
        return next((said for said, has in met if not any(map(has, self._fed.values()))), None)

    def passes_with(self, needs: Iterable[str]) -> set[str]:
        """The passes that meet all of them."""
        asked = [NEEDS[one][1] for one in needs]
        return {name for name, fed in self._fed.items() if all(has(fed) for has in asked)}
