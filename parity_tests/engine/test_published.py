"""Released configs and lists of tensor names: the ports' are understood, all others refused.

Figures are read where they are published, in the data folder's README, or counted by the reference.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from portkit.checkpoint import Checkpoint, LocalFiles
from portkit.cli import main
from portkit.errors import Mismatch, UnsupportedConfig
from portkit.loading import Blueprint, draw
from portkit.registry import registered

FIRST_FAMILIES = {"llama", "qwen3", "gemma3", "gemma3_text"}


@pytest.fixture(scope="module")
def configs(data_folder: Path) -> dict[str, Path]:
    """The folders of all released configs, by name."""
    found = {path.parent.name: path.parent for path in data_folder.glob("configs/*/config.json")}
    assert {raw_config(folder)["model_type"] for folder in found.values()} >= FIRST_FAMILIES
    return found


@pytest.fixture(scope="module")
def published(data_folder: Path) -> dict[str, int]:
    """Exact parameter counts by the model's name in lower case, as in `gemma 3 270m`."""
    text = (data_folder / "README.md").read_text(encoding="utf-8")
    line = re.search(r"\*\*Exact parameter counts\*\*[^:]*: (.*)", text)
    assert line is not None
    counts, family = {}, ""
    for entry in line[1].split(" · "):
        found = re.match(r"(?:(.*?)[ -])?(\d[\d.]*[MB](?:-A\d+B)?) ([\d,]+)", entry)
        if found is None:  # a family that is named without its size
            if whole := re.match(r"([^\d/]+\S*) ([\d,]{9,})", entry):
                counts[whole[1].lower()] = int(whole[2].replace(",", ""))
            continue
        family = found[1] or family  # sizes of one family follow its name
        name = f"{family} {found[2]}".replace("-", " ").lower()
        counts[name] = int(found[3].replace(",", "").rstrip("."))
    return counts


def raw_config(folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return raw


def drawn(folder: Path, **changed: Any) -> Blueprint:
    """The blueprint of a folder's config, some of its keys changed."""
    checkpoint = Checkpoint(LocalFiles(folder))
    checkpoint.config.update(changed)
    return draw(checkpoint)


def is_ours(folder: Path) -> bool:
    raw = raw_config(folder)
    return raw["model_type"] in registered() and "quantization_config" not in raw


def counted_by_the_reference(folder: Path) -> int:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder).get_text_config()
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def plain_name(folder: str) -> str:
    """`google__gemma-3-270m-it` as the README calls it: `gemma 3 270m`."""
    name = folder.partition("__")[2].lower().removesuffix(".derived")
    return re.sub(r"^(meta|c4ai)-|-(it|instruct|\d\d-\d{4})$", "", name).replace("-", " ")


def test_every_ported_config_has_the_published_number_of_parameters(
    configs: dict[str, Path], published: dict[str, int]
) -> None:
    ours = {name: drawn(folder) for name, folder in configs.items() if is_ours(folder)}
    devices = {p.device.type for one in ours.values() for p in one.skeleton.parameters()}
    assert devices == {"meta"}
    counts = {plain_name(name): blueprint.num_parameters for name, blueprint in ours.items()}
    known = {name: count for name, count in counts.items() if name in published}
    assert known == {name: published[name] for name in known}
    assert {"gemma 3 270m", "gemma 3 1b", "qwen3 0.6b", "qwen3 1.7b"} <= known.keys()
    assert {"llama 3.1 8b", "llama 3.2 1b", "llama 3.2 3b", "qwen3 30b a3b"} <= known.keys()
    assert {"command r7b", "command a"} <= known.keys()


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ("meta-llama__Llama-4-Scout-17B-16E-Instruct", 0),
        ("meta-llama__Llama-4-Scout-17B-16E-Instruct.april-2025", 0),
        ("meta-llama__Llama-4-Maverick-17B-128E-Instruct-FP8", 1),
    ],
)
def test_llama_4_has_the_published_number_of_parameters_and_its_layout_a_plan(
    config: str, place: int, configs: dict[str, Path], data_folder: Path
) -> None:
    """Of the FP8 checkpoint the config is understood, but for being quantised."""
    text = (data_folder / "README.md").read_text(encoding="utf-8")
    counts = re.search(r"Scout / Maverick \(text\) ([\d,]+) / ([\d,]+)", text)
    assert counts is not None
    blueprint = drawn(configs[config], quantization_config=None)
    assert blueprint.num_parameters == int(counts.groups()[place].replace(",", ""))
    weight_map, model = blueprint.architecture.weight_map, blueprint.skeleton
    names = [name for claim in weight_map.written(model).claims for name in claim.canonical]
    vision = ["vision_model.class_embedding", "multi_modal_projector.linear_1.weight"]
    plan = weight_map.plan(model, dict.fromkeys([*(f"language_model.{n}" for n in names), *vision]))
    read = [name for claim in plan.claims for name in claim.sources]
    assert sorted(read) == sorted(f"language_model.{name}" for name in names)
    assert [one.source for one in plan.dropped] == vision


def test_qwen2_5_half_a_billion(tmp_path: Path) -> None:
    """0.49 billion parameters, 0.36 of them outside of the embedding, as its model card says."""
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "vocab_size": 151936}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": 24}
    unused = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 24}
    config = {"model_type": "qwen2", "tie_word_embeddings": True, **sizes, **heads, **unused}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert drawn(tmp_path).num_parameters == 494_032_768 == counted_by_the_reference(tmp_path)


def test_qwen3_30b_a3b_reads_each_expert_by_itself(configs: dict[str, Path]) -> None:
    blueprint = drawn(configs["Qwen__Qwen3-30B-A3B"])
    plan = blueprint.architecture.weight_map.written(blueprint.skeleton)
    sources = [name for claim in plan.claims for name in claim.sources]
    assert len(sources) == len(set(sources)) == 48 * (3 * 128 + 1 + 8) + 3
    assert "model.layers.47.mlp.experts.127.down_proj.weight" in sources


def test_every_ported_config_has_as_many_parameters_as_the_reference_counts(
    configs: dict[str, Path],
) -> None:
    ours = {name: folder for name, folder in configs.items() if is_ours(folder)}
    counts = {name: drawn(folder).num_parameters for name, folder in ours.items()}
    assert counts == {name: counted_by_the_reference(folder) for name, folder in ours.items()}


def test_every_other_config_is_refused_with_the_reason(configs: dict[str, Path]) -> None:
    others = {name: folder for name, folder in configs.items() if not is_ours(folder)}
    assert others
    for name, folder in others.items():
        raw = raw_config(folder)
        quantization = raw.get("quantization_config")
        reason = quantization["quant_method"] if quantization else repr(raw["model_type"])
        with pytest.raises(UnsupportedConfig) as refused:
            drawn(folder)
        assert reason in str(refused.value), name
        assert ("quantised" in str(refused.value)) == bool(quantization), name


def index_of(data_folder: Path, name: str) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((data_folder / "indexes" / name).read_text())
    return index


@pytest.mark.parametrize(
    ("index", "config", "changed"),
    [
        ("Qwen3-1.7B.mlx-bf16.json", "Qwen__Qwen3-1.7B", {}),
        ("SmolLM3-3B.json", "HuggingFaceTB__SmolLM3-3B", {}),
        # The sizes that its index sums up show that this one has a key head for each query head.
        (
            "Llama3-8B-finetune.json",
            "meta-llama__Meta-Llama-3-8B.derived",
            {"num_key_value_heads": 32},
        ),
    ],
)
def test_a_plan_over_a_released_list_of_names_is_complete(
    index: str, config: str, changed: dict[str, Any], configs: dict[str, Path], data_folder: Path
) -> None:
    released = index_of(data_folder, index)
    blueprint = drawn(configs[config], **changed)
    header = dict.fromkeys(released["weight_map"])
    plan = blueprint.architecture.weight_map.plan(blueprint.skeleton, header)
    read = [name for claim in plan.claims for name in claim.sources]
    assert sorted(read) == sorted(released["weight_map"])
    assert plan.dropped == ()
    itemsize = torch.bfloat16.itemsize
    assert blueprint.num_parameters * itemsize == released["metadata"]["total_size"]


def test_a_list_of_names_of_another_family_is_refused_by_name(
    configs: dict[str, Path], data_folder: Path
) -> None:
    llama = drawn(configs["meta-llama__Llama-3.2-3B"])
    header = dict.fromkeys(index_of(data_folder, "Qwen3-1.7B.mlx-bf16.json")["weight_map"])
    with pytest.raises(Mismatch, match=r"56 unexpected: model\.layers\.0\.self_attn\.k_norm"):
        llama.architecture.weight_map.plan(llama.skeleton, header)


def test_names_alike_do_not_make_it_a_llama(configs: dict[str, Path], data_folder: Path) -> None:
    """SmolLM3's and Mistral's tensors are called as Llama's are, and they compute other things."""
    names = index_of(data_folder, "SmolLM3-3B.json")["weight_map"]
    smollm3 = drawn(configs["HuggingFaceTB__SmolLM3-3B"])
    mistral = drawn(configs["mistralai__Mistral-7B-v0.1"])
    assert mistral.num_parameters == 7_241_732_096
    written = mistral.architecture.weight_map.written(mistral.skeleton).claims
    of_mistral = {"num_hidden_layers": 32, "tie_word_embeddings": False}
    of_smollm3 = {"num_hidden_layers": 36, "tie_word_embeddings": True}
    for header, changed in (
        (names, of_smollm3),
        ([name for claim in written for name in claim.sources], of_mistral),
    ):
        llama = drawn(configs["meta-llama__Llama-3.2-3B"], **changed)
        plan = llama.architecture.weight_map.plan(llama.skeleton, dict.fromkeys(header))
        assert plan.dropped == ()
    assert smollm3.architecture.model_type == "smollm3"
    assert mistral.architecture.model_type == "mistral"


def test_the_cache_of_gemma_3_270m_at_its_whole_context(
    configs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = configs["google__gemma-3-270m-it"]
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", str(folder), "--json"])
    assert exit_.value.code == 0
    told = json.loads(capsys.readouterr().out)
    raw = raw_config(folder)
    token_bytes = 2 * raw["num_key_value_heads"] * raw["head_dim"] * torch.bfloat16.itemsize
    num_full = raw["layer_types"].count("full_attention")
    num_sliding = raw["layer_types"].count("sliding_attention")
    tokens = num_full * 32768 + num_sliding * (raw["sliding_window"] - 1)
    assert told["kv_bytes_at"]["32768"] == tokens * token_bytes
    assert 108e6 < told["kv_bytes_at"]["32768"] < 109e6
    assert told["dtype"] == "bfloat16"
    assert told["layers"] == num_full + num_sliding
