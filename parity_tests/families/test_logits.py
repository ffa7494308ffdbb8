"""Every logit equal to the reference's, in every bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from parity_tests.checkpoints import COMPUTED, TINY, save_tiny_multimodal, save_tiny_with_towers
from parity_tests.conftest import CheckpointMaker
from portkit.loading import load
from portkit.parity.logits import compare_logits, run_all
from portkit.parity.probes.probing import default_probe, thorough_probe
from portkit.parity.reference import load_reference
from portkit.parity.sides.port import PortSide

DTYPES = [torch.float32, torch.bfloat16]


def unequal_passes(folder: Path, dtype: torch.dtype, kernel: str) -> list[str]:
    model = load(folder, dtype=str(dtype).removeprefix("torch."), attention=kernel).model
    probe = thorough_probe(model)
    port, reference = PortSide(model, probe.longest), load_reference(folder, dtype, kernel)
    results = compare_logits(probe, run_all(port, probe), run_all(reference, probe))
    assert len(results) == len(probe)
    assert all(one.num_logits > 0 for one in results)
    return [f"{one.name} by {one.max_difference}" for one in results if not one.exact]


@pytest.mark.parametrize(("dtype", "kernel"), COMPUTED)
@pytest.mark.parametrize("name", TINY)
def test_tiny_checkpoints_are_exact(
    name: str, dtype: torch.dtype, kernel: str, tiny_checkpoint: CheckpointMaker
) -> None:
    assert unequal_passes(tiny_checkpoint(name, dtype), dtype, kernel) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["Gemma3", "Llama4"])
def test_the_language_model_of_a_multimodal_checkpoint_is_exact(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_tiny_multimodal(tmp_path, dtype, family=family)
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


def test_a_released_config_that_the_reference_rejects_is_exact(tmp_path: Path) -> None:
    """Its switch is a number, its list of layers empty; other keys are spelled as of old."""
    save_tiny_multimodal(tmp_path, torch.bfloat16, family="Llama4")
    config = json.loads((tmp_path / "config.json").read_text())
    text = config["text_config"] | {"attn_temperature_tuning": 4, "no_rope_layers": []}
    scaling = text.pop("rope_parameters")
    text |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    text |= {"for_llm_compressor": False, "nope_layer_interval": 4}
    for key in ("layer_types", "moe_layers", "no_rope_layer_interval"):
        del text[key]
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": text}))
    assert unequal_passes(tmp_path, torch.bfloat16, "sdpa") == []
    (note,) = load_reference(tmp_path, torch.bfloat16).notes
    assert "patched" in note
    assert "attn_temperature_tuning 4 became true" in note


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
