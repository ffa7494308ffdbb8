"""Which optimizer updates which parameter: AdamW for all, or Muon for the hidden matrices.

Knows parameters by their shape and by the module that holds them; knows no family.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from portkit.training.recipe import OptimizerName, Recipe


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), before it Muon where it is asked for.

    Matrices decay, vectors (norms, biases) do not. Muon (arXiv:2502.16982, with the scale that lets
    it share AdamW's rate and decay) takes the matrices that map hidden states to hidden states:
    embedding and head have rows that are tokens, and stay with AdamW.
    """
    tables = _token_tables(model)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizers: list[torch.optim.Optimizer] = []
    if recipe.optimizer == OptimizerName.muon:
        hidden = [p for p in matrices if p.dim() == 2 and id(p) not in tables]
        matrices = [p for p in matrices if p.dim() != 2 or id(p) in tables]
        optimizers.append(
            torch.optim.Muon(
                hidden,
                lr=recipe.learning_rate,
                weight_decay=recipe.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), fused=True
    )
    return [*optimizers, adamw]


def set_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def _token_tables(model: nn.Module) -> set[int]:
    embeddings = (m.weight for m in model.modules() if isinstance(m, nn.Embedding))
    heads = (m.weight for n, m in model.named_modules() if n.rpartition(".")[2] == "lm_head")
    return {id(weight) for weight in (*embeddings, *heads)}
