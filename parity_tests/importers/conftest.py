"""Real checkpoints of llama2.c, imported once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from portkit.importers.llama2c import import_llama2c


@pytest.fixture(scope="session")
def stories260k(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K in the Hugging Face layout, its tokenizer from llama2.c's own file."""
    source = data_folder / "weights" / "stories260K"
    folder = tmp_path_factory.mktemp("imported") / "stories260K"
    import_llama2c(source / "stories260K.bin", folder, tokenizer=source / "tok512.bin")
    return folder


@pytest.fixture(scope="session")
def babyllama105(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """babyllama105 in the Hugging Face layout, its tokenizer from SentencePiece's file."""
    source = data_folder / "weights" / "babyllama105"
    folder = tmp_path_factory.mktemp("imported") / "babyllama105"
    import_llama2c(source / "model5000.bin", folder, tokenizer=source / "tok105.model")
    return folder
