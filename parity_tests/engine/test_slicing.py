"""`portkit export`: slices are the larger model's first rows, load everywhere and compute alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parity_tests.checkpoints import save_tiny_with_towers
from parity_tests.conftest import CheckpointMaker
from parity_tests.families.test_logits import unequal_passes
from portkit.cli import main

NAME = "gemma3n"
"""Twelve layers of widths 64, 96, 128 in turn; from the seventh on keys are shared."""


def run(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as exit_:
        main(["export", *map(str, arguments)])
    return exit_.value.code


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_slice_is_the_first_rows_and_is_exact(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tiny_checkpoint(NAME, torch.bfloat16), tmp_path / "slice"
    widths = [32, 64, 96, 64, 96, 32, 64, 64, 32]
    listed = ",".join(map(str, widths))
    code = run(source, out, "--matformer", listed, "--drop-layers", "9-11", "--json")
    assert code == 0
    told = json.loads(capsys.readouterr().out)
    config = json.loads((out / "config.json").read_text())
    assert told["layers"] == config["num_hidden_layers"] == 9
    assert config["intermediate_size"] == widths
    assert config["num_kv_shared_layers"] == 2
    whole, part = tensors(source), tensors(out)
    assert told["parameters"] == sum(one.numel() for one in part.values())
    for layer, width in enumerate(widths):
        mlp = f"model.layers.{layer}.mlp"
        for proj in ("gate_proj", "up_proj"):
            name = f"{mlp}.{proj}.weight"
            assert torch.equal(part[name], whole[name][:width])
        assert torch.equal(
            part[f"{mlp}.down_proj.weight"], whole[f"{mlp}.down_proj.weight"][:, :width]
        )
    table = "model.embed_tokens_per_layer.weight"
    assert torch.equal(part[table], whole[table][:, : 9 * 24])
    assert unequal_passes(out, torch.bfloat16, "sdpa") == []


def test_layers_can_be_dropped_in_the_middle(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    """As the smaller released model is had from the larger: later layers move up, keys stay."""
    source, out = tiny_checkpoint(NAME, torch.float32), tmp_path / "slice"
    assert run(source, out, "--matformer", "64x9", "--drop-layers", "1,7-8") == 0
    whole, part = tensors(source), tensors(out)
    kept = [0, 2, 3, 4, 5, 6, 9, 10, 11]
    config = json.loads((out / "config.json").read_text())
    assert config["num_kv_shared_layers"] == 3
    projection = "model.per_layer_model_projection.weight"
    for new, old in enumerate(kept):
        rows = slice(24 * new, 24 * new + 24), slice(24 * old, 24 * old + 24)
        assert torch.equal(part[projection][rows[0]], whole[projection][rows[1]])
        name = "model.layers.{}.self_attn.q_proj.weight"
        assert torch.equal(part[name.format(new)], whole[name.format(old)])
    assert unequal_passes(out, torch.float32, "eager") == []


def test_of_a_multimodal_checkpoint_the_text_model_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "text"
    save_tiny_with_towers(source, torch.bfloat16)
    assert run(source, out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "gemma3n_text"
    before, after = tensors(source), tensors(out)
    prefix = "model.language_model."
    assert after
    for name, tensor in after.items():
        stored = before[prefix + name.removeprefix("model.")]
        assert torch.equal(tensor.view(torch.int16), stored.view(torch.int16)), name
    assert json.loads((out / "config.json").read_text())["model_type"] == "gemma3n_text"
    assert unequal_passes(out, torch.bfloat16, "sdpa") == []


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--matformer", "64,64"], 2, "names 2 widths for 12 layers"),
        (["--matformer", "wide"], 2, "give widths as in"),
        (["--matformer", "0"], 2, "give widths as in"),
        (["--matformer", "96"], 2, "name a smaller width"),
        (["--drop-layers", "3"], 2, "goes with --matformer"),
        (["--matformer", "64", "--drop-layers", "12"], 2, "layer 12, and there are 12"),
        (["--matformer", "64", "--drop-layers", "0-11"], 2, "leaves no layer"),
        (["--matformer", "64", "--drop-layers", "x"], 2, "give layers as in"),
        (["--matformer", "64", "--drop-layers", "5"], 2, "layer 5 cannot be dropped"),
        (["--matformer", "64", "--drop-layers", "6"], 2, "layer 6 cannot be dropped"),
    ],
)
def test_what_is_no_slice_is_refused(
    options: list[str],
    code: int,
    words: str,
    tiny_checkpoint: CheckpointMaker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "slice"
    assert run(tiny_checkpoint(NAME, torch.float32), out, *options) == code
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_a_family_without_smaller_models_says_so(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_checkpoint("llama linear"), tmp_path / "slice", "--matformer", "32") == 2
    assert "llama has no smaller models within it" in capsys.readouterr().err
