"""Next-token cross entropy that never holds the logits of a whole batch.

A vocabulary of 262,144 makes the logits of 8,192 tokens 8.6 GB in float32, and as much again for
their gradient. Here a chunk of tokens at a time goes through the head, and its gradients are taken
at once. Knows how a model's two halves are called; the head is the family's own, whatever it does
to its logits.

`torch.nn.functional.linear_cross_entropy` does the same for a plain head. It is not used: it has no
place for a capped head, and under autocast it multiplies in float32. Given a chunk size it takes as
long on a CPU; with its own it took four times as long as no chunks at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from portkit.architecture import CausalLM

IGNORED = -100
"""A target that is not predicted."""
_CHUNK_LOGITS = {"cpu": 1 << 26, "cuda": 1 << 28}
"""Logits of one chunk. Each costs a pass over the head's gradient, which a GPU finishes sooner."""


class Objective(nn.Module):
    """(batch, tokens) ids and targets to the summed loss of the targets, in nats, float32.

    Targets of `IGNORED` do not count. The matrices are multiplied in bfloat16 with `bfloat16`.
    """

    def __init__(self, model: CausalLM, bfloat16: bool) -> None:
        super().__init__()
        self.model = model
        self._in_bfloat16 = bfloat16
        self.chunk_loss: Callable[[Tensor, Tensor], Tensor] = self._chunk_loss

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self._in_bfloat16):
            hidden = self.model.hidden_states(input_ids).flatten(0, 1)
            targets = targets.flatten()
            num_logits = _CHUNK_LOGITS.get(hidden.device.type, _CHUNK_LOGITS["cpu"])
            chunk = max(1, num_logits // self.model.config.vocab_size)
            if not torch.is_grad_enabled():
                parts = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
                return torch.stack([self.chunk_loss(*part) for part in parts]).sum()
            if len(hidden) <= chunk:
                return self.chunk_loss(hidden, targets)
            head = tuple(p for p in self._head_parameters() if p.requires_grad)
            loss: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
                hidden, targets, chunk, self.chunk_loss, *head
            )
            return loss

    def _chunk_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.logits(hidden[None])[0].float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")

    def _head_parameters(self) -> list[nn.Parameter]:
        return list(self.model.get_submodule("lm_head").parameters())


class _ChunkedLoss(torch.autograd.Function):
    """The sum over chunks; gradients are made going forward, while a chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        chunk: int,
        chunk_loss: Callable[[Tensor, Tensor], Tensor],
        *head: Tensor,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden)
        head_gradients = [torch.zeros_like(parameter) for parameter in head]
        for start in range(0, len(hidden), chunk):
            part = hidden[start : start + chunk].detach().requires_grad_()
            with torch.enable_grad():
                loss = chunk_loss(part, targets[start : start + chunk])
            found = torch.autograd.grad(loss, (part, *head))
            hidden_gradient[start : start + chunk] = found[0]
            for gradient, more in zip(head_gradients, found[1:], strict=True):
                gradient.add_(more)
            total += loss.detach()
        ctx.save_for_backward(hidden_gradient, *head_gradients)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, *outer: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *head = ctx.saved_tensors  # type: ignore[attr-defined]  # set by save_for_backward
        return (hidden * outer[0], None, None, None, *(one * outer[0] for one in head))
