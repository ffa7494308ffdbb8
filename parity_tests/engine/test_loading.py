"""Loading and writing back: no copies, equal bytes, both halves of a tie, all or nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parity_tests.checkpoints import save_tiny_multimodal
from parity_tests.conftest import CheckpointMaker
from portkit.cli import main
from portkit.errors import CheckpointError, ExportError, Mismatch, UnsupportedConfig
from portkit.exporting import export
from portkit.loading import draw, load, materialize, open_checkpoint
from portkit.parity.reference import load_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXPORTED = [
    "llama3",
    "llama tied with biases",
    "qwen2",
    "qwen3",
    "gemma3",
    "qwen3 moe by turns",
    "llama4 crowded",
    "cohere2 with biases",
    "gemma3n",
    "smollm3 sliding",
    "mistral without a window",
]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same_bytes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8))
        for name in ours
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_is_byte_equal_and_the_reference_loads_it(
    name: str, dtype: torch.dtype, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    source = tiny_checkpoint(name, dtype)
    target = export(load(source), tmp_path / "out")
    exported = tensors_of(target)
    assert same_bytes(exported, tensors_of(source))
    assert any(".experts." in one for one in exported) == ("moe" in name or "llama4" in name)
    assert json.loads((target / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    reference = load_reference(target, dtype)  # raises where anything is missing or unexpected
    ids = torch.arange(7)[None]
    with torch.no_grad():
        assert torch.equal(load(target).model(ids), reference.model(ids).logits)


def test_shards_are_read_and_written(tiny_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama3", torch.bfloat16)
    sharded = export(load(source), tmp_path / "sharded", max_shard_bytes=400_000)
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(files) > 3
    assert (sharded / "model.safetensors.index.json").is_file()
    again = export(load(sharded), tmp_path / "again")
    assert [file.name for file in again.glob("*.safetensors")] == ["model.safetensors"]
    assert same_bytes(tensors_of(again), tensors_of(source))
    load_reference(sharded, torch.bfloat16)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda name: name,
        lambda name: (
            name.replace("language_model.model.", "model.language_model.")
            .replace("vision_tower.", "model.vision_tower.")
            .replace("multi_modal_projector.", "model.multi_modal_projector.")
        ),
        lambda name: name.replace("language_model.model.", "model.language_model.model."),
    ],
    ids=["released", "nested", "misspelt"],
)
def test_of_a_multimodal_checkpoint_the_text_model_is_exported(
    spelling: Callable[[str], str], tmp_path: Path
) -> None:
    source = tmp_path / "in"
    save_tiny_multimodal(source, torch.bfloat16)
    stored = load_file(source / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in stored)
    respelt = {spelling(name): tensor for name, tensor in stored.items()}
    save_file(respelt, source / "model.safetensors", metadata={"format": "pt"})

    loaded = load(source)
    dropped = {drop.source for drop in loaded.report.dropped}
    assert dropped == {n for n in respelt if "vision_tower" in n or "multi_modal" in n}
    assert all("not ported" in drop.because for drop in loaded.report.dropped)

    target = export(loaded, tmp_path / "out")
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == "gemma3_text"
    exported = tensors_of(target)
    text = {
        name.removeprefix("language_model."): tensor
        for name, tensor in stored.items()
        if name.startswith("language_model.")
    }
    assert same_bytes(exported, text)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = load_reference(target, torch.bfloat16).model(ids).logits
        assert torch.equal(load(target).model(ids), logits)
        assert torch.equal(loaded.model(ids), logits)


CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "dtype": lambda held: {
        name: one.view(torch.int16) if name == MOVED else one for name, one in held.items()
    },
    "shape": lambda held: {
        name: one.flatten() if name == MOVED else one for name, one in held.items()
    },
    "name": lambda held: {name: one for name, one in held.items() if name != MOVED},
}
MOVED = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_pickle", [False, True], ids=["safetensors", "pickle"])
def test_a_file_that_is_replaced_between_plan_and_reading_is_refused(
    change: str, is_pickle: bool, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    folder = tmp_path / "changing"
    shutil.copytree(tiny_checkpoint("llama3", torch.bfloat16), folder)
    file = folder / ("pytorch_model.bin" if is_pickle else "model.safetensors")
    held = load_file(folder / "model.safetensors")
    if is_pickle:
        (folder / "model.safetensors").unlink()
        torch.save(held, file)
    blueprint = draw(open_checkpoint(folder, allow_pickle=True))
    assert blueprint.plan.claims
    replaced = CHANGES[change]({name: one.clone() for name, one in held.items()})
    file.unlink()  # another file under the name, as downloads put in place: nothing mapped is cut
    if is_pickle:
        torch.save(replaced, file)
    else:
        save_file(replaced, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as refused:
        materialize(blueprint)
    shape = list(held[MOVED].shape)
    assert str(refused.value) == (
        f"{file.name} was replaced while it was read: {MOVED} is no longer BF16 of shape {shape}; "
        "run again when nobody writes to it"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="what a system does with a lost page differs")
@pytest.mark.parametrize("in_place", [True, False], ids=["cut short", "renamed over"])
def test_a_mapped_file_is_replaced_by_a_rename(
    in_place: bool, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    """What the documentation says of both: the one ends the process, the other changes nothing."""
    folder = tmp_path / "mapped"
    shutil.copytree(tiny_checkpoint("llama3", torch.bfloat16), folder)
    file, shorter = str(folder / "model.safetensors"), str(folder / "shorter")
    Path(shorter).write_bytes(bytes(4096))
    change = f"os.truncate({file!r}, 4096)" if in_place else f"os.replace({shorter!r}, {file!r})"
    code = (
        "import os; from portkit.loading import load\n"
        f"model = load({str(folder)!r}, device='cpu').model\n"
        f"{change}\n"
        "print(all(bool(one.isfinite().all()) for one in model.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    expected = (-signal.SIGBUS, "") if in_place else (0, "True\n")
    assert (done.returncode, done.stdout) == expected, done.stderr


def test_at_the_stored_dtype_parameters_are_views_of_the_file(
    tiny_checkpoint: CheckpointMaker,
) -> None:
    folder = tiny_checkpoint("gemma3", torch.bfloat16)
    model = load(folder).model
    mapped = [
        (int(start, 16), int(end, 16))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(folder) in line
        for start, end in [line.split()[0].split("-")]
    ]
    for name, parameter in model.named_parameters():
        where = parameter.data_ptr()
        assert any(start <= where < end for start, end in mapped), f"{name} was copied"


def test_either_half_of_a_tie_loads_and_two_that_differ_are_not_tied(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    source = tiny_checkpoint("gemma3")
    stored = load_file(source / "model.safetensors")
    config = (source / "config.json").read_text()
    embedding = stored.pop("model.embed_tokens.weight")
    ids = torch.arange(9)[None]

    def reload(name: str, **tensors: Tensor) -> object:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(config)
        contents = {**stored, **{key.replace("__", "."): one for key, one in tensors.items()}}
        save_file(contents, folder / "model.safetensors", metadata={"format": "pt"})
        return load(folder)

    expected = load(source).model(ids)
    head_alone = reload("head", lm_head__weight=embedding)
    assert torch.equal(head_alone.model(ids), expected)
    assert [tied.parameter for tied in head_alone.report.tied] == ["lm_head.weight"]
    # The reference cannot be asked about this one: its own answer is to tie, and to be right.
    both = reload("both", lm_head__weight=embedding.clone(), model__embed_tokens__weight=embedding)
    assert torch.equal(both.model(ids), expected)
    assert both.report.tied
    assert both.report.notes == ()

    differing = reload(
        "differing", lm_head__weight=embedding * 2, model__embed_tokens__weight=embedding
    )
    assert differing.report.tied == ()
    assert "differs from model.embed_tokens.weight" in differing.report.notes[0]
    assert torch.equal(differing.model(ids), expected * 2)  # a power of two: exact
    exported = tensors_of(export(differing, tmp_path / "out"))
    assert torch.equal(exported["lm_head.weight"], embedding * 2)
    reference = load_reference(tmp_path / "differing", torch.float32)
    assert torch.equal(reference.model(ids).logits, differing.model(ids))


def test_a_missing_head_is_missing_where_the_config_does_not_tie(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    stored = load_file(tiny_checkpoint("llama3") / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_checkpoint("llama3") / "config.json").read_text())
    with pytest.raises(Mismatch, match=r"1 missing: lm_head\.weight"):
        load(tmp_path)


def test_a_checkpoint_is_computed_in_the_dtype_asked_for(tiny_checkpoint: CheckpointMaker) -> None:
    folder = tiny_checkpoint("qwen3", torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    for word, dtype in {"auto": torch.bfloat16, "float32": torch.float32}.items():
        loaded = load(folder, dtype=word)
        assert loaded.report.dtype == str(dtype).removeprefix("torch.")
        assert loaded.report.stored_dtypes == {"BF16": len(stored)}
        for name, tensor in stored.items():
            assert torch.equal(loaded.model.get_parameter(name), tensor.to(dtype))


def test_an_export_in_another_dtype_says_so(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3", torch.float32)
    target = export(load(source, dtype="bfloat16"), tmp_path / "out")
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    stored = tensors_of(source)
    rounded = {name: tensor.bfloat16() for name, tensor in stored.items()}
    assert same_bytes(tensors_of(target), rounded)


def test_the_checkpoint_itself_is_never_the_target(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3")
    before = (source / "model.safetensors").read_bytes()
    link = tmp_path / "link"
    link.symlink_to(source)
    for target in (source, link, source / ".." / source.name):
        with pytest.raises(ExportError, match="checkpoint itself"):
            export(load(source), target)
    assert (source / "model.safetensors").read_bytes() == before


def test_a_key_that_is_ignored_is_not_verified(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_checkpoint("qwen3")
    config = json.loads((source / "config.json").read_text()) | {"logit_bias": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    loaded = materialize(draw(open_checkpoint(tmp_path), ignore_config=["logit_bias"]))
    assert loaded.blueprint.ignored == ("logit_bias",)
    with pytest.raises(SystemExit) as exit_:
        main(["load", str(tmp_path), "--ignore-config", "logit_bias", "--json"])
    assert exit_.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in printed["not_verified"]] == ["config.json: logit_bias"]


def test_keys_that_are_ignored_in_nested_objects_are_listed_and_what_has_no_effect_is_told(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_checkpoint("qwen3 yarn tempered")
    config = json.loads((source / "config.json").read_text()) | {"logit_bias": 3}
    config["rope_parameters"] |= {"alpha": 1.5, "attn_factor": 0.8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main([*arguments])
        said = capsys.readouterr()
        return int(str(exit_.value.code)), said.out, said.err

    code, _, error = run("load", str(tmp_path))
    assert code == 2
    assert "logit_bias = 3, rope_parameters.alpha = 1.5; if none of them" in error
    option = "--ignore-config logit_bias,rope_parameters.alpha"
    assert error.strip().endswith(option)
    code, out, _ = run("load", str(tmp_path), *option.split(), "--json")
    assert code == 0
    loaded = json.loads(out)
    names = [one["name"] for one in loaded["not_verified"]]
    assert names == ["config.json: logit_bias", "config.json: rope_parameters.alpha"]
    (note,) = loaded["notes"]
    assert note.startswith("config.json: rope_parameters.attn_factor = 0.8 has no effect")
    code, out, _ = run("inspect", str(tmp_path), *option.split(), "--json")
    assert json.loads(out)["notes"] == [note]
    code, out, _ = run("parity", str(tmp_path), "--quick", *option.split(), "--json")
    assert code == 0
    proof = json.loads(out)
    assert {f"config: {name}" for name in ("logit_bias", "rope_parameters.alpha")} <= {
        one["name"] for one in proof["not_verified"]
    }
    assert note in proof["notes"]


def test_plain_weights_whose_config_calls_them_quantised(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_checkpoint("qwen3")
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": quantised}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    option = "--ignore-config quantization_config"
    with pytest.raises(UnsupportedConfig, match=f"bitsandbytes.*{option}"):
        load(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["parity", str(tmp_path), "--quick", *option.split(), "--json"])
    assert exit_.value.code == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["verdict"] == "exact"
    assert "config: quantization_config" in [one["name"] for one in proof["not_verified"]]
    assert any("quantization_config was left out" in note for note in proof["notes"])


def test_what_load_prints(
    tiny_checkpoint: CheckpointMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny_checkpoint("gemma3", torch.bfloat16))
    stored = load_file(Path(folder) / "model.safetensors")
    num_bytes = sum(tensor.nbytes for tensor in stored.values())

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([*arguments])
        assert exit_.value.code == 0
        return capsys.readouterr().out

    printed = json.loads(run("load", folder, "--json"))
    assert printed["command"] == "load"
    assert printed["format"] == 1
    assert printed["model_type"] == "gemma3_text"
    assert printed["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert printed["tensors"] == len(stored)
    assert printed["bytes"] == num_bytes
    assert printed["dtype"] == "bfloat16"
    assert printed["tied"] == [{"parameter": "lm_head.weight", "to": "model.embed_tokens.weight"}]
    assert printed["dropped"] == []

    text = run("load", folder, "--check")
    assert f"{printed['parameters']:,}" in text
    assert "lm_head.weight = model.embed_tokens.weight" in text
    assert "all finite, sha256" in text

    table = run("load", folder, "--dry-run").splitlines()
    assert len(table) == 1 + len(stored) + 1  # header, a line a parameter, the tie
    row = next(line for line in table if line.startswith("model.layers.6.self_attn.k_norm.weight"))
    assert row.split() == [
        "model.layers.6.self_attn.k_norm.weight",
        "copy",
        "40",
        "BF16",
        "=",
        "model.safetensors",
    ]
    plan = json.loads(run("load", folder, "--dry-run", "--json"))
    assert {source for entry in plan["plan"] for source in entry["sources"]} == stored.keys()
