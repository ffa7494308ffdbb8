"""What a model loses that is another one by intent, as one with quantised weights is.

Nothing here is judged right or wrong: figures are told. Local errors are had as a proof has them:
the other model is taught by the first one's recording, once at the blocks, so that a layer's error
is all of its own, and once at every site, so that a matrix's is. Knows two models of one structure;
what makes the second another one it does not know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.parity.judging.local import Trace, block_modules, recorder, taught
from portkit.parity.probes.probe import Pass, chain
from portkit.parity.sides.port import PortSide
from portkit.parity.sides.roles import Visit
from portkit.parity.sides.sites import SiteTable, watching


@dataclass(frozen=True)
class Loss:
    """How far the other model is from the first, on given tokens."""

    divergence: float
    """The largest KL divergence of a token's distribution, in nats."""
    num_lost: int
    """Tokens whose likeliest successor is another one, of `num_tokens`."""
    num_tokens: int
    blocks: dict[str, float]
    """Relative RMS of what each layer, and the head, gives for the first model's input to it."""
    sites: dict[str, float]
    """The same of each site within, where it is not zero: of each matrix."""

    @property
    def worst_block(self) -> str:
        """The name of the block with the largest local error."""
        return max(self.blocks, key=self.blocks.__getitem__)

    def fields(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "kl": self.divergence,
            "lost_tokens": self.num_lost,
            "tokens": self.num_tokens,
            "local_errors": self.blocks,
            "site_errors": self.sites,
        }

    def __str__(self) -> str:
        return (
            f"KL at most {self.divergence:.1e}, {self.num_lost} of {self.num_tokens} tokens lost, "
            f"local error at most {self.blocks[self.worst_block]:.1e} ({self.worst_block})"
        )


def loss(
    model: CausalLM, other: CausalLM, logits: tuple[Tensor, Tensor], ids: Tensor, table: SiteTable
) -> Loss:
    """Of `other`, held against `model`; local errors on `ids`, int64 (1, tokens).

    `logits`, the model's and the other's, (tokens, vocab_size) both, are of whatever tokens were
    decoded, on whatever path.
    """
    theirs, ours = (one.double().log_softmax(-1) for one in logits)
    divergence = float((theirs.exp() * (theirs - ours)).sum(-1).max())
    lost = int((ours.argmax(-1) != theirs.argmax(-1)).sum())
    (run,) = chain("tokens", ids, [ids.shape[1]])
    trace: Trace = {}
    side = PortSide(model, ids.shape[1])
    with watching(side, table, recorder(trace)):
        side.run(run, {})
    blocks = _blocks_alone(trace, {*block_modules(side, table)})
    return Loss(
        divergence,
        lost,
        len(ours),
        # The embedding, and what else is the same in both, is no block that could lose anything.
        {name: one for name, one in _local_errors(other, table, run, blocks).items() if one},
        {name: one for name, one in _local_errors(other, table, run, trace).items() if one},
    )


def _blocks_alone(trace: Trace, blocks: set[str]) -> Trace:
    """Of a recording what goes into the blocks and comes out of them."""
    return {name: one for name, one in trace.items() if name.partition(":")[0] in blocks}


def _local_errors(other: CausalLM, table: SiteTable, run: Pass, trace: Trace) -> dict[str, float]:
    """Relative RMS at each output that is recorded; inputs are taught, and equal by that."""
    found: dict[str, float] = {}

    def compare(name: str, ours: Tensor, recorded: Tensor) -> None:
        if ":" not in name and recorded.is_floating_point():
            gap = (ours.double() - recorded.double()).pow(2).sum()
            found[name] = math.sqrt(float(gap) / max(float(recorded.double().pow(2).sum()), 1e-300))

    side = PortSide(other, run.num_tokens, is_partial=True)
    visit: Visit = taught(trace, compare)
    with torch.no_grad(), watching(side, table, visit):
        side.run(run, {})
    return found
