"""One optimizer step: rows, loss, gradient, clipping, update. And what went wrong, where.

Knows a recipe, an order of blocks and the ranks; knows nothing of files, time or what is printed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from portkit.architecture import CausalLM
from portkit.errors import TrainingError
from portkit.training.objective import Objective
from portkit.training.optimizer import build_optimizers, set_rate
from portkit.training.order import Order
from portkit.training.ranks import Ranks
from portkit.training.recipe import Precision, Recipe
from portkit.training.saves import State


@dataclass(frozen=True)
class StepResult:
    """`loss` in nats per token, the mean over the whole batch; the gradient's norm unclipped."""

    loss: float
    learning_rate: float
    gradient_norm: float


class Trainer:
    """A model under training. The model is sharded, compiled and wrapped as the recipe says.

    Raises TrainingError where the batch cannot be shared out evenly.
    """

    def __init__(self, model: CausalLM, recipe: Recipe, order: Order, ranks: Ranks) -> None:
        parts = recipe.accumulation * ranks.world
        if recipe.batch_size % parts:
            raise TrainingError(
                f"a batch of {recipe.batch_size} rows cannot be shared by {ranks.world} ranks in "
                f"{recipe.accumulation} parts each: make --batch-size a multiple of {parts}"
            )
        self.rows = recipe.batch_size // parts
        """Rows of one micro-batch on one rank."""
        self.recipe, self.ranks, self._order = recipe, ranks, order
        self.model = model.train()
        self.objective = Objective(model, recipe.precision == Precision.bfloat16)
        layers = model.model.get_submodule("layers")
        assert isinstance(layers, nn.ModuleList)
        if recipe.activation_checkpointing:
            for layer in layers:
                _recompute(layer)
        if recipe.compile:
            for layer in layers:
                layer.compile()
            self.objective.chunk_loss = torch.compile(self.objective.chunk_loss)
        ranks.shard(self.objective, layers)
        self._optimizers = build_optimizers(self.objective, recipe)
        self.state = State(self.objective, self._optimizers)

    def step(self, step: int) -> StepResult:
        """Steps are counted from 0. Raises TrainingError where loss or gradient are not finite."""
        recipe, ranks = self.recipe, self.ranks
        rate = recipe.schedule_of_rates.rate(step)
        set_rate(self._optimizers, rate)
        # Whatever a model draws is a function of (seed, step, rank): no generator has to be saved.
        torch.manual_seed((recipe.seed + (step << 20) + ranks.rank) % 2**63)
        loss = torch.zeros((), device=ranks.device)
        for micro in range(recipe.accumulation):
            self._sync_gradients(micro == recipe.accumulation - 1)
            part = self._loss(step, micro)
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
        limit = recipe.max_gradient_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), limit)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        result = StepResult((ranks.sum(loss) / ranks.world).item(), rate, norm.item())
        if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
            raise TrainingError(self._blame(step, result))
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return result

    def is_finite(self) -> bool:
        """Whether every weight is, on all ranks."""
        with torch.no_grad():
            bad = not all(bool(_local(p).isfinite().all()) for p in self.objective.parameters())
        return not self.ranks.any(bad)

    def _loss(self, step: int, micro: int) -> Tensor:
        """This rank's share of a step's mean loss, from one micro-batch."""
        blocks = self._blocks(step, micro)
        total: Tensor = self.objective(blocks[:, :-1], blocks[:, 1:])
        return total / (self.rows * self.recipe.accumulation * self.recipe.context)

    def _blocks(self, step: int, micro: int) -> Tensor:
        place = micro * self.ranks.world + self.ranks.rank
        first = step * self.recipe.batch_size + place * self.rows
        return self._order.blocks(first, self.rows).to(self.ranks.device)

    def _sync_gradients(self, now: bool) -> None:
        if self.ranks.world > 1:
            assert isinstance(self.objective, FSDPModule)
            self.objective.set_requires_gradient_sync(now)

    def _blame(self, step: int, result: StepResult) -> str:
        """Which module first made something that is not finite, going over the step once more."""
        what = "loss" if not math.isfinite(result.loss) else "gradient"
        where = ""
        if what == "gradient":
            bad = [
                name
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None and not bool(_local(parameter.grad).isfinite().all())
            ]
            where = f", first in that of {bad[-1]}" if bad else ""
        else:
            # All of them, found or not: every rank has to run as often as the others.
            micros = range(self.recipe.accumulation)
            found = [_first_not_finite(self, self._blocks(step, micro)) for micro in micros]
            where = next(filter(None, found), "")
        return (
            f"the {what} is not finite at step {step + 1}{where}; nothing was saved from it: lower "
            "--learning-rate, or clip harder with --max-gradient-norm"
        )


def _first_not_finite(trainer: Trainer, blocks: Tensor) -> str:
    found: list[str] = []

    def look(name: str) -> object:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(look(name))
        for name, module in trainer.model.named_modules()
        if name
    ]
    with torch.no_grad():
        trainer.objective(blocks[:, :-1], blocks[:, 1:])
    for handle in handles:
        handle.remove()
    return f", first in the output of {found[0]}" if found else ""


def _recompute(layer: nn.Module) -> None:
    """Keep only a layer's inputs, and run it once more when its gradient is wanted."""
    forward = layer.forward
    layer.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
