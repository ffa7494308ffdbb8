"""Where training text comes from: files, folders, the Hub.

Knows how a `--data` word becomes files, and what a reading of all documents finds; how a file is
read is `reading.py`'s. Knows no tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from portkit.errors import DataError, HubError
from portkit.hub import RemoteFiles
from portkit.training.reading import documents_of, is_records, is_text_data

_HUB = "hf://datasets/"

# Corpora with a name of their own: training text, and the text that is held out, on the Hub.
CORPORA = {
    "tinystories": (
        f"{_HUB}roneneldan/TinyStories/TinyStoriesV2-GPT4-train.txt",
        f"{_HUB}roneneldan/TinyStories/TinyStoriesV2-GPT4-valid.txt",
    )
}


@dataclass(frozen=True)
class Texts:
    """Files of text in a fixed order; `name` is what the user called them."""

    name: str
    files: tuple[Path, ...]
    text_key: str | None = None
    """Which value of a record is its text; None is "text"."""

    def documents(self) -> Iterator[str]:
        """Each document without the white space around it; empty ones are left out.

        Raises DataError where a file cannot be read, or not as what it is called.
        """
        for file in self.files:
            yield from filter(None, map(str.strip, documents_of(file, self.text_key)))

    @property
    def has_records(self) -> bool:
        """Whether a key says what of a file is text."""
        return any(map(is_records, self.files))

    def survey(self) -> Survey:
        """Read everything once: digest and size. Raises DataError where there is no text at all."""
        digest = hashlib.sha256()
        num_documents = num_characters = 0
        for document in self.documents():
            encoded = document.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
            num_documents += 1
            num_characters += len(document)
        if num_documents == 0:
            raise DataError(f"{self.name} holds no text: give a file with something in it")
        return Survey(digest.hexdigest(), num_documents, num_characters)


@dataclass(frozen=True)
class Survey:
    """What one reading of all documents finds; `sha256` is over the documents in their order."""

    sha256: str
    num_documents: int
    num_characters: int


def find_texts(name: str, text_key: str | None = None) -> tuple[Texts, Texts | None]:
    """The training text that `name` stands for, and the held-out text where it brings its own.

    A file; a folder, of which every `.txt` below it is taken, or where there is none every file of
    records; the name of a corpus (tinystories); or `hf://datasets/OWNER/NAME/FILE`, fetched through
    the Hub's cache. Raises DataError, HubError.
    """
    if name in CORPORA and not Path(name).exists():
        train, held_out = CORPORA[name]
        return _from_hub(train, text_key), _from_hub(held_out, text_key)
    if name.startswith(_HUB):
        return _from_hub(name, text_key), None
    path = Path(name)
    if path.is_file():
        return Texts(name, (path,), text_key), None
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if is_text_data(file) and file.is_file())
        files = [file for file in found if not is_records(file)] or found
        if not files:
            raise DataError(
                f"{name} holds no .txt file, and no .json, .jsonl or .csv either: give a folder "
                "that does, or a file"
            )
        return Texts(name, tuple(files), text_key), None
    raise DataError(
        f"there is no text at {name!r}: give a file, a folder of them, "
        f"{_HUB}OWNER/NAME/FILE, or {' or '.join(CORPORA)}"
    )


def _from_hub(name: str, text_key: str | None) -> Texts:
    owner, _, rest = name.removeprefix(_HUB).partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        raise HubError(f"{name!r} names no file of a dataset: write {_HUB}OWNER/NAME/FILE")
    files = RemoteFiles(f"{owner}/{repository}", repo_type="dataset", first=file)
    return Texts(name, (files.path(file),), text_key)
