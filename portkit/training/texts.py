"""Where training text comes from: files, folders, the Hub; and what one document is.

Knows how a `--data` word becomes files, how files are read without holding them, and how documents
are told apart: `<|endoftext|>` ends one, and so does the end of a file. Knows no tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from portkit.errors import DataError, HubError
from portkit.hub import RemoteFiles

SEPARATOR = "<|endoftext|>"
_READ_CHARACTERS = 1 << 20
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

    def documents(self) -> Iterator[str]:
        """Each document without the white space around it; empty ones are left out.

        Raises DataError where a file is not UTF-8 or cannot be read.
        """
        for file in self.files:
            yield from filter(None, map(str.strip, _split(file)))

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


def find_texts(name: str) -> tuple[Texts, Texts | None]:
    """The training text that `name` stands for, and the held-out text where it brings its own.

    A file; a folder, of which every `.txt` below it is taken; the name of a corpus (tinystories);
    or `hf://datasets/OWNER/NAME/FILE`, fetched through the Hub's cache. Raises DataError, HubError.
    """
    if name in CORPORA and not Path(name).exists():
        train, held_out = CORPORA[name]
        return _from_hub(train), _from_hub(held_out)
    if name.startswith(_HUB):
        return _from_hub(name), None
    path = Path(name)
    if path.is_file():
        return Texts(name, (path,)), None
    if path.is_dir():
        files = tuple(sorted(file for file in path.rglob("*.txt") if file.is_file()))
        if not files:
            raise DataError(f"{name} holds no .txt file: give a folder that does, or a file")
        return Texts(name, files), None
    raise DataError(
        f"there is no text at {name!r}: give a file, a folder of .txt files, "
        f"{_HUB}OWNER/NAME/FILE, or {' or '.join(CORPORA)}"
    )


def _from_hub(name: str) -> Texts:
    owner, _, rest = name.removeprefix(_HUB).partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        raise HubError(f"{name!r} names no file of a dataset: write {_HUB}OWNER/NAME/FILE")
    files = RemoteFiles(f"{owner}/{repository}", repo_type="dataset", first=file)
    return Texts(name, (files.path(file),))


def _split(file: Path) -> Iterator[str]:
    """What stands between separators, a million characters in memory and one document at a time."""
    held = ""
    try:
        with file.open(encoding="utf-8") as text:
            while read := text.read(_READ_CHARACTERS):
                *whole, held = (held + read).split(SEPARATOR)
                yield from whole
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 ({error.reason}): convert it, say with iconv"
        ) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): see to its path") from error
    yield held
