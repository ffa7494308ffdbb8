"""The same at the sizes that are released: random weights in the shapes of published configs.

Large matrices take other kernels than tiny ones do. Gemma 3 270M is whole; the others have fewer
layers, and some a narrower window or a smaller vocabulary, which are no sizes of a layer.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from portkit.architecture import CausalLM
from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.loading import load
from portkit.parity.comparing import compare
from portkit.parity.judging.judge import Verdict
from portkit.parity.probes.probe import Probe
from portkit.parity.probes.probing import default_probe, quick_probe
from portkit.parity.reference import load_reference
from portkit.parity.result import Comparison
from portkit.parity.sides.port import PortSide
from portkit.parity.subject.discovery import sites_between

MAKE_CHECKPOINT = Path(__file__).resolve().parents[2] / "tools" / "make_checkpoint.py"
KERNELS = ["sdpa", "eager"]
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Released:
    """A published config, and what is changed in it to fit a test."""

    config: str
    layers: int | None = None
    changed: dict[str, Any] = field(default_factory=dict)


# Sparse and dense feed-forwards, of either kind of attention, and layers that share keys.
GEMMA_3N = {
    "num_hidden_layers": 5,
    "intermediate_size": [8192] * 5,
    "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0],
    "num_kv_shared_layers": 2,
    "sliding_window": 128,
    "vocab_size": 4093,
    "vocab_size_per_layer_input": 4001,
}
RELEASED = {
    "Gemma 3 270M": Released("google__gemma-3-270m-it"),
    "Gemma 3 1B": Released("google__gemma-3-1b-it", 6, {"sliding_window": 128}),
    "Qwen3 0.6B": Released("Qwen__Qwen3-0.6B", 4),
    # A single layer, and of its 128 experts as many as take a gigabyte in float64.
    "Qwen3 30B-A3B": Released("Qwen__Qwen3-30B-A3B", 1, {"num_experts": 16, "vocab_size": 8191}),
    # A layer that rotates and attends within chunks, and one without positions.
    "Llama 4 Scout": Released(
        "meta-llama__Llama-4-Scout-17B-16E-Instruct",
        changed={
            "num_hidden_layers": 2,
            "no_rope_layers": [1, 0],
            "num_local_experts": 2,
            "vocab_size": 4093,
            "pad_token_id": None,
            "attention_chunk_size": 128,
            "floor_scale": 32,
        },
    ),
    "Llama 3.2 1B": Released("meta-llama__Llama-3.2-1B-Instruct", 2),
    "Command R7B": Released(
        "CohereLabs__c4ai-command-r7b-12-2024.derived",
        changed={
            "num_hidden_layers": 2,
            "layer_types": [SLIDING, FULL],
            "sliding_window": 128,
            "vocab_size": 4093,
        },
    ),
    "Gemma 3n E2B": Released("google__gemma-3n-E2B-it.text.derived", changed=GEMMA_3N),
    # Its layers are E2B's with feed-forwards of twice the width.
    "Gemma 3n E4B": Released(
        "google__gemma-3n-E2B-it.text.derived",
        changed=GEMMA_3N | {"intermediate_size": [16384] * 5},
    ),
    "Mistral 7B": Released(
        "mistralai__Mistral-7B-v0.1", 1, {"sliding_window": 128, "vocab_size": 4093}
    ),
    # A layer that rotates, and one without positions.
    "SmolLM3 3B": Released(
        "HuggingFaceTB__SmolLM3-3B",
        changed={
            "num_hidden_layers": 2,
            "layer_types": [FULL, FULL],
            "no_rope_layers": [1, 0],
            "vocab_size": 4093,
            "pad_token_id": None,
        },
    ),
}
WHOLE_IN_BFLOAT16 = ("Gemma 3 270M", "bfloat16")
IN_BOTH_DTYPES = [(name, dtype) for name in RELEASED for dtype in ("float32", "bfloat16")]


@pytest.fixture(scope="module")
def checkpoint(
    request: pytest.FixtureRequest, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Parametrized by a name of `RELEASED` and a dtype: the folder, gone with its last test."""
    name, dtype = request.param
    released = RELEASED[name]
    folder = tmp_path_factory.mktemp("released")
    published = data_folder / "configs" / released.config / "config.json"
    config = json.loads(published.read_text())
    config.get("text_config", config).update(released.changed)
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, MAKE_CHECKPOINT, folder, folder / "model", "--dtype", dtype]
    if released.layers is not None:
        command += ["--layers", str(released.layers)]
    subprocess.run(command, check=True)
    yield folder / "model"
    shutil.rmtree(folder)


def named(param: tuple[str, str]) -> str:
    return f"{param[0]}, {param[1]}"


def compared(folder: Path, kernel: str, choose: Callable[[CausalLM], Probe]) -> Comparison:
    loaded = load(folder, device="cpu", attention=kernel)
    reference = load_reference(folder, getattr(torch, loaded.report.dtype), kernel)
    probe = choose(loaded.model)
    port = PortSide(loaded.model, probe.longest)
    return compare(port, reference, sites_between(PortSide(loaded.model), reference), probe)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("checkpoint", IN_BOTH_DTYPES, indirect=True, ids=named)
def test_every_site_is_exact(checkpoint: Path, kernel: str) -> None:
    found = compared(checkpoint, kernel, default_probe)
    assert found.verdict is Verdict.exact, found.culprits[:3]
    asked = [one.function_error for one in found.judgements if one.function_error is not None]
    assert len(asked) > 30
    assert max(asked) <= 1e-13


@pytest.mark.parametrize("checkpoint", [WHOLE_IN_BFLOAT16], indirect=True, ids=named)
def test_a_whole_released_size_is_exact(checkpoint: Path, data_folder: Path) -> None:
    """What of the slow test above is quick enough for every run."""
    published = (data_folder / "README.md").read_text(encoding="utf-8")
    num_bytes = re.search(r"gemma-3-270m-it`'s `model\.safetensors` is ([\d,]+) bytes", published)
    assert num_bytes is not None
    written = (checkpoint / "model.safetensors").stat().st_size
    assert written == int(num_bytes[1].replace(",", ""))
    found = compared(checkpoint, "sdpa", quick_probe)
    assert found.verdict is Verdict.exact, found.culprits[:3]
    assert len(found.judgements) > 18 * 30


@pytest.mark.slow
@pytest.mark.parametrize(
    "checkpoint",
    [WHOLE_IN_BFLOAT16, ("Gemma 3 270M", "float32")],
    indirect=True,
    ids=named,
)
def test_a_hundred_greedy_tokens_are_the_references(checkpoint: Path) -> None:
    from transformers import GenerationConfig

    loaded = load(checkpoint, device="cpu")
    window, vocab_size = loaded.config.sliding_window, loaded.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    # The window is crossed half-way.
    prompt = torch.randint(vocab_size, (1, window - 50), generator=generator)
    settings = GenerationSettings(max_new_tokens=100)
    steps = generate(loaded.model, prompt.tolist(), settings, context_length=32768)
    ours = [step.token_id for step in steps]
    reference = load_reference(checkpoint, getattr(torch, loaded.report.dtype))
    greedy = GenerationConfig(do_sample=False, max_new_tokens=100, pad_token_id=0)
    reference.model.generation_config = greedy  # without the end that config.json names
    theirs = reference.model.generate(prompt, attention_mask=torch.ones_like(prompt))
    assert ours == theirs[0, prompt.shape[1] :].tolist()
    assert len(ours) == 100
    assert len(set(ours)) > 20, "a text that repeats itself proves little"
