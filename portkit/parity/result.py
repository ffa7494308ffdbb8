"""What a comparison found: judgements, what was not verified, and the verdict over all of it.

Knows the words and the order of verdicts; computes no distance and prints nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from portkit.parity.judging.judge import Judgement, Verdict, worst
from portkit.parity.judging.ledger import SiteAccount

if TYPE_CHECKING:
    from portkit.parity.generation import GenerationParity
    from portkit.parity.gradients import GradientParity
    from portkit.parity.probes.probe import Probe
    from portkit.parity.teeth.diagnose import Cause
    from portkit.parity.teeth.fates import Teeth
    from portkit.parity.teeth.kill import Fate
    from portkit.parity.teeth.sensitivity import Sensitivity


@dataclass(frozen=True)
class NotVerified:
    """What a comparison did not see, and why."""

    name: str
    reason: str
    was_meant: bool = False
    """The probe was meant to show it: without it the verdict is inconclusive."""


@dataclass(frozen=True)
class Comparison:
    """One probe in one dtype: every site, in order of execution."""

    dtype: str
    probe: Probe
    judgements: tuple[Judgement, ...]
    accounts: dict[str, SiteAccount]
    not_verified: tuple[NotVerified, ...] = ()
    fates: tuple[Fate, ...] = ()
    """What became of each fault of the catalogue that was tried."""
    config: tuple[Sensitivity, ...] = ()
    """Which fields of the config the probe sees."""
    kinds: Mapping[str, bool] = field(default_factory=dict)
    """Of each kind of site, whether a recipe is known that a fault could edit."""
    notes: tuple[str, ...] = ()
    causes: dict[str, Cause] = field(default_factory=dict)
    """Why each culprit differs, as far as it is known."""

    @property
    def verdict(self) -> Verdict:
        return worst(one.verdict for one in self.judgements)

    @property
    def culprits(self) -> tuple[Judgement, ...]:
        """Sites that diverged where they are made, in order of execution."""
        return tuple(one for one in self.judgements if one.verdict is Verdict.diverged)

    @property
    def rounded(self) -> tuple[tuple[Judgement, Cause], ...]:
        """Sites that are rounding and whose very bits a known fault gives, with that cause."""
        found = (one for one in self.judgements if one.verdict is Verdict.rounding)
        return tuple((one, self.causes[one.site]) for one in found if one.site in self.causes)

    @property
    def num_exact(self) -> int:
        return sum(one.verdict is Verdict.exact for one in self.judgements)


@dataclass(frozen=True)
class ParityResult:
    """The answer: the comparison that was asked for, and what stands beside it."""

    comparisons: tuple[Comparison, ...]
    """In the dtype asked for, and then in bfloat16 where that is another."""
    generation: GenerationParity | None = None
    not_verified: tuple[NotVerified, ...] = ()
    notes: tuple[str, ...] = field(default=())
    """What was done to be able to compare, such as a config that was patched for the reference."""
    gradients: GradientParity | None = None

    @property
    def judged(self) -> tuple[Comparison | GradientParity, ...]:
        """All that has a verdict of its own, and culprits."""
        return self.comparisons if self.gradients is None else (*self.comparisons, self.gradients)

    teeth: Teeth | None = None
    """What the probe would have caught; None where it was not asked."""

    @property
    def verdict(self) -> Verdict:
        """Diverged before inconclusive before rounding before exact."""
        found = worst(one.verdict for one in self.judged)
        if found is not Verdict.diverged and any(one.was_meant for one in self.not_verified):
            return Verdict.inconclusive
        return found
