"""When two continuations agree: equal, or parted where rounding decides."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parity_tests.conftest import CheckpointMaker
from portkit.bench import agreement
from portkit.bench.agreement import compare_tokens, judge_paths
from portkit.bench.engines import EAGER, READABLE, TRANSFORMERS
from portkit.bench.true_logits import true_logits
from portkit.decoding.caches import Kind
from portkit.generation.loop import Engine
from portkit.loading import load
from portkit.readable import ReadableBatch

PROMPTS = [[5, 6, 7], [8, 9, 10]]


@torch.inference_mode()
def greedy(model: torch.nn.Module, count: int) -> list[list[int]]:
    engine = ReadableBatch(model, PROMPTS, count)
    columns = [engine.prefill().float().argmax(-1)]
    while len(columns) < count:
        columns.append(engine.greedy(columns[-1])[:, -1])
    return torch.stack(columns, 1).tolist()


def test_equal_tokens_agree(tiny_checkpoint: CheckpointMaker) -> None:
    model = load(tiny_checkpoint("llama3")).model
    tokens = greedy(model, 6)
    found = compare_tokens(model, PROMPTS, {TRANSFORMERS: tokens}, {})[TRANSFORMERS]
    assert found.same
    assert found.first_difference is None
    assert found.verdict is None


def test_another_token_is_found_at_its_place(tiny_checkpoint: CheckpointMaker) -> None:
    model = load(tiny_checkpoint("llama3")).model
    tokens = greedy(model, 6)
    wrong = [tokens[0], [*tokens[1][:4], (tokens[1][4] + 1) % 509, tokens[1][5]]]
    found = compare_tokens(model, PROMPTS, {READABLE: tokens, EAGER: wrong}, {EAGER: "rounding"})
    assert found[READABLE].same
    assert not found[EAGER].same
    difference = found[EAGER].first_difference
    assert difference is not None
    assert (difference["row"], difference["token"]) == (1, 4)
    assert difference["steps"] > 1
    assert found[EAGER].verdict == "rounding"


def test_a_tie_may_fall_either_way(tiny_checkpoint: CheckpointMaker) -> None:
    model = load(tiny_checkpoint("llama3")).model
    with torch.no_grad():
        model.lm_head.weight[1::2] = model.lm_head.weight[:-1:2]
    tokens = greedy(model, 3)
    twin = [[*row[:2], row[2] + 1] for row in tokens]
    assert all(row[2] % 2 == 0 for row in tokens), "the first of two equal rows"
    found = compare_tokens(model, PROMPTS, {READABLE: tokens, EAGER: twin}, {})[EAGER]
    assert found.same
    assert found.first_difference == {"token": 2, "row": 0, "steps": 0.0}


def _last_bit_of_one(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
    """Attention whose context is another in the last bit of a head's first number."""
    context = F.scaled_dot_product_attention(query, key, value, **options)
    context[..., 0] *= 1 + 2**-7
    return context


def test_paths_are_judged_and_a_wrong_one_diverges(
    tiny_checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_checkpoint("gemma3", torch.bfloat16)).model
    seen, own = list[Tensor](), agreement._logits

    def keep(engine: Engine, forced: Tensor) -> Tensor:
        seen.append(own(engine, forced))
        return seen[-1]

    with monkeypatch.context() as patched:
        patched.setattr(agreement, "_logits", keep)
        found = judge_paths(model, [READABLE, EAGER, TRANSFORMERS], 509)
    # Whether its sums come out equal is the machine's.
    readable, eager = seen
    is_equal = torch.equal(readable, eager)
    assert found == {READABLE: "exact", EAGER: "exact" if is_equal else "rounding"}
    with monkeypatch.context() as patched:
        other = SimpleNamespace(linear=F.linear, scaled_dot_product_attention=_last_bit_of_one)
        patched.setattr("portkit.decoding.operations.F", other)
        assert judge_paths(model, [EAGER], 509) == {EAGER: "rounding"}
    monkeypatch.setattr(Kind, "slot", lambda self, past: (past // 2) % self.num_slots)
    assert judge_paths(model, [EAGER], 509) == {EAGER: "diverged"}


@pytest.mark.parametrize("name", ["gemma3", "llama tied with biases", "qwen3 moe"])
def test_the_truth_is_float64_and_leaves_the_model_as_it_was(
    name: str, tiny_checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portkit.bench.true_logits.HEAD_ROWS", 200)  # of 509: not all alike
    model = load(tiny_checkpoint(name)).model
    held = {key: one.data_ptr() for key, one in model.named_parameters()}
    ids = torch.tensor([[3, 300, 17, 508, 44]])
    truth = true_logits(model, ids, 2)
    assert truth.dtype is torch.float64
    assert held == {key: one.data_ptr() for key, one in model.named_parameters()}
    with torch.inference_mode():
        assert model(ids).dtype is torch.float32
        # Its norms still compute in float32 there.
        whole = copy.deepcopy(model).double()(ids)[:, 2:]
    assert float((truth - whole).abs().max()) < 1e-5 * float(whole.abs().max())
    assert not torch.equal(truth, whole)
