"""`portkit inspect` of every family, as a person reads it and as a script does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parity_tests.engine.damage import CONFIGS, write_checkpoint
from portkit.cli import main

IN_WORDS: dict[str, dict[str, str]] = {
    "qwen3_moe": {"sparse_layers": "1", "num_experts": "3", "window": "None"},
    "llama4_text": {"moe_layers": "1", "rope_layers": "0-1"},
    "llama4": {"moe_layers": "1", "layer_types": "2 x chunked_attention"},
    "gemma3n": {"intermediate_size": "2 x 32", "activation_sparsity_pattern": "2 x 0.0"},
    "smollm3": {"no_rope_layers": "2 x True"},
    "mistral": {"sliding_window": "8"},
}
"""Of a family that has fields which are no plain number: how they are told."""


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_family_is_inspected(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, CONFIGS[model_type])
    told = {}
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as exit_:
            main(["inspect", str(folder), *options])
        assert exit_.value.code == 0
        told["json" if options else "words"] = capsys.readouterr().out
    found = json.loads(told["json"])
    assert found["model_type"] == model_type
    lines = [line.split("  ", 1) for line in told["words"].splitlines()]
    words = {key: value.strip() for key, value in lines}
    assert words["parameters"].startswith(f"{found['parameters']:,}, ")
    assert words["model"].startswith(f"{folder}: {model_type} (")
    for field, value in found["config"].items():
        assert words[field] == str(value)
    assert IN_WORDS.get(model_type, {}).items() <= words.items()


@pytest.mark.parametrize(
    ("dense", "told"),
    [([0, 1, 4], "2-3, 5"), ([0, 2, 4], "1, 3, 5"), ([], "0-5"), (list(range(6)), "none")],
)
def test_layers_are_told_by_their_numbers(
    dense: list[int], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**CONFIGS["qwen3_moe"], "num_hidden_layers": 6, "mlp_only_layers": dense}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["config"]["sparse_layers"] == told
