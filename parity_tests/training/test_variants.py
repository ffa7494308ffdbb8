"""The variants that ship: every family in every size, as large as they say, and each trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parity_tests.checkpoints import TINY
from parity_tests.training.conftest import recipe
from portkit.config import ConfigReader
from portkit.errors import InvalidConfig
from portkit.loading import load
from portkit.parity.reference import load_reference
from portkit.registry import architecture_of, variants
from portkit.training.beginnings import build, read_variant
from portkit.training.run import Inputs, train

SIZES = {"1m": 1e6, "5m": 5e6, "15m": 15e6, "30m": 30e6}
FAMILIES = ("gemma3", "llama", "qwen3")
SMALLEST = ("cohere2-1m", "qwen3_moe-1m", "smollm3-1m")
"""Of these families there is one, to begin with."""
BY_CONFIG = {
    "gemma3n plain": "gemma3n_text",
    "llama4 scout": "llama4_text",
    "mistral": "mistral",
    "qwen2": "qwen2",
}


def num_parameters(name: str) -> int:
    raw = read_variant(name)
    architecture = architecture_of(raw)
    reader = ConfigReader(raw)
    config = architecture.read_config(reader)
    reader.finish()
    with torch.device("meta"):
        return sum(p.numel() for p in architecture.build(config, "sdpa").parameters())


def test_every_family_comes_in_every_size() -> None:
    expected = {f"{family}-{size}" for family in FAMILIES for size in SIZES}
    assert set(variants()) == expected | {"gemma3-270m"} | set(SMALLEST)


@pytest.mark.parametrize(
    "name", [*(f"{family}-{size}" for family in FAMILIES for size in SIZES), *SMALLEST]
)
def test_a_variant_is_as_large_as_it_says(name: str) -> None:
    assert num_parameters(name) == pytest.approx(SIZES[name.rpartition("-")[2]], rel=0.06)


def test_the_real_shape_is_the_released_one(data_folder: Path) -> None:
    """Two ways of writing one config: the port that they make is the same."""
    assert num_parameters("gemma3-270m") == 268_098_176
    path = data_folder / "configs" / "google__gemma-3-270m-it" / "config.json"
    architecture = architecture_of(read_variant("gemma3-270m"))
    ours, released = (
        architecture.read_config(ConfigReader(raw))
        for raw in (read_variant("gemma3-270m"), json.loads(path.read_text()))
    )
    assert ours == released


def test_first_weights() -> None:
    """Drawn from the seed, narrower where they write into the residual stream; norms at one."""
    raw = read_variant("gemma3-1m")
    model, again = (build(raw, 3, torch.device("cpu")) for _ in range(2))
    other = build(raw, 4, torch.device("cpu"))
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    assert all(torch.equal(p, tensors[name]) for name, p in again.named_parameters())
    down, gate = (f"model.layers.2.mlp.{name}_proj.weight" for name in ("down", "gate"))
    assert not torch.equal(tensors[gate], dict(other.named_parameters())[gate])
    assert tensors[gate].std() == pytest.approx(0.02, rel=0.02)
    assert tensors[down].std() == pytest.approx(0.02 / 10**0.5, rel=0.02)
    assert tensors["model.embed_tokens.weight"].std() == pytest.approx(0.02, rel=0.02)
    norms = [p for name, p in tensors.items() if "norm" in name]
    assert len(norms) == 5 * 6 + 1
    assert all(not bool(p.any()) for p in norms)


def test_an_unknown_variant_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"nor a variant: there are cohere2-1m, .*smollm3-1m"):
        read_variant("gpt5")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InvalidConfig, match="must be a JSON object"):
        read_variant(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidConfig, match="is not JSON"):
        read_variant(str(tmp_path))


@pytest.mark.parametrize("variant", [*(f"{family}-1m" for family in FAMILIES), *SMALLEST])
def test_each_family_trains_and_the_reference_reads_it(
    variant: str, inputs: Inputs, tmp_path: Path
) -> None:
    assert_what_is_trained_is_the_references(replace(inputs, config=variant), tmp_path)


@pytest.mark.parametrize("name", BY_CONFIG)
def test_so_does_one_without_a_variant(name: str, inputs: Inputs, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": BY_CONFIG[name], **TINY[name].config}))
    assert_what_is_trained_is_the_references(replace(inputs, config=str(config)), tmp_path)


def assert_what_is_trained_is_the_references(inputs: Inputs, folder: Path) -> None:
    model = train(inputs, recipe(steps=2, warmup_steps=0), folder / "run").model
    ids = torch.arange(30)[None]
    with torch.no_grad():
        ours = load(model, device="cpu").model(ids)
        theirs = load_reference(model, torch.float32).model(input_ids=ids).logits
    assert torch.equal(ours, theirs)
