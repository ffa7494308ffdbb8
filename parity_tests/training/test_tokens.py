"""Token files: what goes in comes out, wherever the making was cut off; and the held-out part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from portkit.errors import DataError
from portkit.training import preparation
from portkit.training.preparation import HELD_OUT, TRAIN, divide, prepare
from portkit.training.reading import SEPARATOR
from portkit.training.texts import Texts, find_texts
from portkit.training.tokens import Origin, TokenFile, TokenWriter
from portkit.training.vocabulary import digest, open_folder, train_characters

ORIGIN = Origin(tokenizer_sha256="t", source_sha256="s", part="train", vocab_size=1000)
DOCUMENTS = [[2, 5, 999, 1], [2, 1], [2, *range(3, 90), 1]]


def contents(file: TokenFile) -> list[list[int]]:
    return [
        file.ids[start:end].tolist()
        for start, end in zip(file.starts[:-1], file.starts[1:], strict=True)
    ]


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(1000, 2), (65536, 2), (65537, 4)])
def test_what_goes_in_comes_out(vocab_size: int, itemsize: int, tmp_path: Path) -> None:
    path, origin = tmp_path / "a.tokens", replace(ORIGIN, vocab_size=vocab_size)
    documents = [*DOCUMENTS, [vocab_size - 1]]
    with TokenWriter(path, origin) as writer:
        for number, ids in enumerate(documents):
            writer.add(ids, 10 + number)
        writer.finish()
    file = TokenFile(path)
    assert contents(file) == documents
    assert file.bytes_before.tolist() == [0, 10, 21, 33, 46]
    assert (file.origin, file.num_tokens) == (origin, sum(map(len, documents)))
    assert file.ids.dtype.itemsize == itemsize
    assert [path] == list(tmp_path.iterdir())


def test_a_writer_goes_on_from_the_last_commit(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    with TokenWriter(path, ORIGIN) as writer:
        writer.add(DOCUMENTS[0], 7)
        writer.commit(1)
        writer.add([3, 3, 3], 9)  # lost: never committed
    assert not path.exists()
    with TokenWriter(path, ORIGIN) as writer:
        assert writer.source_position == 1
        writer.add(DOCUMENTS[1], 8)
        writer.add(DOCUMENTS[2], 9)
        writer.finish()
    assert contents(TokenFile(path)) == DOCUMENTS
    assert TokenFile(path).bytes_before.tolist() == [0, 7, 15, 24]


def test_a_writer_of_another_origin_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    with TokenWriter(path, ORIGIN) as writer:
        writer.add(DOCUMENTS[0], 7)
        writer.commit(1)
    with TokenWriter(path, replace(ORIGIN, tokenizer_sha256="other")) as writer:
        assert writer.source_position == 0
        writer.add(DOCUMENTS[1], 8)
        writer.finish()
    assert contents(TokenFile(path)) == [DOCUMENTS[1]]


@pytest.mark.parametrize("damage", ["cut", "longer", "magic", "empty"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    with TokenWriter(path, ORIGIN) as writer:
        writer.add(DOCUMENTS[0], 7)
        writer.finish()
    whole = path.read_bytes()
    damaged = {"cut": whole[:-1], "longer": whole + b"0", "magic": b"x" + whole[1:], "empty": b""}
    path.write_bytes(damaged[damage])
    with pytest.raises(DataError, match="delete it"):
        TokenFile(path)


def corpus_of(folder: Path, documents: list[str]) -> Texts:
    file = folder / "text.txt"
    file.write_text(SEPARATOR.join(documents), encoding="utf-8")
    return find_texts(str(file))[0]


def decoded(texts: Texts, folder: Path, held_out: Texts | None = None) -> dict[str, list[str]]:
    """Both parts as text, from the token files that are made of them."""
    train_characters(texts.documents(), folder / "tokenizer")
    tokenizer, key = open_folder(folder / "tokenizer"), digest(folder / "tokenizer")
    found = {}
    for corpus in divide(texts, held_out):
        file = prepare(corpus, tokenizer, key, folder / "data", lambda *_: None)
        rows = contents(file)
        assert all((row[0], row[-1]) == (tokenizer.bos_id, tokenizer.eos_id) for row in rows)
        found[corpus.part] = [tokenizer.decode(row) for row in rows]
        sizes = [len(text.encode()) for text in found[corpus.part]]
        assert np.diff(file.bytes_before).tolist() == sizes
    return found


def test_many_documents_are_divided_by_what_they_say(tmp_path: Path) -> None:
    told_twice = [f"story ü {number % 150}" for number in range(300)]
    found = decoded(corpus_of(tmp_path, told_twice), tmp_path)
    assert sorted(found[TRAIN] + found[HELD_OUT]) == sorted(told_twice)
    assert not set(found[TRAIN]) & set(found[HELD_OUT])
    assert 10 < len(found[HELD_OUT]) < 60


def test_of_one_document_the_end_is_held_out(tmp_path: Path) -> None:
    text = "".join(chr(97 + number % 26) for number in range(1000))
    found = decoded(corpus_of(tmp_path, [text]), tmp_path)
    assert found == {TRAIN: [text[:900]], HELD_OUT: [text[900:]]}


def test_held_out_text_of_its_own(tmp_path: Path) -> None:
    texts = corpus_of(tmp_path, ["abc", "def"])
    (tmp_path / "elsewhere").mkdir()
    held_out = corpus_of(tmp_path / "elsewhere", ["fed"])
    found = decoded(texts, tmp_path, held_out)
    assert found == {TRAIN: ["abc", "def"], HELD_OUT: ["fed"]}


def test_a_long_document_is_encoded_in_pieces_and_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "_PIECE_CHARACTERS", 10)
    text = "one line\nanother line\n\nand-a-very-long-last-one"
    found = decoded(corpus_of(tmp_path, [text] * 3), tmp_path)
    assert found[TRAIN] == [text[: len(text) * 9 // 10]] * 3


def test_preparation_that_was_cut_off_gives_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every batch in turn; nothing that was committed is encoded again."""
    monkeypatch.setattr(preparation, "_BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(preparation, "_COMMIT_CHARACTERS", 50)
    texts = corpus_of(tmp_path, [f"document number {number}" for number in range(120)])
    train_characters(texts.documents(), tmp_path / "tokenizer")
    tokenizer = open_folder(tmp_path / "tokenizer")
    corpus, _ = divide(texts, None)
    straight = prepare(corpus, tokenizer, "t", tmp_path / "straight", lambda *_: None)

    class Stop(Exception):
        pass

    reached: list[float] = []

    def stop(_: str, done: float) -> None:
        if not reached or done > reached[-1]:
            reached.append(done)
            raise Stop

    for _ in range(100):
        try:
            resumed = prepare(corpus, tokenizer, "t", tmp_path / "resumed", stop)
            break
        except Stop:
            continue
    assert len(reached) > 10
    assert resumed.path.read_bytes() == straight.path.read_bytes()
    before = resumed.path.stat().st_mtime_ns
    prepare(corpus, tokenizer, "t", tmp_path / "resumed", stop)  # whole: not made again
    assert resumed.path.stat().st_mtime_ns == before
