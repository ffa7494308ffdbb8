"""Greedy generation of both sides: equal, different by rounding, different by a fault."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import portkit
from parity_tests.conftest import CheckpointMaker
from portkit.checkpoint import LocalFiles
from portkit.loading import load
from portkit.parity.generation import GenerationParity, compare_generation
from portkit.parity.reference import Reference, load_reference
from portkit.parity.sides.port import PortSide
from portkit.tokenizer import Tokenizer

PROMPT = [5, 17, 301, 44, 8]


DEMO = Path(portkit.__file__).parent / "demo_checkpoint"


def generated(
    folder: Path,
    dtype: torch.dtype,
    change: Callable[[Any], None] | None = None,
    prompt: Sequence[int] = PROMPT,
) -> tuple[GenerationParity, Reference]:
    loaded = load(folder, dtype=str(dtype).removeprefix("torch."))
    if change is not None:
        change(loaded.model)
    reference = load_reference(folder, dtype)
    return compare_generation(PortSide(loaded.model, 64), reference, prompt, 20), reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama3", "qwen3", "demo"])
def test_the_tokens_are_the_references_own(
    name: str, dtype: torch.dtype, tiny_checkpoint: CheckpointMaker
) -> None:
    folder = DEMO if name == "demo" else tiny_checkpoint(name, dtype)
    prompt = (
        Tokenizer.open(LocalFiles(DEMO)).encode("Once upon a time") if name == "demo" else PROMPT
    )
    found, reference = generated(folder, dtype, prompt=prompt)
    assert found.is_equal
    assert found.port_tokens == found.reference_tokens
    assert (found.max_kl, found.top1_agreement) == (0.0, 1.0)
    model: Any = reference.model
    theirs = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert found.reference_tokens == tuple(theirs[0, len(prompt) :].tolist())
    if name == "demo":  # random weights repeat themselves, which proves little
        assert len(set(found.reference_tokens)) > 8


def scale_attention(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attend.scale *= 1.5


def test_a_fault_shows_at_its_step_and_is_no_rounding(tiny_checkpoint: CheckpointMaker) -> None:
    folder = tiny_checkpoint("gemma3")
    found, _ = generated(folder, torch.float32, scale_attention)
    first = found.first_difference
    assert first is not None
    assert not first.is_rounding
    assert found.port_tokens[: first.step] == found.reference_tokens[: first.step]
    assert found.port_tokens[first.step] == first.port_token
    assert found.reference_tokens[first.step] == first.reference_token
    assert first.port_token != first.reference_token
    assert first.port_gap > 0
    assert first.reference_gap > 0
    assert found.max_kl > 1e-4
    assert found.top1_agreement < 1


def test_two_logits_that_tie_are_rounding(tiny_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """Two rows of the head are alike; the port prefers the second by the last bit."""
    source = tiny_checkpoint("qwen3 yarn tempered", torch.bfloat16)
    best = generated(source, torch.bfloat16)[0].reference_tokens[0]
    twin = best + 1
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][twin] = tensors["lm_head.weight"][best]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", tmp_path)

    def prefer_twin(model: Any) -> None:
        own = model.logits

        def logits(hidden: Tensor) -> Tensor:
            given: Tensor = own(hidden).clone()
            bits = given[..., twin].view(torch.int16)
            bits += 1
            return given

        model.logits = logits

    found, _ = generated(tmp_path, torch.bfloat16, prefer_twin)
    first = found.first_difference
    assert first is not None
    assert (first.step, first.reference_token, first.port_token) == (0, best, twin)
    assert first.reference_gap == 0
    assert 0 < first.port_gap <= first.floor
    assert first.is_rounding
