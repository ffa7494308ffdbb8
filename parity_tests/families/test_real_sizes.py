"""The same at the sizes that are released: random weights in the shapes of published configs.

Large matrices take other kernels than tiny ones do. Gemma 3 270M is whole; the others have fewer
layers, and the larger Gemma a narrower window, because a window is not a size of a layer.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.loading import LoadedModel, load
from portkit.parity.logits import compare_logits, port_logits
from portkit.parity.probe import Pass, Probe
from portkit.parity.reference import load_reference

MAKE_CHECKPOINT = Path(__file__).resolve().parents[2] / "tools" / "make_checkpoint.py"
KERNELS = ["sdpa", "eager"]


@dataclass(frozen=True)
class Released:
    """A published config, and what is changed in it to fit a test."""

    config: str
    layers: int | None = None
    changed: dict[str, Any] = field(default_factory=dict)


RELEASED = {
    "Gemma 3 270M": Released("google__gemma-3-270m-it"),
    "Gemma 3 1B": Released("google__gemma-3-1b-it", 6, {"sliding_window": 128}),
    "Qwen3 0.6B": Released("Qwen__Qwen3-0.6B", 4),
    "Llama 3.2 1B": Released("meta-llama__Llama-3.2-1B-Instruct", 2),
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
    config = {**json.loads(published.read_text()), **released.changed}
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, MAKE_CHECKPOINT, folder, folder / "model", "--dtype", dtype]
    if released.layers is not None:
        command += ["--layers", str(released.layers)]
    subprocess.run(command, check=True)
    yield folder / "model"
    shutil.rmtree(folder)


def named(param: tuple[str, str]) -> str:
    return f"{param[0]}, {param[1]}"


class ProbeMaker:
    """Passes of few tokens that nevertheless go everywhere: each costs a large vocabulary."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.vocab_size = loaded.config.vocab_size
        self.last_position = loaded.config.max_position_embeddings - 1
        # A model without windows is taken beyond the lengths at which kernels change.
        self.window = getattr(loaded.config, "sliding_window", 128)
        self.generator = torch.Generator().manual_seed(0)

    def tokens(self, batch: int, count: int) -> Tensor:
        return torch.randint(self.vocab_size, (batch, count), generator=self.generator)

    def short(self, count: int = 24) -> Probe:
        assert count < self.window
        return (Pass("short", self.tokens(2, count), torch.arange(count).expand(2, -1)),)

    def long(self) -> Probe:
        count = self.window + 4
        return (Pass("long", self.tokens(1, count), torch.arange(count)[None]),)

    def chunks_and_decode(self) -> Probe:
        """A prompt in chunks up to three tokens before the window; eight steps; another chunk."""
        prompt = self.window - 3
        ends = [0, prompt // 2, prompt, *range(prompt + 1, prompt + 9), prompt + 14]
        assert min(ends[3:]) < self.window < ends[-2]
        names = [None, *(f"from {start}" for start in ends[:-1])]
        return tuple(
            Pass(name, self.tokens(1, b - a), torch.arange(a, b)[None], None, before)
            for (before, name), (a, b) in zip(pairwise(names), pairwise(ends), strict=True)
        )

    def padded(self, count: int) -> Probe:
        """Two rows, one of them two thirds real; then two decode steps."""
        mask = torch.ones(2, count + 2, dtype=torch.int64)
        mask[0, : count // 3] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        ends = [0, count, count + 1, count + 2]
        names = [None, "padded", "padded, decode 1", "padded, decode 2"]
        return tuple(
            Pass(name, self.tokens(2, b - a), positions[:, a:b], mask[:, :b], before)
            for (before, name), (a, b) in zip(pairwise(names), pairwise(ends), strict=True)
        )

    def far(self, count: int = 24) -> Probe:
        """Jumps all the way to the last position that the model was made for."""
        positions = torch.linspace(0, self.last_position, count).long()
        assert int(positions[-1]) == self.last_position
        return (Pass("far", self.tokens(1, count), positions[None], torch.ones(1, count).long()),)


def unequal(loaded: LoadedModel, folder: Path, kernel: str, probe: Probe) -> list[str]:
    dtype = getattr(torch, loaded.report.dtype)
    reference = load_reference(folder, dtype, kernel)
    results = compare_logits(probe, port_logits(loaded.model, probe), reference.logits(probe))
    vocab_size = loaded.config.vocab_size
    assert [one.num_logits for one in results] == [int(p.real.sum()) * vocab_size for p in probe]
    return [f"{one.name} by {one.max_difference}" for one in results if not one.exact]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("checkpoint", IN_BOTH_DTYPES, indirect=True, ids=named)
def test_every_logit_is_exact(checkpoint: Path, kernel: str) -> None:
    loaded = load(checkpoint, device="cpu", attention=kernel)
    make = ProbeMaker(loaded)
    # Where bfloat16 has no instruction of its own, a token costs five times as much in it.
    padded = make.window + 4 if loaded.report.dtype == "float32" else 48
    probe = (
        *make.short(),
        *make.long(),
        *make.chunks_and_decode(),
        *make.padded(padded),
        *make.far(),
    )
    assert unequal(loaded, checkpoint, kernel, probe) == []


@pytest.mark.parametrize("checkpoint", [WHOLE_IN_BFLOAT16], indirect=True, ids=named)
def test_a_whole_released_size_is_exact(checkpoint: Path, data_folder: Path) -> None:
    """What of the slow test above is quick enough for every run."""
    published = (data_folder / "README.md").read_text(encoding="utf-8")
    num_bytes = re.search(r"gemma-3-270m-it`'s `model\.safetensors` is ([\d,]+) bytes", published)
    assert num_bytes is not None
    written = (checkpoint / "model.safetensors").stat().st_size
    assert written == int(num_bytes[1].replace(",", ""))
    loaded = load(checkpoint, device="cpu")
    make = ProbeMaker(loaded)
    probe = (*make.short(12), *make.padded(12), *make.far(12))
    assert unequal(loaded, checkpoint, "sdpa", probe) == []


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
    make = ProbeMaker(loaded)
    prompt = make.tokens(1, make.window - 50)  # the window is crossed half-way
    settings = GenerationSettings(max_new_tokens=100)
    steps = generate(loaded.model, prompt.tolist(), settings, context_length=make.last_position + 1)
    ours = [step.token_id for step in steps]
    reference = load_reference(checkpoint, getattr(torch, loaded.report.dtype))
    greedy = GenerationConfig(do_sample=False, max_new_tokens=100, pad_token_id=0)
    reference.model.generation_config = greedy  # without the end that config.json names
    theirs = reference.model.generate(prompt, attention_mask=torch.ones_like(prompt))
    assert ours == theirs[0, prompt.shape[1] :].tolist()
    assert len(ours) == 100
    assert len(set(ours)) > 20, "a text that repeats itself proves little"
