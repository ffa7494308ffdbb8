"""llama2.c's `tokenizer.bin`: an int32 longest piece in bytes, then score, size and text of each.

Knows how llama2.c writes a SentencePiece vocabulary down and what its reader takes for granted:
spaces are spaces, BOS and EOS are piece 1 and 2 with a line break on either side, byte B is piece
B + 3. Does not encode.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

from portkit.errors import ImportFormatError
from portkit.importers.vocabulary import (
    BOS_ID,
    EOS_ID,
    SPACE,
    UNK_ID,
    Kind,
    Piece,
    Vocabulary,
    check,
)

_FIRST_BYTE_ID = 3


def read_llama2c_tokenizer(file: Path) -> Vocabulary:
    """Read `file` to its end. Raises `ImportFormatError` if it is anything else."""
    try:
        vocabulary = Vocabulary(
            pieces=tuple(
                _piece(id_, text, score) for id_, (score, text) in enumerate(_entries(file))
            ),
            dummy_prefix=True,
            remove_extra_spaces=False,
        )
    except ValueError as error:
        raise ImportFormatError(f"{file}: not a tokenizer of llama2.c: {error}") from error
    check(vocabulary, file)
    return vocabulary


def _entries(file: Path) -> list[tuple[float, str]]:
    """Score and text of every piece, as the file has them."""
    data = file.read_bytes()
    if len(data) < 4:
        raise ValueError(f"{len(data)} bytes are too few")
    (longest,) = struct.unpack_from("<i", data)
    entries: list[tuple[float, str]] = []
    at = 4
    while at < len(data):
        if at + 8 > len(data):
            raise ValueError(f"it ends inside piece {len(entries)}")
        score, size = struct.unpack_from("<fi", data, at)
        if not 0 < size <= longest or not math.isfinite(score):
            raise ValueError(
                f"piece {len(entries)} claims {size} bytes (at most {longest}) and score {score}"
            )
        text = data[at + 8 : at + 8 + size]
        if len(text) < size:
            raise ValueError(f"it ends inside piece {len(entries)}")
        entries.append((score, text.decode()))
        at += 8 + size
    return entries


def _piece(id_: int, text: str, score: float) -> Piece:
    if id_ == UNK_ID:
        return Piece(text, score, Kind.UNKNOWN if text == "<unk>" else Kind.NORMAL)
    if id_ in (BOS_ID, EOS_ID):
        name = text.strip("\n")
        return Piece(name, score, Kind.CONTROL if name in ("<s>", "</s>") else Kind.NORMAL)
    spelled = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
    if spelled is None:
        return Piece(text.replace(" ", SPACE), score, Kind.NORMAL)
    byte = int(spelled[1], 16)
    if id_ != byte + _FIRST_BYTE_ID:
        raise ValueError(f"piece {id_} is {text}, which llama2.c has at {byte + _FIRST_BYTE_ID}")
    return Piece(text, score, Kind.BYTE)
