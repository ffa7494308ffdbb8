"""How good a model is on text that it was not trained on: nats per token and bits per byte.

Bits per byte do not depend on the tokenizer, so runs with different ones can be compared. Knows the
held-out tokens and the objective; and how a sample is drawn on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from portkit.architecture import CausalLM
from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.tokenizer import Tokenizer
from portkit.training.objective import IGNORED, Objective
from portkit.training.ranks import Ranks
from portkit.training.tokens import TokenFile

_SAMPLE_TOKENS = 100


@dataclass(frozen=True)
class Evaluation:
    """The mean loss of `num_tokens` predictions, and the same spread over the text's bytes."""

    nats_per_token: float
    bits_per_byte: float
    num_tokens: int


class HeldOut:
    """The first documents of a token file, at most `max_tokens` but at least one document.

    Cut into rows of `context` predictions, each row beginning without a past; every token but the
    very first is predicted once. `num_rows` rows go through the model at a time on each rank.
    """

    def __init__(self, tokens: TokenFile, context: int, max_tokens: int, num_rows: int) -> None:
        ends = tokens.starts[1:]
        documents = max(1, int(np.searchsorted(ends, max_tokens, "right")))
        ids = torch.from_numpy(tokens.ids[: int(ends[documents - 1])].astype(np.int64))
        self._num_bytes = int(tokens.bytes_before[documents])
        self.num_tokens = len(ids) - 1
        short = -self.num_tokens % context
        inputs = torch.cat((ids[:-1], ids.new_zeros(short)))
        targets = torch.cat((ids[1:], ids.new_full((short,), IGNORED)))
        self._rows = torch.stack((inputs, targets)).view(2, -1, context)
        self._num_rows = num_rows

    @torch.no_grad()
    def evaluate(self, objective: Objective, ranks: Ranks) -> Evaluation:
        """All ranks call it and get the same answer."""
        nats = torch.zeros((), dtype=torch.float64)
        at_once = self._num_rows * ranks.world
        rows = self._rows
        missing = -rows.shape[1] % at_once  # every rank must take as many turns as the others
        filler = torch.zeros(2, missing, rows.shape[2], dtype=rows.dtype)
        filler[1] = IGNORED
        rows = torch.cat((rows, filler), dim=1)
        objective.eval()
        for start in range(ranks.rank * self._num_rows, rows.shape[1], at_once):
            inputs, targets = rows[:, start : start + self._num_rows].to(ranks.device)
            nats += objective(inputs, targets).cpu().double()
        objective.train()
        total = ranks.sum(nats).item()
        return Evaluation(
            nats_per_token=total / self.num_tokens,
            bits_per_byte=total / math.log(2) / self._num_bytes,
            num_tokens=self.num_tokens,
        )


def sample(model: CausalLM, tokenizer: Tokenizer, prompt: str, context: int, seed: int) -> str:
    """The prompt and how the model goes on, drawn at temperature 0.8."""
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    settings = GenerationSettings(
        do_sample=True,
        temperature=0.8,
        max_new_tokens=_SAMPLE_TOKENS,
        eos_token_ids=eos,
        seed=seed,
    )
    ids = tokenizer.encode(prompt) or [tokenizer.bos_id or 0]
    model.eval()
    steps = generate(model, [ids], settings, context_length=context + 1, tokenizer=tokenizer)
    text = "".join(step.text for step in steps)
    model.train()
    return prompt + text
