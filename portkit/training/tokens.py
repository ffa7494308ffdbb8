"""Token files: the ids of a corpus and where its documents begin, mapped and never read whole.

    8 bytes   "pk-token"
    8 bytes   length of the JSON header, little-endian
    …         the header, padded with spaces to byte 4096
    …         ids, uint16 or uint32, little-endian: the documents one behind the other
    …         int64: where each document begins among the ids, and the end of the last
    …         int64: the UTF-8 bytes of text before each document, and in all

The header comes last when a file is written, and then the file gets its name: one that is there is
whole. Knows nothing of text or tokenizers but their digests.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from portkit.errors import DataError
from portkit.json_reading import parse_object, read_object

_MAGIC = b"pk-token"
_HEADER_BYTES = 4096
_FORMAT = 1
_DELETE = "delete it, and it is made again"
Ids = npt.NDArray[np.unsignedinteger[Any]]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a token file was made from: files with the same origin hold the same tokens."""

    tokenizer_sha256: str
    source_sha256: str
    part: str
    """Which of the source's documents: train or held-out."""
    vocab_size: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest type that holds every id; 262,144 of them do not fit in 16 bits."""
        return np.dtype("<u2") if self.vocab_size <= 1 << 16 else np.dtype("<u4")


class TokenFile:
    """A whole token file, mapped. Raises DataError where it is damaged or no token file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = _read_header(path)
        self.origin = _origin(path, header.get("origin"))
        self.num_tokens = _count(header, "num_tokens", path)
        self.num_documents = _count(header, "num_documents", path)
        dtype, count = self.origin.dtype, self.num_documents + 1
        ids_bytes = self.num_tokens * dtype.itemsize
        expected = _HEADER_BYTES + ids_bytes + 2 * 8 * count
        if path.stat().st_size != expected:
            raise DataError(
                f"{path} has {path.stat().st_size:,} bytes and should have {expected:,}: {_DELETE}"
            )
        self.ids: Ids = np.memmap(path, dtype, "r", _HEADER_BYTES, (self.num_tokens,))
        tables = np.fromfile(path, "<i8", 2 * count, offset=_HEADER_BYTES + ids_bytes)
        self.starts: Offsets = tables[:count]
        """(documents + 1,): where each document begins, and the end of the last."""
        self.bytes_before: Offsets = tables[count:]
        """(documents + 1,): bytes of text before each document, and in all."""


class TokenWriter:
    """Writes a token file a few documents at a time; a writer of the same origin goes on from it.

    What `commit` has returned from survives a kill: ids and documents are on disk, then a journal
    that says how far they go. `source_position` is the caller's mark of how far it has read.
    """

    def __init__(self, path: Path, origin: Origin) -> None:
        self._path, self._origin = path, origin
        self._journal_path = _beside(path, "journal")
        self._num_tokens, self._num_documents, self.source_position = self._resume()
        end = _HEADER_BYTES + self._num_tokens * origin.dtype.itemsize
        self._ids = _open_at(_beside(path, "partial"), end)
        self._documents = _open_at(_beside(path, "documents"), self._num_documents * 16)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ids.close()
        self._documents.close()

    def add(self, ids: Sequence[int], text_bytes: int) -> None:
        """One document: its ids, and the length of its text in UTF-8."""
        array = np.asarray(ids)
        assert array.min() >= 0
        assert array.max() < self._origin.vocab_size
        self._ids.write(array.astype(self._origin.dtype).tobytes())
        self._documents.write(np.array([len(ids), text_bytes], "<i8").tobytes())
        self._num_tokens += len(ids)
        self._num_documents += 1

    def commit(self, source_position: int) -> None:
        """Put on disk what was added, and that the source has been read to `source_position`."""
        _to_disk(self._ids)
        _to_disk(self._documents)
        self.source_position = source_position
        journal = {
            "origin": asdict(self._origin),
            "num_tokens": self._num_tokens,
            "num_documents": self._num_documents,
            "source_position": source_position,
        }
        partial = _beside(self._journal_path, "partial")
        partial.write_text(json.dumps(journal), encoding="utf-8")
        partial.replace(self._journal_path)

    def finish(self) -> None:
        """Complete the file and give it its name."""
        self._documents.seek(0)
        lengths = np.frombuffer(self._documents.read(), "<i8").reshape(-1, 2)
        tables = np.zeros((2, self._num_documents + 1), "<i8")
        np.cumsum(lengths.T, axis=1, out=tables[:, 1:])
        self._ids.write(tables.tobytes())
        header = {
            "format": _FORMAT,
            "num_tokens": self._num_tokens,
            "num_documents": self._num_documents,
            "origin": asdict(self._origin),
        }
        text = json.dumps(header).encode()
        assert len(text) <= _HEADER_BYTES - 16
        self._ids.seek(0)
        self._ids.write(_MAGIC + len(text).to_bytes(8, "little") + text.ljust(_HEADER_BYTES - 16))
        _to_disk(self._ids)
        _beside(self._path, "partial").rename(self._path)
        self._journal_path.unlink(missing_ok=True)
        _beside(self._path, "documents").unlink()

    def _resume(self) -> tuple[int, int, int]:
        """Tokens, documents and position that an earlier writer of this origin left, else zeros."""
        if not self._journal_path.is_file():
            return 0, 0, 0
        journal = read_object(self._journal_path, str(self._journal_path), DataError, _DELETE)
        if journal.get("origin") != asdict(self._origin):
            return 0, 0, 0
        return (
            _count(journal, "num_tokens", self._journal_path),
            _count(journal, "num_documents", self._journal_path),
            _count(journal, "source_position", self._journal_path),
        )


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _open_at(path: Path, end: int) -> BinaryIO:
    """Open for reading and writing behind byte `end`; what stood there is cut off."""
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(end)
    file.seek(end)
    return file


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    length = int.from_bytes(start[8:16], "little")
    if start[:8] != _MAGIC or len(start) < _HEADER_BYTES or length > _HEADER_BYTES - 16:
        raise DataError(f"{path} is no token file, or a damaged one: {_DELETE}")
    header = parse_object(start[16 : 16 + length], f"{path}: its header", DataError, _DELETE)
    if header.get("format") != _FORMAT:
        raise DataError(
            f"{path} is a token file of format {header.get('format')!r:.40}, this portkit reads "
            f"{_FORMAT}: {_DELETE}"
        )
    return header


def _count(held: dict[str, Any], key: str, path: Path) -> int:
    """A number of things that a file says it has."""
    value = held.get(key)
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise DataError(f"{path}: {key} is {value!r:.40}, which counts nothing: {_DELETE}")
    return value


def _origin(path: Path, given: Any) -> Origin:
    words = ("tokenizer_sha256", "source_sha256", "part")
    if (
        not isinstance(given, dict)
        or given.keys() != {*words, "vocab_size"}
        or not all(isinstance(given[word], str) for word in words)
    ):
        raise DataError(f"{path}: its header does not say what it was made from: {_DELETE}")
    _count(given, "vocab_size", path)
    return Origin(**given)
