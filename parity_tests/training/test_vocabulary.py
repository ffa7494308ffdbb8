"""Tokenizers trained here: what they encode comes back, Transformers reads them, and bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity_tests.conftest import CheckpointMaker
from portkit.checkpoint import LocalFiles
from portkit.errors import TokenizerError
from portkit.training.vocabulary import (
    copy_tokenizer,
    digest,
    open_folder,
    train_bpe,
    train_characters,
)

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "portkit" / "demo_checkpoint"
TEXT = "The cat sat on the mat.\n\n\tThe cat — “sat” — again, and again, and again: été.\n"


def test_a_trained_bpe_gives_any_text_back(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    train_bpe([text], 600, tmp_path)
    tokenizer = open_folder(tmp_path)
    assert tokenizer.vocab_size == 600
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 1)
    ids = tokenizer.encode(TEXT)
    assert ids[0] == tokenizer.bos_id
    assert len(ids) < len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode_many([TEXT, text]) == [ids[1:], tokenizer.encode(text)[1:]]


def test_characters_are_tokens(tmp_path: Path) -> None:
    train_characters([TEXT, "z"], tmp_path)
    tokenizer = open_folder(tmp_path)
    ids = tokenizer.encode(TEXT)
    assert len(ids) == 1 + len(TEXT)
    assert tokenizer.vocab_size == 4 + len(set(TEXT) | {"z"})
    assert tokenizer.decode(ids) == TEXT
    unknown = tokenizer.encode("Q")
    assert len(unknown) == 2
    assert "Q" not in tokenizer.decode(unknown)


@pytest.mark.parametrize("train", [lambda p: train_bpe([TEXT * 9], 512, p), None])
def test_transformers_encodes_alike(train: object, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    if callable(train):
        with pytest.raises(TokenizerError, match="the text is too little"):
            train(tmp_path)
        train_bpe([(ROOT / "README.md").read_text(encoding="utf-8")], 512, tmp_path)
    else:
        train_characters([TEXT], tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == open_folder(tmp_path).encode(TEXT)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 1, 0)


@pytest.mark.parametrize("size", [0, 511, 32769, 262144])
def test_a_size_out_of_range_is_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="choose 512 to 32768"):
        train_bpe([TEXT], size, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_checkpoints_tokenizer_is_taken_whole(
    tmp_path: Path, tiny_checkpoint: CheckpointMaker
) -> None:
    copy_tokenizer(LocalFiles(DEMO), tmp_path / "copy")
    assert digest(tmp_path / "copy") == digest(DEMO)
    assert open_folder(tmp_path / "copy").encode(TEXT) == open_folder(DEMO).encode(TEXT)
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        copy_tokenizer(LocalFiles(tiny_checkpoint("llama3")), tmp_path / "none")


def test_a_tokenizer_that_marks_no_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    with pytest.raises(TokenizerError, match="documents could not be kept apart"):
        copy_tokenizer(LocalFiles(tmp_path), tmp_path / "copy")
