"""Text as documents: where it comes from, what ends one, and what is said of bad text."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity_tests.engine.hub_server import NOWHERE, HubServer, answer
from portkit.errors import DataError, HubError
from portkit.training import reading
from portkit.training.texts import find_texts

STORIES = "Once.\n<|endoftext|>\n Twice,\n and more.\n<|endoftext|>\n\n<|endoftext|>Thrice: ü"
DOCUMENTS = ["Once.", "Twice,\n and more.", "Thrice: ü"]
FETCH = """
from portkit.training.texts import find_texts
def read(name):
    train, held_out = find_texts(name)
    return [list(train.documents()), held_out and list(held_out.documents())]
"""


def documents(name: str | Path) -> list[str]:
    found, held_out = find_texts(str(name))
    assert held_out is None
    return list(found.documents())


def test_a_file_is_split_at_the_separator(tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text(STORIES, encoding="utf-8")
    assert documents(file) == DOCUMENTS


@pytest.mark.parametrize("read_characters", [1, 7, 20])
def test_a_separator_may_lie_across_two_reads(
    read_characters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_READ_CHARACTERS", read_characters)
    file = tmp_path / "stories.txt"
    file.write_text(STORIES, encoding="utf-8")
    assert documents(file) == DOCUMENTS


def test_a_folder_gives_its_text_files_in_order(tmp_path: Path) -> None:
    for name, text in {"b.txt": "second", "deeper/c.txt": "third", "a.txt": "first"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "picture.png").write_bytes(b"\xff\xd8")
    assert documents(tmp_path) == ["first", "second", "third"]


def test_the_survey_counts_and_tells_texts_apart(tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text(STORIES, encoding="utf-8")
    survey = find_texts(str(file))[0].survey()
    assert (survey.num_documents, survey.num_characters) == (3, sum(map(len, DOCUMENTS)))
    file.write_text(STORIES.replace("Once.", "Once!"), encoding="utf-8")
    assert find_texts(str(file))[0].survey().sha256 != survey.sha256
    file.write_text("On<|endoftext|>ce.", encoding="utf-8")
    joined = find_texts(str(file))[0].survey().sha256
    file.write_text("Once.", encoding="utf-8")
    assert find_texts(str(file))[0].survey().sha256 != joined


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no text"),
        (b" \n<|endoftext|>\n ", "holds no text"),
        (b"caf\xe9", "is not UTF-8"),
    ],
)
def test_bad_text_is_refused(content: bytes, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        find_texts(str(file))[0].survey()


def test_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.txt file"):
        find_texts(str(tmp_path))
    with pytest.raises(DataError, match="there is no text at"):
        find_texts(str(tmp_path / "nothing.txt"))
    with pytest.raises(HubError, match="names no file of a dataset"):
        find_texts("hf://datasets/roneneldan/TinyStories")


def test_tinystories_comes_through_the_hubs_cache(tmp_path: Path) -> None:
    """Fetched once, of one commit, and read again without a network."""
    code = f"{FETCH}\nout['read'] = read('tinystories')"
    files = {
        "TinyStoriesV2-GPT4-train.txt": STORIES.encode(),
        "TinyStoriesV2-GPT4-valid.txt": b"Held out.",
    }
    expected = {"read": [DOCUMENTS, ["Held out."]]}
    with HubServer() as hub:
        hub.add("datasets/roneneldan/TinyStories", files)
        assert answer(code, hub.url, tmp_path) == expected
        assert hub.served_bytes() == sum(map(len, files.values()))
        assert answer(code, hub.url, tmp_path) == expected
        assert hub.served_bytes() == sum(map(len, files.values()))
    assert answer(code, NOWHERE, tmp_path, HF_HUB_OFFLINE="1") == expected


def test_a_file_that_a_dataset_lacks_is_named(tmp_path: Path) -> None:
    code = f"{FETCH}\nout['said'] = refusal(read, 'hf://datasets/some/corpus/missing.txt')"
    with HubServer() as hub:
        hub.add("datasets/some/corpus", {"there.txt": b"text"})
        said = answer(code, hub.url, tmp_path)["said"]
    assert str(said).startswith("HubError: ")
    assert "missing.txt" in str(said)
