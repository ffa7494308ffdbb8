"""Matrices in 8 and 4 bits: what they stand for, what they save, and how they are decoded with."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import portkit
from parity_tests.conftest import CheckpointMaker
from parity_tests.decoding.test_equivalence import (
    NUM_DECODED,
    distance,
    logits_of,
    prompts,
    true_logits,
)
from portkit.architecture import CausalLM
from portkit.bench.agreement import judge_paths, losses
from portkit.bench.roofline import bytes_per_token
from portkit.cli import main
from portkit.decoding.fast import FastModel
from portkit.decoding.packages import Packages
from portkit.errors import QuantizationError
from portkit.loading import load
from portkit.nn.quantized import Int4Linear, Int8Linear
from portkit.quantizing import quantize
from portkit.readable import ReadableBatch

DEMO = str(Path(portkit.__file__).parent / "demo_checkpoint")
DTYPES = [torch.float32, torch.bfloat16]


def linear(rows: int, columns: int, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(3)
    made = nn.Linear(columns, rows, dtype=dtype)
    with torch.no_grad():
        made.weight[0] = 0  # a row without a size
    return made


def matrix_of(module: nn.Module, columns: int, dtype: torch.dtype) -> Tensor:
    """What a map multiplies by, (out, in): it is shown the unit vectors."""
    with torch.no_grad():
        return (module(torch.eye(columns, dtype=dtype)) - module.bias).T


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_are_within_half_a_step(dtype: torch.dtype) -> None:
    dense = linear(509, 320, dtype)
    found = Int8Linear(dense)
    step = dense.weight.float().abs().amax(1, keepdim=True) / 127
    assert bool(((found.dense() - dense.weight.float()).abs() <= 0.56 * step + 1e-9).all())
    rounding = 1e-6 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(
        matrix_of(found, 320, dtype).float(), found.dense(), rtol=rounding, atol=rounding
    )


@pytest.mark.parametrize(("columns", "size"), [(320, 64), (256, 128), (96, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_four_bits_are_within_half_a_step(dtype: torch.dtype, columns: int, size: int) -> None:
    dense = linear(48, columns, dtype)
    found = Int4Linear(dense)
    assert found.group_size == size
    groups = dense.weight.float().unflatten(1, (-1, size))
    step = (groups.amax(2) - groups.amin(2)) / 15
    gap = (matrix_of(found, columns, dtype) - dense.weight).float().unflatten(1, (-1, size))
    rounding = 1e-6 if dtype is torch.float32 else 2e-3
    assert bool((gap.abs().amax(2) <= 0.55 * step + rounding).all())
    assert float(gap.std()) > 0.1 * float(step.mean())


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fast_path_of_a_quantised_model_is_the_readable_one(
    scheme: str, dtype: str, tiny_checkpoint: CheckpointMaker
) -> None:
    model = load(tiny_checkpoint("qwen3 yarn sliding"), dtype=dtype).model
    given, room = prompts([15, 4]), NUM_DECODED + 1
    plain = logits_of(ReadableBatch(model, given, room), 2)
    dense_bytes = bytes_per_token(model, 100, 1)
    done = quantize(model, scheme)
    assert (done.num_int8, done.num_int4) == ((22, 0) if scheme == "int8" else (4, 18))
    readable = logits_of(ReadableBatch(model, given, room), 2)
    session = FastModel(model).start(given, room)
    fast = logits_of(session, 2)
    assert session.is_fast
    assert torch.equal(fast[:, :9], readable[:, :9]), "until the ring has wrapped"
    error = float((readable - plain).norm() / plain.norm())
    assert (1e-3 < error < 0.1) if scheme == "int8" else (0.02 < error < 0.9)
    saved = dense_bytes - bytes_per_token(model, 100, 1)
    assert saved == done.bytes_before - done.bytes_after > 0.45 * done.bytes_before


def test_what_does_not_fit_four_bits_has_eight(tiny_checkpoint: CheckpointMaker) -> None:
    model = load(tiny_checkpoint("gemma3n")).model
    done = quantize(model, "int4")
    assert done.num_int4 == 0
    assert len(done.fallen_back) == done.num_int8 - 1
    (note,) = done.notes
    assert "in 8 bits, because the 4-bit kernel takes rows by 16" in note


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    model = load(DEMO).model
    with pytest.raises(QuantizationError, match="--quantize int3: choose one of int8, int4"):
        quantize(model, "int3")
    quantize(model, "int8")
    with pytest.raises(QuantizationError, match="no linear maps"):
        quantize(model, "int8")
    with pytest.raises(SystemExit) as exit_:
        main(["generate", DEMO, "-p", "Once", "--quantize", "int3"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "'int8', 'int4'" in error
    assert error.count("\n") == 1


def test_text_by_eight_bits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(f"generate {DEMO} -p Once --greedy --max-new-tokens 20 --json --quantize int8".split())
    assert exit_.value.code == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 20


@pytest.mark.slow
def test_compiled_eight_bits(tiny_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    model = load(tiny_checkpoint("gemma3 shallow"), dtype="bfloat16").model
    quantize(model, "int8")
    given, room, said = prompts([15]), NUM_DECODED + 1, list[str]()
    readable = logits_of(ReadableBatch(model, given, room), 1)
    truth = true_logits(with_dense_matrices(model), given)
    fast = FastModel(model, Packages(tmp_path, said.append))
    compiled = logits_of(fast.start(given, room), 1, compiled=True)
    assert distance(compiled, truth) <= 1.25 * distance(readable, truth)
    assert said == []


def with_dense_matrices(model: CausalLM) -> CausalLM:
    """What 8 bits stand for, to be computed in float64."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Int8Linear):
            dense = nn.Linear(module.weight.shape[1], module.weight.shape[0], bias=False)
            dense.weight.data = module.dense()
            parent, _, own = name.rpartition(".")
            setattr(twin.get_submodule(parent), own, dense)
    return twin


@pytest.mark.slow
def test_the_bench_says_what_is_lost() -> None:
    engines = ["fast, int8", "fast, int4"]
    loaded = load(DEMO)
    assert judge_paths(loaded.model, engines, 256) == dict.fromkeys(engines, "approximate")
    found = losses(loaded, engines)
    int8, int4 = (found[engine] for engine in engines)
    assert 0 < int8.divergence < int4.divergence < 1
    assert int8.num_lost <= int4.num_lost < int4.num_tokens == 64
    layers = {f"model.layers.{n}" for n in range(loaded.config.num_hidden_layers)}
    assert set(int8.blocks) == set(int4.blocks) == {*layers, "lm_head"}
    for name in layers:
        assert 1e-4 < int8.blocks[name] < int4.blocks[name] < 0.3
    assert int8.blocks["lm_head"] == int4.blocks["lm_head"], "8 bits in both"
    assert (
        int4.sites["model.layers.0.self_attn.q_proj"]
        > 3 * (int8.sites["model.layers.0.self_attn.q_proj"])
    )
