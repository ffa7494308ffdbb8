"""GGUF files: llama.cpp continues what we continue, and nothing is written that it would not."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from parity_tests.checkpoints import gemma3, save_tiny
from parity_tests.conftest import CheckpointMaker
from portkit.bench.engines import READABLE, GgufEngine, Ours
from portkit.errors import BenchError, ExportError
from portkit.gguf import write_gguf
from portkit.importers.llama2c import import_llama2c
from portkit.loading import load

PROMPT = [[2, *range(40, 70)]]


def written(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_gguf(load(folder, device="cpu"), path)
    return path


def continued(folder: Path, gguf: Path, prompts: list[list[int]], count: int) -> tuple[object, ...]:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    ours = Ours(str(folder), load(folder, device="cpu").report.dtype, READABLE, "cpu")
    theirs = GgufEngine(str(gguf), 1, len(prompts[0]) + count)
    return ours.run(prompts, count).token_ids, theirs.run(prompts, count).token_ids


@pytest.mark.parametrize("name", ["llama3", "llama linear", "llama plain heads", "qwen3", "gemma3"])
def test_llama_cpp_continues_with_the_same_tokens(
    name: str, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(name)
    if name == "gemma3":  # whose scores are scaled by head_dim there
        folder = tmp_path / "checkpoint"
        save_tiny(gemma3(query_pre_attn_scalar=40), folder, torch.float32)
    ours, theirs = continued(folder, written(folder, tmp_path), PROMPT, 20)
    assert theirs == ours


def test_llama_cpp_tells_the_published_story(data_folder: Path, tmp_path: Path) -> None:
    """Trained weights: 200 tokens, in float32."""
    folder = tmp_path / "stories"
    import_llama2c(data_folder / "weights" / "stories260K" / "stories260K.bin", folder)
    ours, theirs = continued(folder, written(folder, tmp_path), [[1]], 200)
    assert theirs == ours


def test_the_file_is_laid_out_as_specified(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    folder = tiny_checkpoint("qwen3", torch.bfloat16)
    data = written(folder, tmp_path).read_bytes()
    magic, version, num_tensors, num_fields = struct.unpack_from("<4sIQQ", data)
    assert (magic, version, num_fields) == (b"GGUF", 3, 14)
    model = load(folder, device="cpu").model
    assert num_tensors == len(list(model.parameters()))
    # The first tensor's name, number of sizes, sizes (the innermost first), type and offset.
    place = data.index(b"token_embd.weight") + len("token_embd.weight")
    assert struct.unpack_from("<I2QIQ", data, place) == (2, 320, 509, 30, 0)
    embedding = model.get_parameter("model.embed_tokens.weight").detach().view(torch.uint8)
    assert data.index(embedding.numpy().tobytes()) % 32 == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3 moe", "no GGUF is written of qwen3_moe, only of gemma3, gemma3_text, llama, qwen3"),
        ("llama tied with biases", "no GGUF is written of a model with .*bias"),
        ("qwen3 yarn tempered", "no GGUF is written of rope_type yarn"),
        ("gemma3", "query_pre_attn_scalar 48"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    name: str, message: str, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        written(tiny_checkpoint(name), tmp_path)
    assert not (tmp_path / "model.gguf").exists()


def test_other_patterns_and_a_file_that_cannot_be_written(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    uneven = ["full_attention", "sliding_attention", "full_attention"]
    given = {"num_hidden_layers": 3, "query_pre_attn_scalar": 40, "layer_types": uneven}
    save_tiny(gemma3(**given), tmp_path / "uneven", torch.float32)
    with pytest.raises(ExportError, match="at even distances"):
        written(tmp_path / "uneven", tmp_path)
    with pytest.raises(ExportError, match=r"model\.gguf cannot be written: No such file"):
        written(tiny_checkpoint("qwen3"), tmp_path / "nowhere")


def test_a_file_that_is_none_is_told_of(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(BenchError, match=r"cannot read .*no\.gguf"):
        GgufEngine(str(tmp_path / "no.gguf"), 1, 64)
