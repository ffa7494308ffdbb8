"""The names under which a family's tensors are found, and the forms in which they lie on disk.

Base models saved by themselves, prefixes that the reference reads, stacked experts: what it loads
computes the same here; what it does not is refused with what the names have in common.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parity_tests.checkpoints import save_tiny_multimodal
from parity_tests.conftest import CheckpointMaker
from portkit.errors import Mismatch
from portkit.exporting import export
from portkit.loading import load
from portkit.parity.reference import load_reference

TIED = [
    "llama tied with biases",
    "qwen2",
    "qwen3",
    "qwen3 moe sliding",
    "llama4 crowded",
    "gemma3 shallow",
    "mistral without a window",
    "smollm3",
    "gemma3n plain",
    "cohere2",
]
UNTIED = ["llama linear", "qwen3 moe", "llama4 scout", "smollm3 sliding", "cohere2 with biases"]
BY_ITS_OWN_NAMES_ALONE = {"llama4 crowded", "llama4 scout"}
"""Families whose base models the reference saves and cannot load as language models."""
IDS = torch.arange(11)[None]
Renaming = Callable[[str], str]


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, source: Path, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint of other tensors beside the same config.

    Tensors begin at a multiple of 64 bytes: where they do not, some products differ in a last bit
    from those of the experts that the reference copies to where they do.
    """
    folder.mkdir(exist_ok=True)
    if folder != source:
        shutil.copy(source / "config.json", folder)
    path = folder / "model.safetensors"
    for padding in range(0, 64, 8):
        save_file(tensors, path, metadata={"format": "pt", "padding": " " * padding})
        if (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0:
            return folder
    raise AssertionError("a header's length is a multiple of eight")


def renamed(folder: Path, source: Path, rename: Renaming) -> Path:
    return write(folder, source, {rename(name): one for name, one in stored(source).items()})


def base_model(folder: Path, source: Path) -> Path:
    """What the reference writes of a model without its head."""
    import transformers

    auto: object = transformers.AutoModel
    auto.from_pretrained(source).save_pretrained(folder)  # type: ignore[attr-defined]
    return write(folder, folder, stored(folder))


@torch.no_grad()
def ours(folder: Path) -> Tensor:
    return load(folder).model(IDS)  # type: ignore[no-any-return]


@torch.no_grad()
def theirs(folder: Path) -> Tensor:
    return load_reference(folder, torch.float32).model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", TIED)
def test_a_base_model_whose_head_is_its_embedding(
    name: str, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    source = tiny_checkpoint(name)
    folder = base_model(tmp_path / "base", source)
    assert not any(one.startswith("model.") for one in stored(folder))
    expected = theirs(source if name in BY_ITS_OWN_NAMES_ALONE else folder)
    assert torch.equal(ours(folder), expected)
    exported = stored(export(load(folder), tmp_path / "out"))
    original = stored(source)
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], one) for key, one in original.items())


@pytest.mark.parametrize("name", UNTIED)
def test_of_a_base_model_the_head_alone_is_missing(
    name: str, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    source = tiny_checkpoint(name)
    folder = base_model(tmp_path / "base", source)
    word = json.loads((folder / "config.json").read_text())["architectures"][0]
    with pytest.raises(Mismatch) as caught:
        load(folder)
    assert str(caught.value) == (
        "the checkpoint does not fit its config: 1 missing: lm_head.weight; config.json: "
        f"architectures is {word}, the model without its head: take the checkpoint of the language "
        "model"
    )
    # With the head beside it the same names are enough.
    tensors = {**stored(folder), "lm_head.weight": stored(source)["lm_head.weight"]}
    whole = write(tmp_path / "whole", source, tensors)
    assert torch.equal(ours(whole), theirs(source if name in BY_ITS_OWN_NAMES_ALONE else whole))


@pytest.mark.parametrize("name", ["llama linear", "gemma3n plain", "cohere2 with biases"])
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"model.{name}",
        lambda name: name if ".1." in name else name.removeprefix("model."),
    ],
    ids=["once too often", "here and there"],
)
def test_other_spellings_that_the_reference_reads(
    name: str, rename: Renaming, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    folder = renamed(tmp_path, tiny_checkpoint(name), rename)
    assert torch.equal(ours(folder), theirs(folder))


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("llama4 crowded", lambda name: f"language_model.{name}"),
        ("gemma3n plain", lambda name: name.replace("model.", "model.language_model.", 1)),
        ("gemma3n plain", lambda name: f"model.language_model.{name}"),
    ],
)
def test_a_text_model_under_the_names_of_a_multimodal_one(
    name: str, rename: Renaming, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    folder = renamed(tmp_path, tiny_checkpoint(name), rename)
    assert torch.equal(ours(folder), theirs(folder))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"model.{name}",
        lambda name: name.replace("language_model.model.", "language_model."),
        lambda name: (
            name.replace("language_model.model.", "model.language_model.")
            if "language" in name
            else f"model.{name}"
        ),
    ],
    ids=["model. before all", "language_model alone", "as newer tools"],
)
def test_spellings_of_a_multimodal_checkpoint(rename: Renaming, tmp_path: Path) -> None:
    save_tiny_multimodal(tmp_path / "in", torch.float32)
    folder = renamed(tmp_path / "out", tmp_path / "in", rename)
    expected = theirs(tmp_path / "in")
    assert torch.equal(theirs(folder), expected)
    assert torch.equal(ours(folder), expected)


@pytest.mark.parametrize(
    ("prefix", "way_out"),
    [
        ("_orig_mod.", "torch.compile put that there: save the model inside, model._orig_mod"),
        ("module.", "a data-parallel wrapper put that there: save the model inside, model.module"),
        ("base_model.model.", "PEFT put that there: save what model.merge_and_unload() gives"),
        ("language_model.", "save the model without what is wrapped around it"),
        ("a.b.", "save the model without what is wrapped around it"),
    ],
)
@pytest.mark.parametrize("name", ["llama linear", "qwen3"])
def test_a_prefix_that_all_names_share_is_named(
    name: str, prefix: str, way_out: str, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    """Which the reference does not read: it would go on with random weights."""
    folder = renamed(tmp_path, tiny_checkpoint(name), lambda one: prefix + one)
    number = len(stored(folder))
    with pytest.raises(Mismatch) as caught:
        load(folder)
    assert str(caught.value) == (
        f"the names of all {number} tensors begin with {prefix!r}: {way_out}, or take that prefix "
        "off the names"
    )


def stacked(tensors: dict[str, Tensor], layers: str = r"\d+") -> dict[str, Tensor]:
    """One tensor an expert to a stack of them, gate over up: as newer tools hold them."""
    place = re.compile(rf"(model\.layers\.{layers}\.mlp\.experts)\.(\d+)\.(\w+)_proj\.weight")
    by_expert: dict[str, dict[tuple[str, int], Tensor]] = {}
    kept = {}
    for name, one in tensors.items():
        if found := place.fullmatch(name):
            by_expert.setdefault(found[1], {})[found[3], int(found[2])] = one
        else:
            kept[name] = one
    for experts, parts in by_expert.items():
        numbers = range(1 + max(number for _, number in parts))
        kept[f"{experts}.gate_up_proj"] = torch.stack(
            [torch.cat((parts["gate", n], parts["up", n])) for n in numbers]
        )
        kept[f"{experts}.down_proj"] = torch.stack([parts["down", n] for n in numbers])
    return kept


@pytest.mark.parametrize("name", ["qwen3 moe", "qwen3 moe by turns"])
@pytest.mark.parametrize("layers", [r"\d+", r"1"], ids=["all", "one layer"])
def test_stacked_experts_are_the_same_experts(
    name: str, layers: str, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    source = tiny_checkpoint(name)
    folder = write(tmp_path / "stacked", source, stacked(stored(source), layers))
    loaded = load(folder)
    assert any(one.endswith("gate_up_proj") for one in loaded.plan.sources)
    assert loaded.report.bytes == sum(one.nbytes for one in stored(folder).values())
    assert loaded.report.tensors == len(stored(folder))
    assert torch.equal(ours(folder), theirs(folder))
    reference = load_reference(folder, torch.float32).model.state_dict()
    held = load_reference(source, torch.float32).model.state_dict()
    assert all(torch.equal(reference[key], one) for key, one in held.items())
    exported = stored(export(loaded, tmp_path / "out"))
    original = stored(source)
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], one) for key, one in original.items())


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda one: one[:10], "2 of another shape: "),
        (lambda one: torch.cat((one, one[:1])), "experts.gate_up_proj is [12, 192, 320] where"),
        (lambda one: one.transpose(1, 2).contiguous(), "config makes it [11, 192, 320]"),
    ],
    ids=["one too few", "one too many", "transposed"],
)
def test_a_stack_is_read_whole(
    cut: Callable[[Tensor], Tensor], words: str, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3 moe")
    tensors = stacked(stored(source))
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.2.mlp.experts.{part}"
        tensors[name] = cut(tensors[name])
    with pytest.raises(Mismatch) as caught:
        load(write(tmp_path, source, tensors))
    assert words in str(caught.value)
