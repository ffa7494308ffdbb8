"""A fuzzer: whatever is written into a checkpoint's files, the answer is an answer, and in time.

No input may end in an internal error, nor take ten seconds. A few inputs of each kind in every run
of the tests; a hundred thousand in `make test-all`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from parity_tests.engine.damage import CONFIGS, INDEX, WEIGHTS, sharded, write_checkpoint
from parity_tests.engine.fuzzing import answered, fuzz, run, spoil, spoil_header
from parity_tests.generation.specimens import write_tokenizer
from parity_tests.training.test_saves import ALONE, small_state
from portkit.checkpoint import LocalFiles
from portkit.cli import diff, inspect, load
from portkit.confined import Confined
from portkit.generation.settings import GenerationSettings
from portkit.tokenizer_backend import Backend
from portkit.training.preparation import TRAIN
from portkit.training.saves import MANIFEST, Saves
from portkit.training.tokens import Origin, TokenFile, TokenWriter

FAMILIES = sorted(CONFIGS)


def counts(few: int, many: int) -> Any:
    return pytest.mark.parametrize(
        "count", [few, pytest.param(many, marks=pytest.mark.slow)], ids=["few", "many"]
    )


@counts(60, 28_000)
def test_headers(count: int, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, CONFIGS["gemma3"])
    sound = (folder / WEIGHTS).read_bytes()

    def check(edits: Any) -> None:
        (folder / WEIGHTS).write_bytes(spoil_header(sound, edits))
        run(load.command, str(folder), check=True)

    fuzz(count, check)


@counts(40, 15_000)
def test_indexes(count: int, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, CONFIGS["llama"])
    sharded(folder)
    sound = (folder / INDEX).read_bytes()

    def check(edits: Any) -> None:
        (folder / INDEX).write_bytes(spoil(sound, edits))
        run(load.command, str(folder))

    fuzz(count, check)


@pytest.mark.parametrize("family", FAMILIES)
@counts(6, 2_000)
def test_configs(family: str, count: int, tmp_path: Path) -> None:
    """Without weights, which would refuse most of what a config claims."""
    sound = json.dumps(CONFIGS[family]).encode()

    def check(edits: Any) -> None:
        (tmp_path / "config.json").write_bytes(spoil(sound, edits))
        run(inspect.command, str(tmp_path))

    fuzz(count, check)


@pytest.mark.parametrize("kind", ["byte_level", "gemma", "llama2", "metaspace"])
@counts(20, 3_000)
def test_tokenizers(kind: str, count: int, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, kind)
    path = tmp_path / "tokenizer.json"
    sound, child = path.read_bytes(), Confined("portkit.tokenizer_backend")

    def check(edits: Any) -> None:
        path.write_bytes(spoil(sound, edits))
        with answered():
            backend = Backend(path, "here", child=child)
            ids = backend.encode("Once upon a time, \N{SNOWMAN} 12\n", special=True)
            backend.decode(ids)
            backend.encode_many(["a", ""])
            assert backend.vocab_size >= 0

    fuzz(count, check)
    child.close()


@counts(40, 12_000)
def test_traces(count: int, tmp_path: Path) -> None:
    """The description and the header of one side of a `diff`."""
    right, spoilt = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_trace(right)
    sound = right.read_bytes()

    def check(edits: Any) -> None:
        if len(edits[0]) % 2:
            write_trace(spoilt, edits)
        else:
            spoilt.write_bytes(spoil_header(sound, edits))
        run(diff.command, right, spoilt, json=True)

    fuzz(count, check)


def write_trace(path: Path, edits: Any = ([], [])) -> None:
    ids = [[*range(5, 9)], [*range(4)]]
    passes = [
        {"name": "one", "input_ids": ids, "positions": [[*range(4)]] * 2},
        {"name": "two", "continues": "one", "input_ids": [[7], [8]], "positions": [[4], [4]]},
    ]
    described = {
        "format": 1,
        **{"model": "m", "engine": "numpy", "dtype": "float32", "threads": 1},
        "versions": {"numpy": "2"},
        "passes": passes,
        "sites": [
            {"name": "model.embed_tokens", "dims": "batch position channel"},
            {"name": "#logits", "dims": "batch position vocabulary"},
        ],
        "floors": {"model.embed_tokens": {"rms": 1e-7, "channels": [1e-7] * 3, "carried": 1e-7}},
        "last_tokens": 4,
        "whole": True,
    }
    torch.manual_seed(0)
    tensors = {
        f"{of}/{site}": torch.randn(2, tokens, width)
        for of, tokens in (("one", 4), ("two", 1))
        for site, width in (("model.embed_tokens", 3), ("#logits", 5))
    }
    text = spoil(json.dumps(described).encode(), edits).decode(errors="replace")
    save_file(tensors, path, metadata={"portkit.trace": text})


@counts(6, 1_000)
def test_manifests_of_saved_steps(count: int, tmp_path: Path) -> None:
    sound = tmp_path / "sound"
    Saves(sound, 3, ALONE).save(4, small_state(4))
    steps = tmp_path / "steps"
    shutil.copytree(sound, steps)
    manifest = steps / "step-00000004" / MANIFEST
    raw = manifest.read_bytes()

    def check(edits: Any) -> None:
        manifest.write_bytes(spoil(raw, edits))
        with answered():
            Saves(steps, 3, ALONE).load(small_state(1))

    fuzz(count, check)


@counts(20, 3_000)
def test_token_files(count: int, tmp_path: Path) -> None:
    path = tmp_path / f"{TRAIN}.tokens"
    origin = Origin(tokenizer_sha256="a" * 64, source_sha256="b" * 64, part=TRAIN, vocab_size=300)
    with TokenWriter(path, origin) as writer:
        writer.add([1, 2, 299], 5)
        writer.finish()
    whole = path.read_bytes()
    length = int.from_bytes(whole[8:16], "little")

    def check(edits: Any) -> None:
        header = spoil(whole[16 : 16 + length], edits)[:4080]
        start = whole[:8] + len(header).to_bytes(8, "little") + header.ljust(4080)
        path.write_bytes(start + whole[4096:])
        with answered():
            TokenFile(path)

    fuzz(count, check)


@counts(20, 3_000)
def test_generation_configs(count: int, tmp_path: Path) -> None:
    sound = {
        **{"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.1},
        **{"eos_token_id": [1, 2], "stop_strings": ["x"], "max_length": 40, "num_beams": 1},
        **{"bad_words_ids": None, "repetition_penalty": 1.1, "transformers_version": "5"},
    }

    def check(edits: Any) -> None:
        (tmp_path / "generation_config.json").write_bytes(spoil(json.dumps(sound).encode(), edits))
        with answered():
            GenerationSettings.read(LocalFiles(tmp_path))

    fuzz(count, check)
