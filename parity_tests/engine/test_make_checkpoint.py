"""The tool that makes checkpoints of released sizes, on configs that are small."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

from parity_tests.checkpoints import save_tiny_multimodal
from parity_tests.conftest import CheckpointMaker
from portkit.loading import load
from portkit.parity.reference import load_reference

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_checkpoint.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = spec_from_file_location(TOOL.stem, TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "config.json").read_text())
    return config


def test_layers_are_cut_everywhere_and_shards_kept_small(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    source, made = tiny_checkpoint("gemma3 scaled"), tmp_path / "made"
    options = ["--layers", "7", "--max-shard-bytes", "1000000"]
    subprocess.run([sys.executable, TOOL, source, made, *options], check=True)
    before, after = config_of(source), config_of(made)
    assert after["num_hidden_layers"] == 7
    assert after["layer_types"] == before["layer_types"][:7]
    shards = sorted(made.glob("*.safetensors"))
    assert len(shards) > 3
    assert max(shard.stat().st_size for shard in shards) < 1_100_000
    loaded = load(made)
    assert (loaded.report.dtype, after["dtype"]) == ("bfloat16", "bfloat16")
    assert set(loaded.config.layer_types) == set(before["layer_types"])
    load_reference(made, torch.bfloat16)  # raises where anything is missing or unexpected


@pytest.mark.parametrize("name", ["llama3", "gemma3 scaled"])
def test_activations_keep_their_size_through_twelve_layers(
    name: str, tool: ModuleType, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    tool.make_checkpoint(config_of(tiny_checkpoint(name)), made, dtype=torch.float32)
    model = load(made).model
    with torch.no_grad():
        hidden = model.hidden_states(torch.arange(50)[None])
        norms = [float(p.mean()) for p in model.parameters() if p.dim() == 1]
    assert 0.3 < float(hidden.std()) < 3
    assert all(0.2 < mean < 0.8 for mean in norms)


def test_the_seed_decides_the_weights(
    tool: ModuleType, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    config = config_of(tiny_checkpoint("qwen3"))
    made = []
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        tool.make_checkpoint(config, tmp_path / name, seed=seed)
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_of_a_multimodal_config_the_language_model_is_made(
    tool: ModuleType, tmp_path: Path
) -> None:
    save_tiny_multimodal(tmp_path, torch.bfloat16)
    made = tmp_path / "made"
    tool.make_checkpoint(tool.cut_layers(config_of(tmp_path), 2), made)
    loaded = load(made)
    assert loaded.architecture.model_type == "gemma3_text"
    assert loaded.config.num_hidden_layers == 2
    load_reference(made, torch.bfloat16)
