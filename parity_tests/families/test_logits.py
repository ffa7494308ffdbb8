"""Every logit equal to the reference's, in every bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parity_tests.checkpoints import TINY, save_tiny_multimodal, save_tiny_with_towers
from parity_tests.conftest import CheckpointMaker
from portkit.loading import load
from portkit.parity.logits import compare_logits, run_all
from portkit.parity.probing import default_probe, thorough_probe
from portkit.parity.reference import load_reference
from portkit.parity.sites import PortSide

DTYPES = [torch.float32, torch.bfloat16]
KERNELS = ["sdpa", "eager"]


def unequal_passes(folder: Path, dtype: torch.dtype, kernel: str) -> list[str]:
    model = load(folder, dtype=str(dtype).removeprefix("torch."), attention=kernel).model
    probe = thorough_probe(model)
    port, reference = PortSide(model, probe.longest), load_reference(folder, dtype, kernel)
    results = compare_logits(probe, run_all(port, probe), run_all(reference, probe))
    assert len(results) == len(probe)
    assert all(one.num_logits > 0 for one in results)
    return [f"{one.name} by {one.max_difference}" for one in results if not one.exact]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TINY)
def test_tiny_checkpoints_are_exact(
    name: str, dtype: torch.dtype, kernel: str, tiny_checkpoint: CheckpointMaker
) -> None:
    assert unequal_passes(tiny_checkpoint(name, dtype), dtype, kernel) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_language_model_of_a_multimodal_checkpoint_is_exact(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    save_tiny_multimodal(tmp_path, dtype)
    assert unequal_passes(tmp_path, dtype, "sdpa") == []


def test_so_is_that_of_one_whose_towers_need_packages_that_are_not_here(tmp_path: Path) -> None:
    save_tiny_with_towers(tmp_path, torch.bfloat16)
    assert unequal_passes(tmp_path, torch.bfloat16, "sdpa") == []
    dropped = load(tmp_path).report.dropped
    towers = [one.source for one in dropped if "towers" in one.because]
    shared = [one.source for one in dropped if "keys and values" in one.because]
    assert [len(towers), len(shared), len(dropped)] == [4, 6, 10]
    (note,) = load_reference(tmp_path, torch.bfloat16).notes
    assert "text model by itself, Gemma3nForCausalLM" in note
    assert "4 of their tensors" in note


def test_a_checkpoint_computed_in_another_dtype_than_stored_is_exact(
    tiny_checkpoint: CheckpointMaker,
) -> None:
    stored_in_bfloat16 = tiny_checkpoint("gemma3", torch.bfloat16)
    assert unequal_passes(stored_in_bfloat16, torch.float32, "sdpa") == []
    assert unequal_passes(stored_in_bfloat16, torch.float16, "sdpa") == []


def test_a_changed_last_bit_is_seen(tiny_checkpoint: CheckpointMaker) -> None:
    """The comparison can fail: one weight moved by one unit in the last place."""
    folder = tiny_checkpoint("llama3", torch.bfloat16)
    model = load(folder).model
    probe = default_probe(model)
    port, reference = PortSide(model, probe.longest), load_reference(folder, torch.bfloat16)
    weight = model.get_parameter("model.layers.11.mlp.up_proj.weight")
    with torch.no_grad():
        weight.view(torch.int16)[0, 0] += 1
    results = compare_logits(probe, run_all(port, probe), run_all(reference, probe))
    assert not all(one.exact for one in results)
