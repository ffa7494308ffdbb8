"""Each filter against the reference's logits processor of its name: the same bits."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from portkit.generation.sampling import (
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_tokens,
    penalize_repetition,
)
from portkit.generation.settings import GenerationSettings

INF = float("inf")


def awkward() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ties = torch.randint(-3, 4, (3, 331)).float()
    barred = torch.randn(2, 331) * 4
    barred[0, ::2] = -INF
    barred[1, 1:] = -INF  # a single token left
    return {
        "random": torch.randn(4, 331) * 3,
        "ties": ties,
        "all equal": torch.zeros(2, 331),
        "barred": barred,
        "one dominates": torch.nn.functional.one_hot(torch.tensor([5, 0, 330]), 331) * 1e4,
        "bfloat16 values": (torch.randn(2, 331) * 3).bfloat16().float(),
        "large vocabulary": torch.randn(2, 262_144) * 2,
        "two halves": torch.tensor([[0.0, -INF, 0.0, -INF]]),
        "tiny vocabulary": torch.tensor([[0.1, 0.1, -0.0, 0.0]]),
    }


@pytest.fixture(params=awkward())
def logits(request) -> torch.Tensor:
    return awkward()[request.param].float()


NO_IDS = torch.zeros(1, 0, dtype=torch.long)


def changed_nothing(logits: torch.Tensor, before: torch.Tensor) -> bool:
    return torch.equal(logits, before)


@pytest.mark.parametrize("penalty", [1.3, 0.7, 1.0])
def test_repetition_penalty(logits, penalty):
    before, vocab_size = logits.clone(), logits.shape[-1]
    ids = torch.randint(0, vocab_size, (len(logits), 40), generator=torch.manual_seed(1))
    ids[:, 1] = ids[:, 0]  # seen twice, penalised once
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalize_repetition(logits, seen, penalty), theirs)
    assert changed_nothing(logits, before)


@pytest.mark.parametrize("k", [1, 2, 50, 100_000])
def test_top_k(logits, k):
    before = logits.clone()
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(NO_IDS, logits.clone()))
    assert changed_nothing(logits, before)


@pytest.mark.parametrize("p", [1e-8, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999999])
def test_top_p(logits, p):
    before = logits.clone()
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(NO_IDS, logits.clone()))
    assert changed_nothing(logits, before)


@pytest.mark.parametrize("p", [1e-9, 0.05, 0.5, 1.0])
def test_min_p(logits, p):
    before = logits.clone()
    assert torch.equal(keep_min_p(logits, p), MinPLogitsWarper(p)(NO_IDS, logits.clone()))
    assert changed_nothing(logits, before)


def test_filters_apply_in_the_order_of_the_reference(logits):
    settings = GenerationSettings(
        do_sample=True, temperature=0.7, top_k=40, top_p=0.8, min_p=0.02, repetition_penalty=1.2
    )
    rows = len(logits)
    ids = torch.arange(20).remainder(logits.shape[-1]).expand(rows, -1)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    scores = logits.clone()
    for step in (
        RepetitionPenaltyLogitsProcessor(1.2),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.8),
        MinPLogitsWarper(0.02),
    ):
        scores = step(ids, scores)
    for seed in range(5):
        expected = [
            int(torch.multinomial(row.softmax(-1), 1, generator=torch.manual_seed(seed + i)))
            for i, row in enumerate(scores)
        ]
        generators = [torch.Generator().manual_seed(seed + i) for i in range(rows)]
        assert next_tokens(logits, settings, seen, generators).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_the_likeliest(dtype):
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [-INF, -2.0, -2.0, -INF]])
    tokens = next_tokens(logits.to(dtype), GenerationSettings(), None, [])
    assert tokens.tolist() == [1, 0, 1]
    assert tokens.dtype == torch.int64


def test_greedy_heeds_a_repetition_penalty_at_full_precision():
    # 2.015625 / 1.009 is just below 1.998: in bfloat16 the two would tie at 2.0
    logits = torch.tensor([[2.015625, 2.0]]).bfloat16()
    seen = torch.tensor([[True, False]])
    settings = GenerationSettings(repetition_penalty=1.009)
    assert next_tokens(logits, settings, seen, []).tolist() == [1]
    assert next_tokens(logits, settings, None, []).tolist() == [0]


def test_a_temperature_near_zero_is_greedy():
    logits = torch.randn(6, 331, generator=torch.manual_seed(2))
    generators = [torch.Generator().manual_seed(i) for i in range(6)]
    settings = GenerationSettings(do_sample=True, temperature=1e-4)
    assert next_tokens(logits, settings, None, generators).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 0}, [0, 1, 2, 3, 4]),
        ({"top_k": 0, "temperature": 2.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.8}, [0, 1, 2]),
        ({"min_p": 0.3}, [0, 1, 2]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_probable(options, kept):
    probabilities = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05])
    expected = probabilities ** (1 / options.get("temperature", 1.0))
    expected = torch.where(torch.isin(torch.arange(5), torch.tensor(kept)), expected, 0.0)
    expected /= expected.sum()
    draws, settings = 8_000, GenerationSettings(do_sample=True, **options)
    generators = [torch.Generator().manual_seed(i) for i in range(draws)]
    tokens = next_tokens(probabilities.log().expand(draws, -1), settings, None, generators)
    counts = torch.bincount(tokens, minlength=5).double()
    assert counts[expected == 0].sum() == 0
    alive = expected > 0
    chi2 = float(((counts - draws * expected) ** 2 / (draws * expected))[alive].sum())
    # Four degrees of freedom at most: 23.5 is exceeded once in 10,000 times.
    assert math.isfinite(chi2)
    assert chi2 < 23.5
