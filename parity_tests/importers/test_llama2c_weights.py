"""Every tensor of llama2.c's three formats arrives under its name, with its value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import portkit
from parity_tests.importers import llama2c_writer as writer
from portkit import layout
from portkit.errors import ImportFormatError
from portkit.importers.llama2c import import_llama2c

FORMATS = ("legacy", "v1", "q8_0")


@pytest.fixture(params=[(name, tied) for name in FORMATS for tied in (True, False)], ids=str)
def imported(request: pytest.FixtureRequest, tmp_path: Path):
    """(format, tied, what the folder should hold, what the import says, the folder)"""
    source_format, tied = request.param
    written = writer.write(source_format, tied=tied)
    (tmp_path / "model.bin").write_bytes(written.data)
    outcome = import_llama2c(tmp_path / "model.bin", tmp_path / "out")
    return source_format, tied, written.expected, outcome, tmp_path / "out"


def test_tensors_are_those_of_the_file(imported):
    source_format, tied, expected, outcome, folder = imported
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert outcome.header.source_format == source_format
    assert outcome.tensors == len(expected) == 9 * writer.LAYERS + (2 if tied else 3)
    assert outcome.parameters == sum(tensor.numel() for tensor in expected.values())
    assert outcome.weight_bytes == 4 * outcome.parameters
    assert outcome.notes == ()


def test_configs_say_what_the_file_says(imported):
    _, tied, _, _, folder = imported
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert json.loads((folder / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 101,
        "hidden_size": 30,
        "intermediate_size": 32,
        "num_hidden_layers": 11,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "max_position_embeddings": 37,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 1],
    }


def test_transformers_and_portkit_compute_the_same(imported):
    _, _, _, _, folder = imported
    reference, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    input_ids = torch.randint(0, writer.VOCAB, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(input_ids).logits
        logits = portkit.load(folder).model(input_ids)
    assert expected.std() > 0.1
    assert torch.equal(logits, expected)


def base_and_notes(tmp_path, data: bytes, **options: float) -> tuple[float, list[str]]:
    (tmp_path / "model.bin").write_bytes(data)
    outcome = import_llama2c(tmp_path / "model.bin", tmp_path / "out", **options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    shutil.rmtree(tmp_path / "out")
    return config["rope_theta"], list(outcome.notes)


@pytest.mark.parametrize("base", [10000.0, 1e6, 500000.0, 26347.0, 1234570.0, 2.5])
def test_the_rotary_base_is_read_off_the_tables(tmp_path, base):
    """And the model is then the reference's with that base; the tables themselves are left out."""
    written = writer.legacy(tied=True, rotary_base=base)
    found, notes = base_and_notes(tmp_path, written.data)
    assert found == base
    said = f"the rotary base {base:.10g} is read off the file's tables"
    assert [note[: len(said)] for note in notes] == ([] if base == 10000.0 else [said])
    import_llama2c(tmp_path / "model.bin", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == written.expected.keys()
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    positions = torch.arange(writer.POSITIONS)[None]
    cos, _ = reference.model.rotary_emb(torch.zeros(1), positions)
    table = rotary_tables(written.data)[0]
    assert torch.allclose(cos[0, :, : table.shape[1]], table, rtol=0, atol=1e-4)


def rotary_tables(data: bytes) -> torch.Tensor:
    """Cosines and sines, (2, positions, pairs), at the end of a tied legacy file."""
    tables = torch.frombuffer(bytearray(data), dtype=torch.float32, offset=28)
    return tables[-writer.POSITIONS * writer.HEAD_DIM :].view(2, writer.POSITIONS, -1)


def test_a_rotary_base_that_is_given_is_taken(tmp_path):
    million = writer.legacy(tied=True, rotary_base=1e6).data
    assert base_and_notes(tmp_path, million, rope_theta=1e6)[0] == 1e6
    assert base_and_notes(tmp_path, million, rope_theta=5e5) == (
        5e5,
        ["the file's rotary tables are of base 1000000, and 500000 is taken"],
    )
    v1 = writer.versioned("v1", tied=True).data
    assert base_and_notes(tmp_path, v1) == (10000.0, [])
    assert base_and_notes(tmp_path, v1, rope_theta=5e5) == (5e5, [])
    num_bytes = 4 * writer.POSITIONS * writer.HEAD_DIM
    for tables in (bytes(num_bytes), bytes(range(64, 84)) * (num_bytes // 20)):
        found, (note,) = base_and_notes(tmp_path, million[:-num_bytes] + tables)
        assert found == 10000.0
        assert note.startswith("the file's rotary tables are of no base: 10000 is taken, which")
    with pytest.raises(ImportFormatError, match="a rotary base of 0: give a number above 1"):
        base_and_notes(tmp_path, v1, rope_theta=0.0)


def test_only_q_and_k_are_copied_before_they_are_written(tmp_path, monkeypatch):
    """The rest goes to disk from the mapped file, so that a large one is not held in memory."""
    written = writer.legacy(tied=False)
    (tmp_path / "model.bin").write_bytes(written.data)
    given: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(layout, "save_file", lambda tensors, *_, **__: given.update(tensors))
    import_llama2c(tmp_path / "model.bin", tmp_path / "out")
    assert given.keys() == written.expected.keys()
    start = given["model.embed_tokens.weight"].data_ptr()
    copied = [
        name
        for name, tensor in given.items()
        if not 0 <= tensor.data_ptr() - start < len(written.data)
    ]
    assert len(copied) == 2 * writer.LAYERS
    assert all("q_proj" in name or "k_proj" in name for name in copied)
