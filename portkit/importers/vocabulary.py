"""A vocabulary of scored pieces, as SentencePiece trains it, said as a `tokenizer.json`.

Knows the score-greedy encoding (of all neighbours whose concatenation is a piece, join the one of
the highest score, the leftmost among equals, until none is left), how to say it as a ranked list of
merges, and what the `tokenizers` library needs beside it. Knows no file that holds such pieces.

Two things differ from the encoder of llama2.c, both as in every published Llama tokenizer: `<s>`,
`</s>` and `<unk>` written out in a text are those tokens, and a literal U+2581 reads as a space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from portkit.errors import ImportFormatError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece spells a space inside a piece
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2  # llama2.c has them in its code, not in its files


class Kind(Enum):
    """What a piece stands for; only a NORMAL one can come of text by joining."""

    NORMAL = auto()
    UNKNOWN = auto()
    CONTROL = auto()
    BYTE = auto()


@dataclass(frozen=True)
class Piece:
    """One entry: its text with U+2581 for a space, its score (higher joins first), its kind."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class Vocabulary:
    """Pieces in the order of their ids, and what is done to a text before it is cut into them."""

    pieces: tuple[Piece, ...]
    dummy_prefix: bool  # a space is put in front of every text, and taken away when decoding
    remove_extra_spaces: bool  # no spaces at either end, never two in a row


def check(vocabulary: Vocabulary, source: Path) -> None:
    """Raise `ImportFormatError` if `vocabulary`, read from `source`, is not a Llama's."""
    pieces = vocabulary.pieces
    if [piece.kind for piece in pieces[:3]] != [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL]:
        raise ImportFormatError(
            f"{source}: llama2.c wants <unk>, <s>, </s> as pieces 0, 1, 2; "
            f"here they are {[piece.text for piece in pieces[:3]]}"
        )
    seen: dict[str, int] = {}
    for id_, piece in enumerate(pieces):
        if not piece.text or piece.text in seen:
            other = f"the same as piece {seen[piece.text]}" if piece.text else "empty"
            raise ImportFormatError(f"{source}: piece {id_} ({piece.text!r}) is {other}")
        seen[piece.text] = id_


def merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """The pairs to join, the first first, that encode as the score-greedy rule does.

    A piece needs one pair only, the last step of the greedy rule run on its own text: as long as no
    join crosses the ends of a piece, the joins inside it are those that it would see alone.

    Raises `ImportFormatError` for two pieces of equal score: which is joined first would depend on
    where they stand in the text, and a ranked list cannot say that.
    """
    scores = {piece.text: piece.score for piece in pieces if piece.kind is Kind.NORMAL}
    ranked: list[tuple[float, tuple[str, str]]] = []
    for text, score in scores.items():
        pair = _last_join(text, scores)
        if pair is not None:
            ranked.append((score, pair))
    ranked.sort(key=lambda entry: -entry[0])
    for (score, one), (next_score, other) in pairwise(ranked):
        if score == next_score:
            raise ImportFormatError(
                f"tokenizer: pieces {''.join(one)!r} and {''.join(other)!r} have the same score "
                f"{score}, and a tokenizer.json cannot leave their order open"
            )
    return [pair for _, pair in ranked]


def _last_join(text: str, scores: Mapping[str, float]) -> tuple[str, str] | None:
    """The two parts that the greedy rule joins last to make `text`; None if it never makes it."""
    parts = list(text)
    if len(parts) < 2 or any(part not in scores for part in parts):
        return None
    while len(parts) > 2:
        joined = [one + other for one, other in pairwise(parts)]
        known = [index for index, part in enumerate(joined) if part in scores]
        if not known:
            return None
        best = max(known, key=lambda index: scores[joined[index]])  # the leftmost among equals
        parts[best : best + 2] = [joined[best]]
    return parts[0], parts[1]


def to_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The `tokenizers` object that encodes (BOS in front) and decodes as this vocabulary does."""
    pieces = vocabulary.pieces
    unk, bos = pieces[UNK_ID].text, pieces[BOS_ID].text
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.text: id_ for id_, piece in enumerate(pieces)},
            merges=merges(pieces),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=any(piece.kind is Kind.BYTE for piece in pieces),
        )
    )
    special = [piece.text for piece in pieces if piece.kind in (Kind.UNKNOWN, Kind.CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.normalizer = normalizers.Sequence(_normalizers(vocabulary))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, BOS_ID)]
    )
    tokenizer.decoder = decoders.Sequence(_decoders(vocabulary))
    return tokenizer


def _normalizers(vocabulary: Vocabulary) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if vocabulary.remove_extra_spaces:
        ends = Regex(rf"\A +|[ {SPACE}]+\z")  # ^ and $ would be the ends of each line
        steps += [normalizers.Replace(ends, ""), normalizers.Replace(Regex(" +"), " ")]
    if vocabulary.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _decoders(vocabulary: Vocabulary) -> list[decoders.Decoder]:
    steps: list[decoders.Decoder] = [decoders.ByteFallback(), decoders.Fuse()]
    # What leads is taken away while a space is U+2581 still: one that came as a byte stays.
    if vocabulary.remove_extra_spaces:
        steps.append(decoders.Replace(Regex(rf"\A{SPACE}+"), ""))
    elif vocabulary.dummy_prefix:
        steps.append(decoders.Replace(Regex(rf"\A{SPACE}"), ""))
    return [*steps, decoders.Replace(SPACE, " ")]
