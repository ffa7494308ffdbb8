"""SentencePiece's `.model` files, read as the protocol buffers they are.

Knows the numbers of the fields that matter (`sentencepiece_model.proto`) and the wire format below
them. So no library is needed, and what SentencePiece's own does not tell (the kind of the model,
how it treats a text first) is known before it is promised. Does not encode.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from portkit.errors import ImportFormatError
from portkit.importers.vocabulary import Kind, Piece, Vocabulary, check

# The fields of ModelProto, then those of the messages inside it.
_PIECE, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _SPACE_IS_SUFFIX = 3, 24
_CHARACTER_MAP, _DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5

_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
_KINDS = {1: Kind.NORMAL, 2: Kind.UNKNOWN, 3: Kind.CONTROL, 6: Kind.BYTE}
_REFUSED_KINDS = {4: "user-defined", 5: "unused"}

_Message = Mapping[int, int | bytes]


def read_sentencepiece(file: Path) -> Vocabulary:
    """Read a SentencePiece BPE model.

    Raises `ImportFormatError` if `file` is not one, or asks for what Llama's tokenizers do without
    and what would be lost here: another kind of model, a character map, pieces that users defined.
    """
    try:
        fields = list(_fields(file.read_bytes()))
        pieces = tuple(_piece(_message(value)) for number, value in fields if number == _PIECE)
        specs = {number: _message(value) for number, value in fields if _TRAINER <= number < 6}
        trainer, normalizer = specs.get(_TRAINER, {}), specs.get(_NORMALIZER, {})
        _refuse_unsupported(trainer, normalizer, specs.get(_DENORMALIZER, {}))
        vocabulary = Vocabulary(
            pieces=pieces,
            dummy_prefix=_int(normalizer, _DUMMY_PREFIX, 1) != 0,
            remove_extra_spaces=_int(normalizer, _REMOVE_EXTRA_SPACES, 1) != 0,
        )
    except (ValueError, struct.error) as error:
        raise ImportFormatError(f"{file}: not a SentencePiece BPE model: {error}") from error
    check(vocabulary, file)
    return vocabulary


def _refuse_unsupported(trainer: _Message, normalizer: _Message, denormalizer: _Message) -> None:
    model_type = _int(trainer, _MODEL_TYPE, 1)
    if _MODEL_TYPES.get(model_type) != "BPE":
        raise ValueError(f"its type is {_MODEL_TYPES.get(model_type, model_type)}")
    if _int(trainer, _SPACE_IS_SUFFIX, 0):
        raise ValueError("it takes spaces as suffixes, which no Llama does")
    if not _int(normalizer, _ESCAPE_SPACES, 1):
        raise ValueError("it does not escape spaces, which every Llama does")
    if _bytes(normalizer, _CHARACTER_MAP) or _bytes(denormalizer, _CHARACTER_MAP):
        name = _bytes(normalizer, 1).decode()
        raise ValueError(f"it maps characters ({name!r}); Llama's tokenizers are 'identity'")


def _piece(fields: _Message) -> Piece:
    text, kind = _bytes(fields, _TEXT).decode(), _int(fields, _TYPE, 1)
    if kind not in _KINDS:
        raise ValueError(f"its piece {text!r} is {_REFUSED_KINDS.get(kind, f'of type {kind}')}")
    (score,) = struct.unpack("<f", _bytes(fields, _SCORE) or bytes(4))
    return Piece(text, score, _KINDS[kind])


def _message(value: int | bytes) -> _Message:
    if isinstance(value, int):
        raise ValueError("a number stands where a message should")
    return dict(_fields(value))


def _int(fields: _Message, number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise ValueError(f"field {number} should be a number")
    return value


def _bytes(fields: _Message, number: int) -> bytes:
    value = fields.get(number, b"")
    if not isinstance(value, bytes):
        raise ValueError(f"field {number} should be bytes")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Each field of a message: its number, and a varint's value or the bytes of any other."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire_type == 2:
            size, at = _varint(data, at)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"byte {at} starts no field")
        if at + size > len(data):
            raise ValueError("it ends too early")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that starts at byte `at`, seven bits a byte, and where the next thing starts."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends too early")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError("a number runs over ten bytes")
