"""No speed without its proof: are the tokens the readable model's, and what is the path's verdict?

Two greedy continuations agree where they are equal, or where they first part at two tokens whose
logits are within one step of the dtype of each other: there rounding decides. Transformers' tokens
are what others are held against where it takes part, the readable model's elsewhere. That is the
reference bit for bit, and is asked for the logits. Knows models and tokens, no clocks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.bench.engines import (
    EAGER,
    EXACT,
    FAST,
    KERNELS,
    QUANTIZED,
    READABLE,
    TRANSFORMERS,
    runner_of,
)
from portkit.bench.true_logits import true_logits
from portkit.decoding.device_session import DeviceSession
from portkit.decoding.fast import FastModel
from portkit.decoding.packages import Packages, default_folder
from portkit.decoding.session import Session
from portkit.generation.loop import Engine
from portkit.loading import LoadedModel
from portkit.parity.decoding.approximate import Loss, loss
from portkit.parity.judging.judge import FLOOR_FACTOR
from portkit.parity.subject.discovery import sites_of
from portkit.quantizing import quantize
from portkit.readable import ReadableBatch

Rows = Sequence[Sequence[int]]

_JUDGED_PROMPT, _JUDGED_STEPS = 24, 16
_NUM_LOST_OF = 63
"""Tokens behind the prompt on which it is counted what a quantised model loses."""


@dataclass(frozen=True)
class Agreement:
    """How an engine's tokens compare with the reference's, or the readable model's.

    `same`: equal, or parted by rounding. `first_difference`: where the first row parts, and by how
    many steps of the dtype its two logits differ there; None where all is equal. `num_tokens`: how
    many a row has. `verdict`: exact, rounding or diverged; None of an engine that is not ours.
    """

    same: bool
    first_difference: dict[str, float] | None
    num_tokens: int
    verdict: str | None

    def fields(self) -> dict[str, Any]:
        """As JSON has it, without the verdict, which is the engine's."""
        return {
            "num_tokens": self.num_tokens,
            "same_tokens": self.same,
            "first_difference": self.first_difference,
        }

    def __str__(self) -> str:
        if self.first_difference is None:
            return f"yes, all {self.num_tokens}"
        place, steps = self.first_difference["token"], self.first_difference["steps"]
        same = "yes" if self.same else "no"
        return f"{same}, to {place:.0f} of {self.num_tokens}: {steps:.1f} steps apart"


def compare_tokens(
    model: CausalLM, prompts: Rows, tokens: Mapping[str, Rows], verdicts: Mapping[str, str]
) -> dict[str, Agreement]:
    """Each engine's agreement with Transformers, or where it took no part the readable model,
    whose tokens are made if none gave them.
    """
    num_tokens = max(len(row) for rows in tokens.values() for row in rows)
    expected = tokens.get(TRANSFORMERS) or tokens.get(READABLE)
    expected = expected or _continue(model, prompts, num_tokens)
    found = {}
    for engine, rows in tokens.items():
        difference = _first_difference(model, prompts, expected, rows)
        same = difference is None or difference["steps"] <= 1
        found[engine] = Agreement(same, difference, num_tokens, verdicts.get(engine))
    return found


def judge_paths(model: CausalLM, engines: Sequence[str], vocab_size: int) -> dict[str, str]:
    """The verdict on each of our own paths: how far its logits are from float64's.

    One prompt and some steps with given tokens. Equal to the readable path's in every bit is
    `exact`; at most 1.25 times as far from the truth `rounding`; else `diverged`.
    """
    ids = _random_text(model, vocab_size, _JUDGED_PROMPT + _JUDGED_STEPS)
    device = ids.device
    prompts, forced = [ids[:_JUDGED_PROMPT].tolist()], ids[_JUDGED_PROMPT:]
    room = _JUDGED_STEPS + 1
    truth = true_logits(model, ids[None], _JUDGED_PROMPT - 1)[0]
    readable = _logits(ReadableBatch(model, prompts, room), forced)
    floor = _distance(readable, truth)
    found = {}
    for engine in engines:
        if engine == READABLE:
            found[engine] = "exact"
        elif engine in (EAGER, KERNELS, FAST, EXACT):
            packages = None if engine == EAGER else Packages(default_folder(), lambda _: None)
            runner = runner_of(engine, device.type, lambda _: None)
            session = FastModel(model, packages, runner=runner).start(prompts, room)
            logits = _logits(session, forced)
            near = _distance(logits, truth) <= FLOOR_FACTOR * floor
            equal = torch.equal(logits, readable)
            found[engine] = "exact" if equal else "rounding" if near else "diverged"
        elif engine in QUANTIZED:
            found[engine] = "approximate"
    return found


def losses(loaded: LoadedModel, engines: Sequence[str]) -> dict[str, Loss]:
    """What those of the paths lose that are another model by intent.

    One prompt, and tokens behind it that the fast path is given.
    """
    found = {}
    for engine, scheme in QUANTIZED.items():
        if engine in engines:
            found[engine] = _loss(loaded, scheme)
    return found


def _loss(loaded: LoadedModel, scheme: str) -> Loss:
    model, table = loaded.model, sites_of(loaded.model)
    num_tokens = min(_JUDGED_PROMPT + _NUM_LOST_OF, loaded.config.max_position_embeddings)
    ids = _random_text(model, loaded.config.vocab_size, num_tokens)
    prompts, forced = [ids[:_JUDGED_PROMPT].tolist()], ids[_JUDGED_PROMPT:]
    room = len(forced) + 1
    readable = _logits(ReadableBatch(model, prompts, room), forced)
    other = copy.deepcopy(model)
    quantize(other, scheme)
    packages = Packages(default_folder(), lambda _: None)
    logits = _logits(FastModel(other, packages).start(prompts, room), forced)
    return loss(model, other, (readable, logits), ids[None], table)


def _random_text(model: CausalLM, vocab_size: int, num_tokens: int) -> Tensor:
    """The same each time, int64 (num_tokens,), where the model is."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (num_tokens,), generator=generator)
    return ids.to(next(model.parameters()).device)


@torch.inference_mode()
def _logits(engine: Engine, forced: Tensor) -> Tensor:
    first = engine.prefill()
    if isinstance(engine, (Session, DeviceSession)):
        engine.prepare(wait=True)
    return torch.cat([first, *(engine.decode(token[None]) for token in forced)])


def _distance(logits: Tensor, truth: Tensor) -> float:
    return float((logits.double() - truth).pow(2).mean().sqrt())


@torch.inference_mode()
def _continue(model: CausalLM, prompts: Rows, num_tokens: int) -> list[list[int]]:
    engine = ReadableBatch(model, prompts, num_tokens)
    columns = [engine.prefill().float().argmax(-1)]
    while len(columns) < num_tokens:
        columns.append(engine.greedy(columns[-1])[:, -1])
    return [list(row) for row in torch.stack(columns, 1).tolist()]


@torch.inference_mode()
def _first_difference(
    model: CausalLM, prompts: Rows, expected: Rows, found: Rows
) -> dict[str, float] | None:
    parted = [
        (next(i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), row)
        for row, (x, y) in enumerate(zip(expected, found, strict=True))
        if list(x) != list(y)
    ]
    if not parted:
        return None
    # Each row has parted at most by one step where it did first: the widest of them counts.
    steps = 0.0
    engine = ReadableBatch(model, prompts, max(place for place, _ in parted) + 1)
    logits = engine.prefill()
    for place in range(max(place for place, _ in parted) + 1):
        for where, row in parted:
            if where == place:
                gap = _steps_apart(logits[row], expected[row][place], found[row][place])
                steps = max(steps, gap)
        if place < max(where for where, _ in parted):
            logits = engine.decode(
                torch.tensor([row[place] for row in expected], device=logits.device)
            )
    return {"token": min(parted)[0], "row": min(parted)[1], "steps": steps}


def _steps_apart(logits: Tensor, a: int, b: int) -> float:
    """How many steps of the logits' dtype lie between two of them, at the larger one's size."""
    first, second = float(logits[a]), float(logits[b])
    largest = max(abs(first), abs(second))
    step = torch.finfo(logits.dtype).eps * 2.0 ** math.floor(math.log2(largest)) if largest else 1
    return abs(first - second) / step
