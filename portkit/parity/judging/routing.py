"""When another choice of experts is no more than rounding.

A router's choice is discrete: the last bit of a logit decides between two experts, and then all
weights of a token differ. So a choice is held against the truth where the truth chooses alike, and
another one than the reference's is told from a wrong one by the logits that it was made by, which
are a site of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def compared_tokens(
    exact: Tensor, theirs: Tensor, ours: Tensor, logits: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Of which tokens the reference's and the port's weights are held against the truth's.

    Weights (tokens, experts), zero where not chosen; `logits` likewise, the port's and the
    reference's where they differ, None where they are equal. Returns two times (tokens,). Left out
    are tokens for which the truth chooses other experts than the reference, and those for which the
    port does by logits of its own: by equal logits a choice is the reference's, or wrong.
    """
    tells, chose_others = ~_others(theirs, exact), _others(ours, theirs)
    if logits is None:
        return tells, tells | chose_others
    by_equal_logits = (logits[0] == logits[1]).all(1)
    return tells, torch.where(chose_others, by_equal_logits, tells)


def _others(a: Tensor, b: Tensor) -> Tensor:
    """(tokens,), True where the weights are not of the same experts."""
    return ((a != 0) != (b != 0)).any(1)


def logits_before(choice: str, trace: Mapping[str, Tensor]) -> str | None:
    """The site of the logits that a recorded choice was made by: it is visited just before."""
    names = list(trace)
    before = names[names.index(choice) - 1]
    return before if trace[before].shape == trace[choice].shape else None
