"""Two faults in one port: drawn at random, so that neither gets in the other's way."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from parity_tests.faults.judging import Finding, Judging, plant
from parity_tests.faults.planted.planting import Model, Planting
from parity_tests.faults.stages import Stage
from portkit.parity.judging.judge import Verdict

NUM_PAIRS = 40


def draw(judging: Judging, stages: Sequence[Stage], seed: int) -> tuple[Stage, Planting]:
    """Two faults of different kinds in one checkpoint and dtype, in different places.

    Drawn again where both rewrite one piece of code: there the second would undo the first.
    """
    drawn = random.Random(seed)
    together: dict[tuple[str, str, str], list[Stage]] = defaultdict(list)
    for one in stages:
        together[one.family, one.checkpoint, one.dtype].append(one)
    family = drawn.choice(sorted({one.family for one in stages}))
    kinds = sorted(key for key, found in together.items() if key[0] == family and len(found) > 1)
    weights = [len(together[key]) for key in kinds]
    while True:
        one, other = drawn.sample(together[drawn.choices(kinds, weights)[0]], 2)
        alike = one.planting.fault == other.planting.fault
        if (
            not alike
            and one.planting.kernel == other.planting.kernel
            and _apart(judging, one, other)
        ):
            return one, other.planting


def _apart(judging: Judging, one: Stage, other: Stage) -> bool:
    touched, places = [], []
    for stage in (one, other):
        loaded = judging.load(stage.checkpoint, stage.dtype, stage.planting.kernel)
        places += plant(loaded, [stage.planting])
        touched.append({*_rewritten(loaded.model)})
    return places[0] != places[1] and not touched[0] & touched[1]


def _rewritten(model: Model) -> Iterator[str]:
    """What of a model runs other code than its own, and which of its parts are others."""
    yield from (name for name, module in model.named_modules() if "forward" in vars(module))
    yield from (name for name in ("new_cache", "logits") if name in vars(model))


def both_found(found: Finding) -> bool:
    """Each is told of where it was made."""
    wrong = {j.site for j in found.comparison.judgements if j.verdict is not Verdict.exact}
    return {*found.expected} <= wrong
