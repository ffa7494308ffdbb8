"""What one file of training text holds: plain text, or records of which one value is the text.

Knows formats, by a file's name and by what it begins with: plain text, JSON, JSON Lines, CSV, and
each of them compressed by gzip. What is none of them is refused by its name: no model is trained on
brackets or on an archive. Knows what ends a document: `<|endoftext|>`, a record, the end of a file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from portkit.errors import DataError
from portkit.json_reading import parse

SEPARATOR = "<|endoftext|>"
TEXT_KEY = "text"
_READ_CHARACTERS = 1 << 20
_LONGEST_FIELD = 1 << 30
_REMEDY = "fetch it again or repair it"
_GZIP = b"\x1f\x8b"
_AS_LINES = (
    "write it as JSON Lines first: python -c \"import pandas; pandas.read_parquet('FILE')"
    ".to_json('FILE.jsonl', orient='records', lines=True)\""
)
_NOT_READ = {
    b"PAR1": f"is Parquet: {_AS_LINES}",
    b"ARROW1": f"is Arrow: {_AS_LINES.replace('parquet', 'feather')}",
    b"PK\3\4": "is a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it, say with unzstd",
    b"\xfd7zXZ\0": "is compressed by xz: unpack it, say with unxz",
    b"BZh": "is compressed by bzip2: unpack it, say with bunzip2",
}


def is_records(file: Path) -> bool:
    """Whether its name says that the file holds records."""
    return _suffix(file) in _RECORDS


def is_text_data(file: Path) -> bool:
    """Whether its name says that the file holds text or records of text."""
    return is_records(file) or _suffix(file) == ".txt"


def documents_of(file: Path, text_key: str | None = None) -> Iterator[str]:
    """Its documents in order, as they stand; some may be empty.

    Of records the value of `text_key`, "text" where none is given. A megabyte of plain text and one
    record are held at a time; of `.json` all. Raises DataError where it cannot be read as what it
    is called.
    """
    with _opened(file) as stream:
        if is_records(file):
            values = _RECORDS[_suffix(file)](stream, text_key or TEXT_KEY)
            for value in values:
                yield from value.split(SEPARATOR)
        else:
            yield from _split(stream, _suffix(file) == ".txt")


@contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    """Its characters, without a byte order mark; what goes wrong while they are read is told."""
    try:
        with file.open("rb") as raw:
            packed = raw.peek(8).startswith(_GZIP)
            held = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if packed else raw
            start = held.peek(8)
            for magic, said in _NOT_READ.items():
                if start.startswith(magic):
                    raise _Unreadable(said)
            newline = "" if _suffix(file) in (".csv", ".tsv") else None
            with io.TextIOWrapper(held, encoding="utf-8-sig", newline=newline) as stream:
                yield stream
    except _Unreadable as error:
        raise DataError(f"{file} {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 ({error.reason}): convert it, say with iconv"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file} is a damaged gzip file ({error}): fetch it again") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): see to its path") from error


class _Unreadable(Exception):
    """What follows a file's name."""


def _suffix(file: Path) -> str:
    name = file.name.lower()
    return Path(name.removesuffix(".gz").removesuffix(".gzip")).suffix


def _split(stream: TextIO, is_called_text: bool) -> Iterator[str]:
    """What stands between separators; JSON is text only where it is called so."""
    held, read = "", stream.read(_READ_CHARACTERS)
    if not is_called_text and _is_json(read.partition("\n")[0]):
        raise _Unreadable("begins with JSON: name it .json or .jsonl, or .txt to train on it as is")
    while read:
        if "\0" in read:
            raise _Unreadable("has zero bytes, and no text has: unpack or convert it")
        *whole, held = (held + read).split(SEPARATOR)
        yield from whole
        read = stream.read(_READ_CHARACTERS)
    yield held


def _is_json(line: str) -> bool:
    """Whether a first line begins an object or a list of them."""
    if line.strip() in ("{", "[", "[{"):
        return True
    return line.lstrip()[:1] in ("{", "[") and _parses(line)


def _parses(line: str) -> bool:
    """Whether it is JSON by itself."""
    try:
        parse(line, "", _Unreadable)
    except _Unreadable:
        return False
    return True


def _json_lines(stream: Iterable[str], key: str) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            where = f"line {number}"
            record = parse(line, f"is not JSON Lines: {where}", _Unreadable, _REMEDY)
            yield _text(record, key, where)


def _json(stream: TextIO, key: str) -> Iterator[str]:
    """A list of records, one record, one whose value is a list of texts, or a record a line."""
    content = stream.read().strip()
    first, _, more = content.partition("\n")
    if more and _parses(first):
        yield from _json_lines(io.StringIO(content), key)
        return
    whole = parse(content, "as a whole", _Unreadable, _REMEDY)
    if isinstance(whole, dict) and isinstance(whole.get(key), list):
        whole = whole[key]
    for number, record in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield _text(record, key, f"record {number}")


def _csv(stream: TextIO, key: str, delimiter: str = ",") -> Iterator[str]:
    csv.field_size_limit(_LONGEST_FIELD)  # the module's own is 128 KiB, for all who use it
    rows = csv.reader(stream, delimiter=delimiter)
    try:
        columns = next(rows, [])
        if key not in columns:
            raise _Unreadable(f"has no column {_shown(key)}: {_another(columns)}")
        place = columns.index(key)
        for row in rows:
            if row and len(row) <= place:
                raise _Unreadable(f"ends before its column {key} in line {rows.line_num}")
            if row:
                yield row[place]
    except csv.Error as error:
        raise _Unreadable(f"is not CSV: line {rows.line_num} ({error})") from error


def _tsv(stream: TextIO, key: str) -> Iterator[str]:
    return _csv(stream, key, "\t")


def _text(record: Any, key: str, where: str) -> str:
    """A record's text; none where it is null."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise _Unreadable(f"has no text in {where}: it is neither an object nor a string")
    if key not in record:
        raise _Unreadable(f"has no {_shown(key)} in {where}: {_another(record)}")
    value = record[key]
    if not isinstance(value, str | None):
        found = json.dumps(value)[:60]
        raise _Unreadable(
            f"has no text under {_shown(key)} in {where}, but {found}: give another key"
        )
    return value or ""


def _another(keys: Iterable[str]) -> str:
    shown = ", ".join(_shown(key) for key in list(keys)[:12])
    return f"name the text with --text-key ({shown})" if shown else "it has nothing in it"


def _shown(key: str) -> str:
    return key if len(key) <= 40 else f"{key[:40]}…"


_RECORDS: Mapping[str, Callable[[TextIO, str], Iterator[str]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _tsv,
}
