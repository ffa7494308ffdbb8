"""Every mistake that is planted in a port is caught, found where it was made, and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from parity_tests.faults.judging import Finding, Judging, checkpoints_in
from parity_tests.faults.misses import NOT_NAMED
from parity_tests.faults.planted import PLANTINGS
from parity_tests.faults.stages import FAMILIES, OWN, Stage, stages
from portkit.parity.judging.judge import Verdict

SAMPLE = (
    # fault, family, dtype, kind of the first culprit; None: closer to the truth than the reference
    ("loader.k_v_swapped", "llama", "bfloat16", "function"),
    ("loader.qk_rows_interleaved", "qwen3", "float32", "function"),
    ("loader.tied_although_untied", "gemma3", "bfloat16", "function"),
    ("rope.llama3_factor", "llama", "float32", "function"),
    ("rope.angles_in_low_precision", "qwen3", "bfloat16", "care"),
    ("rope.local_global_exchanged (for a layer)", "gemma3", "bfloat16", "glue"),
    ("attention.gqa_order", "llama", "bfloat16", "function"),
    ("attention.q_norm_missing", "qwen3", "bfloat16", "missing"),
    ("attention.window_plus_one", "gemma3", "float32", "shape"),
    ("norm.epsilon (by a ten-thousandth)", "llama", "bfloat16", "function"),
    ("norm.weight_before_cast", "qwen3", "bfloat16", None),
    ("norm.offset_rounded", "gemma3", "bfloat16", "care"),
    ("mlp.gelu_for_silu", "llama", "float32", "glue"),
    ("mlp.gate_up_exchanged", "qwen3", "bfloat16", "glue"),
    ("residual.missing (of the feed-forward)", "gemma3", "float32", "glue"),
    ("head.last_layer_missing", "llama", "bfloat16", "missing"),
    ("embedding.scale_in_float32", "gemma3", "bfloat16", "function"),
    ("cache.stale_after_chunk", "gemma3", "bfloat16", "glue"),
    ("cache.padded_positions", "llama", "bfloat16", "function"),
    ("precision.residual_upcast", "qwen3", "bfloat16", None),
    ("loader.experts_order", "qwen3_moe", "bfloat16", "function"),
    ("experts.weights_on_output", "llama4", "bfloat16", "glue"),
    ("residual.sequential", "cohere2", "bfloat16", "glue"),
    ("head.logit_scale_inverted", "cohere2", "float32", "glue"),
    ("norm.epsilon (by a ten-thousandth)", "llama", "float32", "function"),
    ("norm.pre_for_post (post)", "llama", "bfloat16", "glue"),
    ("norm.pre_for_post (pre)", "gemma3", "float32", "glue"),
    ("attention.norm_after_rotation", "qwen3", "float32", "glue"),
    ("attention.types_shifted", "gemma3", "bfloat16", "glue"),
    ("attention.softmax_in_dtype", "llama", "bfloat16", "care"),
    ("rope.shifted_by_a_layer", "smollm3", "float32", "glue"),
    ("rope.scaling_twice", "qwen3_moe", "bfloat16", "function"),
    ("head.softcap_applied", "cohere2", "float32", "glue"),
    ("experts.router_logits_in_float32", "qwen3_moe", "bfloat16", "shape"),
)
EVERY_LAYER_BUT_ONE = {"head.last_layer_missing", "mlp.sparsity_everywhere"}


@pytest.fixture(scope="module")
def judging(tmp_path_factory: pytest.TempPathFactory) -> Judging:
    torch.set_num_threads(1)
    return Judging(checkpoints_in(tmp_path_factory.mktemp("planted")))


@pytest.fixture(scope="module")
def all_stages(judging: Judging) -> dict[tuple[str, str, str], Stage]:
    found, _ = stages(judging.folder)
    return {(one.planting.name, one.family, one.dtype): one for one in found}


def check(stage: Stage, found: Finding) -> None:
    """Caught, found where it was made and, where one layer is wrong, in no other."""
    assert found.first is not None, "not caught"
    assert found.first.site == found.expected[0]
    block = ".".join(found.first.site.split(".")[:3])
    if block.startswith("model.layers.1") and stage.planting.fault not in EVERY_LAYER_BUT_ONE:
        wrong = [j for j in found.comparison.judgements if j.verdict is not Verdict.exact]
        assert all(one.site.startswith(block) for one in wrong), wrong


@pytest.mark.parametrize(("name", "family", "dtype", "kind"), SAMPLE)
def test_a_sample_is_caught_placed_and_named(
    name: str,
    family: str,
    dtype: str,
    kind: str | None,
    judging: Judging,
    all_stages: dict[tuple[str, str, str], Stage],
) -> None:
    stage = all_stages[name, family, dtype]
    found = judging.judge(stage)
    check(stage, found)
    check_named(stage, found)
    assert found.first is not None
    assert found.first.kind == kind
    assert found.comparison.verdict is (Verdict.diverged if kind else Verdict.rounding)


def check_named(stage: Stage, found: Finding) -> None:
    """The cause that is told first is the fault, of what rounds better too."""
    assert found.first is not None
    cause = found.comparison.causes.get(found.first.site)
    if stage.planting.name not in NOT_NAMED:
        assert cause is not None
        assert cause.name == stage.planting.fault
        assert cause.explains > 0.9


def every_stage() -> Iterator[tuple[str, str, str]]:
    """By name, so that nothing is written to disk while tests are collected."""
    for planting in PLANTINGS:
        for family in FAMILIES:
            for dtype in planting.dtypes:
                yield planting.name, family, dtype


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family", "dtype"), [*every_stage()])
def test_every_fault_is_caught_placed_and_named(
    name: str,
    family: str,
    dtype: str,
    judging: Judging,
    all_stages: dict[tuple[str, str, str], Stage],
) -> None:
    stage = all_stages.get((name, family, dtype))
    if stage is None:
        pytest.skip(f"not possible in {family}: docs/faults.md says why")
    found = judging.judge(stage)
    check(stage, found)
    check_named(stage, found)


def test_every_fault_is_planted_somewhere_or_nowhere_for_a_reason(judging: Judging) -> None:
    found, impossible = stages(judging.folder)
    assert len({one.name for one in PLANTINGS}) == len(PLANTINGS)
    assert {one.planting for one in found} | {one.planting for one in impossible} == {*PLANTINGS}
    nowhere = Counter(one.planting.fault for one in impossible)
    variants = Counter(one.fault for one in PLANTINGS)
    assert {
        fault for fault, count in nowhere.items() if count == len(FAMILIES) * variants[fault]
    } == {"mlp.gelu_tanh"}
    reasons = {(one.planting.name, one.family): one.reason for one in impossible}
    assert reasons["attention.window_plus_one", "llama"] == "no layer slides"
    assert reasons["rope.local_global_exchanged", "qwen3"] == "all layers share one rotary table"
    assert reasons["mlp.gelu_tanh", "gemma3"] == "the feed-forward is not gated by gelu"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpoint", OWN)
def test_the_ports_are_exact_where_nothing_is_planted(
    checkpoint: str, kernel: str, dtype: str, judging: Judging
) -> None:
    clean = judging.clean(checkpoint, dtype, kernel)
    assert clean.verdict is Verdict.exact
    assert clean.causes == {}
