"""A port against a recording: what it says with and without inputs, and without Transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parity_tests.conftest import CheckpointMaker
from parity_tests.faults.planted.planting import replace_forward
from parity_tests.harness.conftest import Recorder, Run
from parity_tests.harness.test_trace_files import parts, shown_by_ours, written
from portkit import loading
from portkit.parity.traces.trace_file import TraceFile

BF16, FP32 = torch.bfloat16, torch.float32
NEVER_SHOWN = {"the same function in float64", "parameters", "generation", "known faults"}


def left_out(printed: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["reason"] for one in printed["not_verified"]}


@pytest.fixture
def prove(run: Run, tiny_checkpoint: CheckpointMaker) -> Callable[..., tuple[int, dict[str, Any]]]:
    """`prove(name, dtype, trace, *options)`: exit code and object of a golden parity."""

    def call(
        name: str, dtype: torch.dtype, trace: Path, *options: str
    ) -> tuple[int, dict[str, Any]]:
        folder = tiny_checkpoint(name, dtype)
        code, out, err = run("parity", folder, "--golden", trace, "--json", *options)
        assert code in {0, 1, 3}, err
        return code, json.loads(out)

    return call


Prove = Callable[..., tuple[int, dict[str, Any]]]


@pytest.mark.parametrize(
    ("name", "dtype", "kernel"),
    [
        ("gemma3 shallow", BF16, "sdpa"),
        ("gemma3 shallow", FP32, "sdpa"),
        ("qwen3 yarn sliding", BF16, "eager"),
        ("llama tied with biases", FP32, "eager"),
    ],
)
def test_our_families_replay_in_every_bit(
    name: str, dtype: torch.dtype, kernel: str, recorded: Recorder, prove: Prove
) -> None:
    """Chunks, decoding across the window, padded rows, far positions; judged where made."""
    without = () if "gemma3" in name else ("--no-floors",)
    trace = recorded(name, dtype, "--inputs", "--attention", kernel, *without)
    code, printed = prove(name, dtype, trace)
    assert (code, printed["verdict"], printed["gate"]) == (0, "exact", "exact")
    assert printed["exact"] == printed["sites"] == len(shown_by_ours(TraceFile(trace)))
    names = [one["name"] for one in printed["probe"]["passes"]]
    assert {"padded.2", "decode.6", "chunk.1", "far"} <= {*names}
    unseen = {"care in bfloat16"} if dtype == FP32 else set()
    unseen |= {"what is rounding"} if without else set()
    told = {name for name in left_out(printed) if not name.startswith("sites ")}
    assert told == NEVER_SHOWN | unseen


def test_without_inputs_errors_are_carried(recorded: Recorder, prove: Prove) -> None:
    trace = recorded("gemma3 shallow", BF16)
    code, printed = prove("gemma3 shallow", BF16, trace)
    assert (code, printed["verdict"]) == (0, "exact")
    reason = left_out(printed)["where errors are made"]
    assert reason == "the recording has no inputs of modules (record --inputs)"
    code, printed = prove("gemma3 shallow", BF16, trace, "--attention", "eager")
    assert (code, printed["verdict"], printed["culprits"]) == (1, "rounding", [])
    assert "mistakes smaller than what rounding carries" in left_out(printed)


# -- what is right, and what is wrong ------------------------------------------------------------


def _norm_not_upcast(model: Any) -> str:
    norm = model.model.layers[2].input_layernorm

    def forward(_: Any, x: Tensor) -> Tensor:
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
        return scaled * (1.0 + norm.weight)

    replace_forward(norm, forward)
    return "model.layers.2.input_layernorm"


def _rounded_offset(model: Any) -> str:
    norm = model.model.layers[2].input_layernorm

    def forward(_: Any, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + norm.eps)
        return (y * (1.0 + norm.weight).to(x.dtype).float()).to(x.dtype)

    replace_forward(norm, forward)
    return "model.layers.2.input_layernorm"


def _query_scaled(model: Any) -> str:
    norm = model.model.layers[2].self_attn.q_norm
    replace_forward(norm, lambda own, x: own(x) * 1.01)
    return "model.layers.2.self_attn.q_norm"


def _residual_lost(model: Any) -> str:
    layer = model.model.layers[2]

    def forward(h: Tensor, cos: Tensor, sin: Tensor, mask: Any, cache: Any) -> Tensor:
        attended = layer.self_attn(layer.input_layernorm(h), cos, sin, mask, cache)
        h = layer.post_attention_layernorm(attended)
        return h + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h)))

    layer.forward = forward
    return "model.layers.2.pre_feedforward_layernorm:in"


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], str]], list[str]]:
    """`plant(fault)`: have every port that is loaded make a mistake; where it must be found."""

    def planting(fault: Callable[[Any], str]) -> list[str]:
        own, sites = loading.materialize, []

        def planted(*args: Any) -> Any:
            loaded = own(*args)
            sites.append(fault(loaded.model))
            return loaded

        monkeypatch.setattr("portkit.parity.traces.golden.materialize", planted)
        return sites

    return planting


Plant = Callable[[Callable[[Any], str]], list[str]]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (_query_scaled, "function"),
        (_residual_lost, "glue"),
        (_norm_not_upcast, "care"),
        (_rounded_offset, "care"),
    ],
)
def test_with_inputs_a_fault_is_placed_and_its_kind_named(
    fault: Callable[[Any], str], kind: str, recorded: Recorder, prove: Prove, plant: Plant
) -> None:
    trace = recorded("gemma3 shallow", BF16, "--inputs", "--attention", "sdpa")
    sites = plant(fault)
    code, printed = prove("gemma3 shallow", BF16, trace, "--gate", "rounding")
    assert (code, printed["verdict"]) == (1, "diverged")
    assert (printed["first"]["site"], printed["first"]["kind"]) == (sites[0], kind)
    assert all(one["site"].startswith("model.layers.2") for one in printed["culprits"])
    if kind == "care":
        assert printed["first"]["local_error"] > 1.25 * printed["first"]["floor"]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_harmless_reorderings_are_rounding(
    dtype: torch.dtype, recorded: Recorder, prove: Prove, plant: Plant
) -> None:
    """Another kernel; an MLP whose sum is taken in two halves."""
    trace = recorded("gemma3 shallow", dtype, "--inputs", "--attention", "sdpa")

    def halves(model: Any) -> str:
        for layer in model.model.layers:

            def forward(_: Any, x: Tensor, down: Any = layer.mlp.down_proj) -> Tensor:
                a, b = x.float().chunk(2, -1)
                left, right = down.weight.float().chunk(2, -1)
                return (a @ left.T + b @ right.T).to(x.dtype)

            replace_forward(layer.mlp.down_proj, forward)
        return ""

    plant(halves)
    code, printed = prove(
        "gemma3 shallow", dtype, trace, "--attention", "eager", "--gate", "rounding"
    )
    assert (code, printed["verdict"], printed["culprits"]) == (0, "rounding", [])
    rounded = printed["comparisons"][0]["rounding"]
    assert {"model.layers.1.mlp.down_proj", "model.layers.1.self_attn#context"} <= {*rounded}


@pytest.mark.parametrize("fault", [_query_scaled, _residual_lost, _norm_not_upcast])
def test_carried_errors_show_what_is_beyond_rounding(
    fault: Callable[[Any], str], recorded: Recorder, prove: Prove, plant: Plant
) -> None:
    """Nothing was carried to the first site that differs, so that the floor there is sharp."""
    trace = recorded("gemma3 shallow", BF16)
    sites = plant(fault)
    code, printed = prove("gemma3 shallow", BF16, trace, "--gate", "rounding")
    assert code == 1
    (first,) = printed["culprits"]
    assert first["site"] == sites[0].removesuffix(":in")


# -- what a recording leaves out -----------------------------------------------------------------


def test_last_tokens_some_layers_and_no_floors(
    recorded: Recorder, prove: Prove, tmp_path: Path
) -> None:
    last = recorded("gemma3 shallow", BF16, "--last-tokens", "1", "--engine", "portkit")
    code, printed = prove("gemma3 shallow", BF16, last)
    assert (code, printed["verdict"]) == (0, "exact")
    assert left_out(printed)["all but the last tokens"] == ("the recording keeps 1 of each pass")
    assert "the recording" in left_out(printed)
    code, printed = prove(
        "gemma3 shallow", BF16, last, "--attention", "eager", "--gate", "rounding"
    )
    assert (code, printed["verdict"]) == (0, "rounding")

    whole = recorded("gemma3 shallow", BF16, "--inputs", "--attention", "sdpa")
    code, printed = prove("gemma3 shallow", BF16, whole, "--layers", "1-2")
    assert (code, printed["verdict"]) == (0, "exact")
    assert "everything but the layers 1 to 2" in left_out(printed)

    tensors, described = parts(whole)
    bare = written(tmp_path / "bare", tensors, {**described, "floors": None})
    code, printed = prove("gemma3 shallow", BF16, bare)
    assert (code, printed["verdict"]) == (0, "exact")
    code, printed = prove("gemma3 shallow", BF16, bare, "--attention", "eager")
    assert (code, printed["verdict"]) == (3, "inconclusive")
    assert left_out(printed)["what is rounding"] == "the recording has no floors"


def test_without_transformers(recorded: Recorder, tiny_checkpoint: CheckpointMaker) -> None:
    """A process in which importing it raises: record our port, replay the reference's trace."""
    trace = recorded("gemma3 shallow", BF16, "--inputs", "--attention", "sdpa")
    folder = tiny_checkpoint("gemma3 shallow", BF16)
    code = (
        "import sys\nsys.modules['transformers'] = None\n"
        "from portkit.cli import main\nmain(sys.argv[1:])"
    )

    def portkit(*arguments: object) -> str:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    printed = json.loads(portkit("parity", folder, "--golden", trace, "--json"))
    assert printed["verdict"] == "exact"
    own = trace.with_name("own")
    portkit("record", folder, "--engine", "portkit", "--quick", "-o", own)
    floors = TraceFile(own).floors
    assert floors is not None
    assert 0 < floors["model.layers.2.mlp.down_proj"].rms < 0.01  # type: ignore[operator]
