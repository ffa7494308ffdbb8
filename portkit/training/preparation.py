"""Text to token files: which documents train and which are held out, encoded once, resumable.

Knows how documents are divided, that each stands between BOS and EOS, and how a long one is fed to
the tokenizer in pieces. The files are `tokens.py`'s, the tokenizer `vocabulary.py`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from portkit.errors import DataError
from portkit.tokenizer import Tokenizer
from portkit.training.texts import Survey, Texts
from portkit.training.tokens import Origin, TokenFile, TokenWriter

TRAIN, HELD_OUT = "train", "held-out"
_HELD_OUT_OF_ONE = 1_000_000
_FEW_DOCUMENTS = 100
_PIECE_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 256
_COMMIT_CHARACTERS = 1 << 24

Progress = Callable[[str, float], None]
"""Told what is being prepared, and which share of it is done."""


@dataclass(frozen=True)
class Corpus:
    """Texts, surveyed, and which part of their documents is meant."""

    texts: Texts
    survey: Survey
    part: str
    whole: bool
    """All documents belong to this part, because the other has texts of its own."""

    def documents(self) -> Iterator[str]:
        """The documents of this part.

        Of many documents a tenth is held out, chosen by their digests, so that a story that stands
        twice is on one side only. Of few, the last tenth of each, at most a million characters.
        """
        for document in self.texts.documents():
            if self.whole:
                yield document
            elif self.survey.num_documents < _FEW_DOCUMENTS:
                cut = max(len(document) * 9 // 10, len(document) - _HELD_OUT_OF_ONE)
                if part := document[:cut] if self.part == TRAIN else document[cut:]:
                    yield part
            elif _is_held_out(document) == (self.part == HELD_OUT):
                yield document


def divide(texts: Texts, held_out: Texts | None) -> tuple[Corpus, Corpus]:
    """The training and the held-out corpus; reads everything once. Raises DataError."""
    survey = texts.survey()
    if held_out is None:
        return (Corpus(texts, survey, TRAIN, False), Corpus(texts, survey, HELD_OUT, False))
    return (
        Corpus(texts, survey, TRAIN, True),
        Corpus(held_out, held_out.survey(), HELD_OUT, True),
    )


def prepare(
    corpus: Corpus, tokenizer: Tokenizer, tokenizer_sha256: str, folder: Path, progress: Progress
) -> TokenFile:
    """The token file of `corpus` in `folder`, made where there is none of this very origin.

    Interrupted, it goes on from its last commit when it is called again. Raises DataError.
    """
    origin = Origin(
        tokenizer_sha256=tokenizer_sha256,
        source_sha256=corpus.survey.sha256,
        part=corpus.part + (" (all)" if corpus.whole else ""),
        vocab_size=tokenizer.vocab_size,
    )
    path = folder / f"{corpus.part}.tokens"
    if path.is_file():
        found = TokenFile(path)
        if found.origin == origin:
            return found
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TokenWriter(path, origin) as writer:
            _write(corpus, tokenizer, writer, progress)
            writer.finish()
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}): make room there and run again, it goes "
            "on from where it was"
        ) from error
    return TokenFile(path)


def _write(corpus: Corpus, tokenizer: Tokenizer, writer: TokenWriter, progress: Progress) -> None:
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    documents = corpus.documents()
    position = writer.source_position
    num_characters = sum(len(document) for document in islice(documents, position))
    committed = num_characters
    while batch := list(islice(documents, _BATCH_DOCUMENTS)):
        pieces = [list(_pieces(document)) for document in batch]
        encoded = iter(tokenizer.encode_many([piece for one in pieces for piece in one]))
        for document, its_pieces in zip(batch, pieces, strict=True):
            ids = [token_id for _ in its_pieces for token_id in next(encoded)]
            writer.add([*begin, *ids, *end], len(document.encode()))
        position += len(batch)
        num_characters += sum(map(len, batch))
        progress(corpus.part, num_characters / corpus.survey.num_characters)
        if num_characters - committed > _COMMIT_CHARACTERS:
            writer.commit(position)
            committed = num_characters
    progress(corpus.part, 1.0)
    if position == 0:
        raise DataError(
            f"{corpus.texts.name} leaves no document for the {corpus.part} part: give more text, "
            "or --held-out FILE"
        )


def _pieces(document: str) -> Iterator[str]:
    """A document as the tokenizer takes it: whole, or cut behind a line break if it is very long.

    The library needs a hundred bytes a character while it encodes. Where a cut falls may change the
    tokens on either side of it, and nothing else.
    """
    start = 0
    while len(document) - start > _PIECE_CHARACTERS:
        line_break = document.rfind("\n", start, start + _PIECE_CHARACTERS)
        end = line_break + 1 if line_break > start else start + _PIECE_CHARACTERS
        yield document[start:end]
        start = end
    yield document[start:]


def _is_held_out(document: str) -> bool:
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "little") % 10 == 0
