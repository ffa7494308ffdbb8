"""What must hold of decoding on a CUDA device; not run yet on any.

The control flow is tested by value in `test_device_session.py`, the kernels in `test_kernels.py`;
here is what only a device shows: graphs, streams, its compilers, its own rounding.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import portkit
from parity_tests.decoding.test_equivalence import logits_of, prompts
from parity_tests.generation.specimens import write_checkpoint
from portkit.architecture import CausalLM
from portkit.bench.agreement import compare_tokens, judge_paths
from portkit.bench.engines import EAGER, FAST, KERNELS, READABLE
from portkit.decoding.fast import FastModel
from portkit.decoding.replay import Replay
from portkit.decoding.runners import AS_TORCH_RUNS_IT, Runner, by_kernels, compiling
from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.loading import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _fail(line: str) -> None:
    raise AssertionError(line)


RUNNERS: dict[str, Callable[[], Runner]] = {
    EAGER: lambda: AS_TORCH_RUNS_IT,
    KERNELS: by_kernels,
    FAST: lambda: compiling(_fail),
}


@pytest.fixture
def eagerly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps are called again instead of replayed."""
    with monkeypatch.context() as patch:
        patch.setattr(Replay, "_capture", lambda replay, _: replay._warm_up())
        yield


def model_on_gpu(folder: Path, name: str, dtype: torch.dtype) -> CausalLM:
    return load(write_checkpoint(folder, name, dtype), device="cuda").model


def told(one: FastModel, given: list[list[int]], settings: GenerationSettings) -> list[list[int]]:
    steps = list(generate(one, given, settings, context_length=400))
    return [[s.token_id for s in steps if s.row == row] for row in range(len(given))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", RUNNERS)
@pytest.mark.parametrize("name", ["gemma3", "llama3", "qwen3"])
def test_tokens_agree_with_the_reference_over_256(
    name: str, engine: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Beyond gemma3's window of 24, and the first bucket: or parted by a step of the dtype."""
    from portkit.parity.reference import load_reference

    model = model_on_gpu(tmp_path, name, dtype)
    (prompt,) = prompts([40])
    theirs = load_reference(tmp_path, dtype, device="cuda").model.generate(
        torch.tensor([prompt], device="cuda"),
        max_new_tokens=256,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    fast = FastModel(model, runner=RUNNERS[engine]())
    ours = told(fast, [prompt], GenerationSettings(max_new_tokens=256))
    tokens = {READABLE: theirs[:, 40:].tolist(), engine: ours}
    assert compare_tokens(model, [prompt], tokens, {})[engine].same


@pytest.mark.parametrize("engine", RUNNERS)
def test_every_path_is_within_the_floor(engine: str, tmp_path: Path) -> None:
    model = model_on_gpu(tmp_path, "gemma3", torch.bfloat16)
    assert judge_paths(model, [engine], 509)[engine] in ("exact", "rounding")


@pytest.mark.parametrize("rows", [[15], [15, 4, 11]])
@pytest.mark.parametrize("engine", [EAGER, KERNELS])
def test_a_replayed_step_is_the_same_in_every_bit(
    engine: str, rows: list[int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    given, room = prompts(rows), 31
    fast = FastModel(model_on_gpu(tmp_path, "gemma3", torch.bfloat16), runner=RUNNERS[engine]())
    replayed = logits_of(fast.start(given, room), len(rows))
    request.getfixturevalue("eagerly")
    assert torch.equal(logits_of(fast.start(given, room), len(rows)), replayed)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 7, "top_p": 0.9, "seed": 3},
        {"do_sample": True, "top_k": 0, "repetition_penalty": 1.3, "temperature": 1.7},
        {},
    ],
)
def test_a_graph_draws_what_is_drawn_without_it(
    options: dict[str, float], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each replay draws anew: a generator goes on as it does when the calls are made one by one."""
    fast = FastModel(model_on_gpu(tmp_path, "gemma3", torch.float32), runner=AS_TORCH_RUNS_IT)
    settings = GenerationSettings(max_new_tokens=60, **options)
    replayed = told(fast, prompts([9, 4]), settings)
    request.getfixturevalue("eagerly")
    assert told(fast, prompts([9, 4]), settings) == replayed


@pytest.mark.parametrize("engine", RUNNERS)
def test_the_host_waits_for_no_token(engine: str, tmp_path: Path) -> None:
    """Torch raises at whatever waits for the device; that a token has come is waited for alone."""
    fast = FastModel(model_on_gpu(tmp_path, "gemma3", torch.bfloat16), runner=RUNNERS[engine]())
    session = fast.start(prompts([9]), room=100)
    tokens = session.prefill().argmax(-1)
    session.prepare(wait=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(60):
            tokens = session.greedy(tokens)[:, -1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.device.type == "cpu"


def test_bench_names_the_hardware() -> None:
    demo = Path(portkit.__file__).parent / "demo_checkpoint"
    words = [sys.executable, "-m", "portkit", "bench", "decode", str(demo), "--device", "cuda"]
    sizes = ["--context", "16", "--tokens", "20", "--rounds", "1", "--json"]
    ran = subprocess.run([*words, *sizes], check=True, capture_output=True, text=True)
    found = json.loads(ran.stdout)
    assert found["hardware"] == torch.cuda.get_device_name()
    for row in found["results"]:
        assert row["same_tokens"] is True
        assert row["verdict"] in ("exact", "rounding")
        assert row["peak_device_bytes"] > 0
