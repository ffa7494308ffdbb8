"""A tokenizer for a new model: byte-level BPE or characters trained on its text, or one that is.

Knows how the `tokenizers` library is told to train, and which files make a tokenizer's folder.
Specials are `<pad>` 0, `<eos>` 1, `<bos>` 2; a prompt begins with `<bos>`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from portkit.checkpoint import Files, LocalFiles
from portkit.errors import TokenizerError
from portkit.layout import write_json
from portkit.tokenizer import Tokenizer

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
_SPECIALS = [PAD, EOS, BOS]
_UNKNOWN = "<unk>"
MIN_BPE_SIZE, MAX_BPE_SIZE = 512, 32768
_TRAINED_ON_CHARACTERS = 200_000_000
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def train_bpe(documents: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Byte-level BPE (Radford et al. 2019) of `vocab_size` tokens, written into `folder`.

    Trained on the first 200 million characters: what comes after changes no merge worth having.
    Raises TokenizerError where the size is outside 512 to 32,768 or the text is too little for it.
    """
    if not MIN_BPE_SIZE <= vocab_size <= MAX_BPE_SIZE:
        raise TokenizerError(
            f"a vocabulary of {vocab_size} is not trained here: choose {MIN_BPE_SIZE} to "
            f"{MAX_BPE_SIZE}, or take a checkpoint's with --tokenizer DIR"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_first(documents, _TRAINED_ON_CHARACTERS), trainer)
    found = backend.get_vocab_size()
    if found != vocab_size:
        raise TokenizerError(
            f"the text is too little for a vocabulary of {vocab_size}: it gives {found}; ask for "
            f"--vocab-size {max(found, MIN_BPE_SIZE)} at most, or for characters"
        )
    _write(backend, folder)


def train_characters(documents: Iterable[str], folder: Path) -> None:
    """One token for each character of the text, and `<unk>` for any other; into `folder`."""
    characters = sorted({character for document in documents for character in document})
    tokens = [*_SPECIALS, _UNKNOWN, *characters]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges=[], unk_token=_UNKNOWN))
    backend.decoder = decoders.Fuse()
    _write(backend, folder)


def copy_tokenizer(files: Files, folder: Path) -> None:
    """A checkpoint's own tokenizer, into `folder`; TokenizerError where it cannot be used.

    It has to name a BOS or an EOS: without either, documents would run into one another.
    """
    tokenizer = Tokenizer.open(files)
    if tokenizer.bos_id is None and tokenizer.eos_id is None:
        raise TokenizerError(
            f"the tokenizer of {files.origin} names neither bos_token nor eos_token in "
            "tokenizer_config.json, and documents could not be kept apart: name one there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in filter(files.has, _TOKENIZER_FILES):
        shutil.copyfile(files.path(name), folder / name)


def digest(folder: Path) -> str:
    """SHA-256 of the files that decide which ids a text gets."""
    found = hashlib.sha256()
    for name in _TOKENIZER_FILES[:2]:
        path = folder / name
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()


def open_folder(folder: Path) -> Tokenizer:
    """The tokenizer that one of the functions above has written."""
    return Tokenizer.open(LocalFiles(folder))


def copy_files(folder: Path, target: Path) -> None:
    """Put the tokenizer of `folder` beside a model."""
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def _write(backend: tokenizers.Tokenizer, folder: Path) -> None:
    bos_id = _SPECIALS.index(BOS)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bos_id)]
    )
    backend.add_special_tokens(_SPECIALS)
    config: Mapping[str, Any] = {
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder, "tokenizer_config.json", config)
    backend.save(str(folder / "tokenizer.json"))


def _first(documents: Iterable[str], num_characters: int) -> Iterator[str]:
    for document in documents:
        yield document
        num_characters -= len(document)
        if num_characters <= 0:
            return
