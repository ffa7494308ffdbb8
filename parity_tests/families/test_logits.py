"""Every logit equal to the reference's, in every bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parity_tests.checkpoints import TINY, save_tiny_multimodal
from parity_tests.conftest import CheckpointMaker
from portkit.loading import load
from portkit.parity.logits import compare_logits, port_logits
from portkit.parity.probe import default_probe
from portkit.parity.reference import load_reference

DTYPES = [torch.float32, torch.bfloat16]
KERNELS = ["sdpa", "eager"]


def unequal_passes(folder: Path, dtype: torch.dtype, kernel: str) -> list[str]:
    model = load(folder, dtype=str(dtype).removeprefix("torch."), attention=kernel).model
    probe = default_probe(model)
    reference = load_reference(folder, dtype, kernel)
    results = compare_logits(probe, port_logits(model, probe), reference.logits(probe))
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
    reference = load_reference(folder, torch.bfloat16).logits(probe)
    weight = model.get_parameter("model.layers.11.mlp.up_proj.weight")
    with torch.no_grad():
        weight.view(torch.int16)[0, 0] += 1
    results = compare_logits(probe, port_logits(model, probe), reference)
    assert not all(one.exact for one in results)


def test_the_probe_reaches_what_the_config_turns_on(tiny_checkpoint: CheckpointMaker) -> None:
    model = load(tiny_checkpoint("gemma3")).model
    probe = {one.name: one for one in default_probe(model)}
    window = 24
    assert probe["short"].input_ids.shape[1] < window
    assert probe["window"].input_ids.shape[1] == window
    assert probe["long"].input_ids.shape[1] > window
    decoded = [int(one.positions[0, 0]) for name, one in probe.items() if "decode.2" in name]
    assert min(decoded) < window <= max(decoded) + 1
    assert not probe["padded"].real.all()
    assert int(probe["far"].positions.max()) == 4095
    chunks = [one.input_ids.shape[1] for name, one in probe.items() if name.startswith("chunk")]
    assert len(chunks) == 3
    assert sum(chunks) > window
