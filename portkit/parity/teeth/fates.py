"""What a probe would have caught: the fates of all faults over the dtypes that were compared.

Knows how two matrices become one, the one line of it, and its plain values; runs nothing but
`measure`, which asks for the matrix alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from portkit.parity.faults.catalogue import CATALOGUE
from portkit.parity.faults.fault import Fault
from portkit.parity.teeth.kill import Fate
from portkit.parity.teeth.sensitivity import Sensitivity, over_dtypes
from portkit.parity.teeth.sensitivity import as_fields as config_as_fields
from portkit.parity.teeth.sensitivity import line as fields_seen

NUM_SAMPLED = 24
AMOUNTS = ("full", "sampled", "off")


@dataclass(frozen=True)
class Teeth:
    """The fate of every fault that was tried, in the catalogue's order."""

    fates: tuple[Fate, ...]
    config: tuple[Sensitivity, ...] | None = None
    """Which fields of the config the probe sees; None: they were not moved."""
    kinds: Mapping[str, bool] = field(default_factory=dict)
    """Of each kind of site, whether a recipe is known, without which no fault is tried there."""

    @property
    def applicable(self) -> int:
        return sum(one.applies for one in self.fates)

    @property
    def killed(self) -> int:
        return sum(one.killed for one in self.fates)

    @property
    def survived(self) -> tuple[Fate, ...]:
        return tuple(one for one in self.fates if one.survived is not None)

    @property
    def without_recipe(self) -> tuple[str, ...]:
        """The kinds of sites of which nothing is known that a fault could edit."""
        return tuple(kind for kind, is_known in self.kinds.items() if not is_known)

    @property
    def line(self) -> str:
        """`would have caught 88 of 88 applicable faults and sees 17 of 17 fields of the config`."""
        caught = f"would have caught {self.killed} of {self.applicable} applicable faults"
        seen = "" if self.config is None else f" and {fields_seen(self.config)}"
        lacking = f"{len(self.without_recipe)} of {len(self.kinds)} kinds of sites have no recipe"
        return f"{caught}{seen}; {lacking}"


def merged(
    matrices: Sequence[tuple[Fate, ...]],
    configs: Sequence[tuple[Sensitivity, ...]] | None,
    kinds: Sequence[Mapping[str, bool]],
) -> Teeth:
    """Of each fault the first fate that tells: it was caught, or why it was not.

    `configs` is None where no field was moved.
    """
    told: list[Fate] = []
    for each in zip(*matrices, strict=True):
        killed = next((one for one in each if one.killed), None)
        told.append(killed or next((one for one in each if one.applies), each[0]))
    known: dict[str, bool] = {}
    for one in kinds:
        known |= {kind: found or known.get(kind, False) for kind, found in one.items()}
    return Teeth(tuple(told), None if configs is None else over_dtypes(configs), known)


def chosen(amount: str) -> tuple[Fault, ...]:
    """The faults to try: all, a few of every class in turn, or none."""
    assert amount in AMOUNTS, f"the command lets {amount!r} through"
    if amount == "off":
        return ()
    if amount == "full":
        return CATALOGUE
    drawn = set(random.Random(0).sample(range(len(CATALOGUE)), NUM_SAMPLED))
    return tuple(one for number, one in enumerate(CATALOGUE) if number in drawn)


def as_fields(teeth: Teeth) -> dict[str, Any]:
    """Plain values, as `portkit faults --json` prints them."""
    return {
        **counts(teeth),
        "faults": [
            {
                "name": one.fault.id,
                "says": f"the port {one.fault.says}",
                "mend": one.fault.mend,
                "applies": one.applies,
                "killed_by": one.killed_by,
                "first_site": one.first_site,
                "pass": one.first_pass,
                "dtype": one.dtype,
                "margin": one.margin
                if one.margin is not None and math.isfinite(one.margin)
                else None,
            }
            for one in teeth.fates
        ],
    }


def counts(teeth: Teeth) -> dict[str, Any]:
    """How many apply and were caught, and what survived and why."""
    return {
        "applicable": teeth.applicable,
        "killed": teeth.killed,
        "survived": [{"name": one.fault.id, "reason": one.survived} for one in teeth.survived],
        "config": config_as_fields(teeth.config or ()),
        "kinds_of_sites": len(teeth.kinds),
        "without_recipe": list(teeth.without_recipe),
    }
