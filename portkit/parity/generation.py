"""Generation parity: do both sides say the same, greedily, and if not, does rounding explain it?

The port is fed the reference's own tokens, one step at a time. Up to the first step at which its
choice differs the two would have had the same history, so that is where greedy generation parts;
and its logits at every step give the divergence of the two distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from portkit.parity.probes.probe import Pass
from portkit.parity.sides.sites import Side

NUM_TOKENS = 24


@dataclass(frozen=True)
class FirstDifference:
    """The first step at which the two sides choose different tokens."""

    step: int
    port_token: int
    reference_token: int
    port_gap: float
    """By how much the port prefers its token to the reference's, in logits."""
    reference_gap: float
    """By how much the reference prefers its own."""
    floor: float
    """How far a logit of this step moves between the reference's own kernels, or by one step of
    the dtype, whichever is more."""

    @property
    def is_rounding(self) -> bool:
        """Both preferences are no more than two logits can move by rounding."""
        return max(self.port_gap, self.reference_gap) <= 2 * self.floor


@dataclass(frozen=True)
class GenerationParity:
    """Greedy generation of both sides from one prompt."""

    prompt: tuple[int, ...]
    reference_tokens: tuple[int, ...]
    port_tokens: tuple[int, ...]
    """What the port alone goes on with."""
    first_difference: FirstDifference | None
    max_kl: float
    """Largest divergence of a step, KL(reference ‖ port) in nats, on the reference's tokens."""
    top1_agreement: float
    """Share of the steps at which both prefer the same token, on the reference's tokens."""

    @property
    def is_equal(self) -> bool:
        return self.first_difference is None


@torch.no_grad()
def compare_generation(
    port: Side, reference: Side, prompt: Sequence[int], num_tokens: int = NUM_TOKENS
) -> GenerationParity:
    """Generate `num_tokens` greedily on both sides after `prompt`.

    Of equal logits the token with the lowest id is chosen. Stop tokens do not stop it.
    """
    tokens, theirs = _greedy(reference, prompt, num_tokens)
    _, ours = _greedy(port, prompt, num_tokens, forced=tokens)
    divergences = list(map(_divergence, ours, theirs))
    chosen = ours.argmax(-1)
    differing = (chosen != torch.tensor(tokens, device=chosen.device)).nonzero().flatten().tolist()
    first, own = None, tuple(tokens)
    if differing:
        step = differing[0]
        first = _first_difference(
            reference, prompt, tokens, step, ours[step].double(), theirs[step].double()
        )
        own = tuple(_greedy(port, prompt, num_tokens)[0])
    return GenerationParity(
        tuple(prompt),
        tuple(tokens),
        own,
        first,
        max(0.0, *divergences),
        1 - len(differing) / num_tokens,
    )


def _divergence(ours: Tensor, theirs: Tensor) -> float:
    """KL(reference ‖ port) of one step's logits (vocab_size,), in nats; computed in float64."""
    if torch.equal(ours, theirs) and bool(theirs.isfinite().all()):
        return 0.0
    a, b = (one.double().log_softmax(-1) for one in (ours, theirs))
    return float(torch.nn.functional.kl_div(a, b, log_target=True, reduction="sum"))


def _greedy(
    side: Side, prompt: Sequence[int], num_tokens: int, forced: Sequence[int] | None = None
) -> tuple[list[int], Tensor]:
    """Tokens, and the logits (steps, vocab_size) that they were, or would have been, chosen by."""
    caches: dict[str, Any] = {}
    logits: list[Tensor] = []
    tokens: list[int] = []
    new, past, before = list(prompt), 0, None
    for step in range(num_tokens):
        positions = torch.arange(past, past + len(new))[None]
        one = Pass(str(step), torch.tensor([new]), positions, None, before, num_logits=1)
        logits.append(side.run(one.to(side.device), caches)[0, -1])
        tokens.append(int(logits[-1].argmax()) if forced is None else forced[step])
        past, before, new = past + len(new), one.name, [tokens[-1]]
    return tokens, torch.stack(logits)


def _first_difference(
    reference: Side,
    prompt: Sequence[int],
    tokens: Sequence[int],
    step: int,
    ours: Tensor,
    theirs: Tensor,
) -> FirstDifference:
    a, b = tokens[step], int(ours.argmax())
    moved = 0.0
    with reference.other_kernel():
        _, again = _greedy(reference, prompt, step + 1, forced=tokens)
    if bool(again[step].isfinite().all()):
        moved = float((again[step].double() - theirs).abs().max())
    one_step = float(theirs[a].abs()) * torch.finfo(again.dtype).eps
    return FirstDifference(
        step,
        b,
        a,
        float(ours[b] - ours[a]),
        float(theirs[a] - theirs[b]),
        max(moved, one_step),
    )
