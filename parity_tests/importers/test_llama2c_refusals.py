"""Files that are not what they claim: one line that says what is wrong, and nothing left behind."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path

import pytest

from parity_tests.importers import llama2c_writer as writer
from portkit.errors import ExportError, ImportFormatError
from portkit.importers.llama2c import import_llama2c

LEGACY = writer.legacy(tied=True).data
V1 = writer.versioned("v1", tied=False).data
Q8_0 = writer.versioned("q8_0", tied=True).data


def patched(data: bytes, offset: int, layout: str, *values: int) -> bytes:
    size = struct.calcsize(layout)
    return data[:offset] + struct.pack(layout, *values) + data[offset + size :]


def of_sizes(**sizes: int) -> bytes:
    """A legacy file whose header has other sizes."""
    names = ("dim", "hidden_dim", "layers", "heads", "kv_heads", "vocab", "positions")
    header = dict(zip(names, writer.SIZES, strict=True)) | sizes
    return struct.pack("<7i", *header.values()) + LEGACY[28:]


MODELS = {
    "empty": (b"", "0 bytes are too few for any header"),
    "a few bytes": (LEGACY[:27], "27 bytes are too few for any header"),
    "header only": (LEGACY[:28], "it has 28 bytes"),
    "one byte short": (LEGACY[:-1], "it is cut short, or of another format"),
    "one byte long": (LEGACY + b"\0", "it is too long, or of another format"),
    "v1 cut in its header": (V1[:200], "it ends inside its header of 256 bytes"),
    "v1 cut": (V1[:-4], "its v1 header asks for"),
    "v1 long": (V1 + bytes(64), "it is too long"),
    "q8_0 cut": (Q8_0[:-1], "its q8_0 header asks for"),
    "q8_0 said to be v1": (patched(Q8_0, 4, "<iiiiiiiiBi", 1, *writer.SIZES, 1, 0), "cut short"),
    "untied without a head": (of_sizes(vocab=-writer.VOCAB), "it is cut short"),
    "version 0": (patched(V1, 4, "<i", 0), "it is of version 0; 1 (float32) and 2 (q8_0) are"),
    "version 3": (patched(V1, 4, "<i", 3), "it is of version 3"),
    "version -1": (patched(V1, 4, "<i", -1), "it is of version -1"),
    "magic of another": (
        patched(V1, 0, "<I", 0x616B3433),
        "its legacy header (no magic number) says",
    ),
    "big-endian": (patched(LEGACY, 0, ">7i", *writer.SIZES), "it is cut short, or of"),
    "a ckpt.pt": (
        b"PK\x03\x04" + bytes(300),
        "it is what torch.save writes, as llama2.c's training writes ckpt.pt: make a model file",
    ),
    "an old ckpt.pt": (b"\x80\x02\x8a\x0al\xfc" + bytes(300), "it is what torch.save writes"),
    "a GGUF file": (b"GGUF" + bytes(300), "it is a GGUF file, llama.cpp's"),
    "text": (b"Once upon a time, there was a little girl named Lily.", "not a model of llama2.c"),
    "negative dim": (of_sizes(dim=-30), "says hidden_size = -30"),
    "no layers": (of_sizes(layers=0), "says num_hidden_layers = 0"),
    "no heads": (of_sizes(heads=0), "says num_attention_heads = 0"),
    "negative kv heads": (of_sizes(kv_heads=-1), "says num_key_value_heads = -1"),
    "no vocabulary": (of_sizes(vocab=0), "says vocab_size = 0"),
    "no positions": (of_sizes(positions=0), "says max_position_embeddings = 0"),
    "negative vocabulary in v1": (
        patched(V1, 28, "<i", -writer.VOCAB),
        "says vocab_size = -101",
    ),
    "heads that do not divide": (
        of_sizes(heads=4),
        "heads = 4, no divisor of hidden_size = 30",
    ),
    "kv heads that do not divide": (
        of_sizes(kv_heads=2),
        "key_value_heads = 2, no divisor of num",
    ),
    "odd heads": (of_sizes(heads=2), "heads of 15 channels: no pairs to rotate"),
    "absurd layers": (of_sizes(layers=2**31 - 1), "it is cut short"),
    "absurd everything": (
        struct.pack("<7i", 2**30, 2**30, 2**31 - 1, 2, 1, 2**31 - 1, 2**31 - 1) + LEGACY[28:],
        "it is cut short",
    ),
    "group that does not divide": (
        patched(Q8_0, 37, "<i", 64),
        "groups of 64, no divisor of the 3030 values of model.embed_tokens.weight",
    ),
    "group of nothing": (patched(Q8_0, 37, "<i", 0), "says group_size = 0"),
    "negative group": (patched(Q8_0, 37, "<i", -15), "says group_size = -15"),
    "another group": (patched(Q8_0, 37, "<i", 30), "it is too long"),
    "flag of 2": (patched(V1, 36, "<B", 2), "whether the classifier is shared, is 2"),
    "unknown header field": (patched(V1, 100, "<i", 1), "values where zeros belong"),
}

SPECIAL = [(0.0, b"<unk>"), (0.0, b"\n<s>\n"), (0.0, b"\n</s>\n")]


def tokenizer_of(*entries: tuple[float, bytes], longest: int = 7) -> bytes:
    pieces = [struct.pack("<fi", score, len(text)) + text for score, text in entries]
    return struct.pack("<i", longest) + b"".join(pieces)


LETTERS = [(float(-n), chr(0x4E00 + n).encode()) for n in range(writer.VOCAB - 3)]
GOOD = tokenizer_of(*SPECIAL, *LETTERS)
TOKENIZERS = {
    "empty": ("t.bin", b"", "0 bytes are too few"),
    "cut in a piece": ("t.bin", GOOD[:-1], "it ends inside piece 100"),
    "cut in a size": ("t.bin", GOOD[: 4 + 8 + 5 + 6], "it ends inside piece 1"),
    "another vocabulary": ("t.bin", tokenizer_of(*SPECIAL), "has 3 pieces and the model 101"),
    "no BOS": ("t.bin", tokenizer_of(*SPECIAL[:1], *LETTERS), "wants <unk>, <s>, </s> as pieces"),
    "a piece twice": (
        "t.bin",
        tokenizer_of(*SPECIAL, *LETTERS[:-1], LETTERS[5]),
        "piece 100 ('\u4e05') is the same as piece 8",
    ),
    "a byte elsewhere": (
        "t.bin",
        tokenizer_of(*SPECIAL, *LETTERS[:-1], (0.0, b"<0x41>")),
        "piece 100 is <0x41>, which llama2.c has at 68",
    ),
    "a size of -1": ("t.bin", GOOD[:8] + b"\xff" * 4 + GOOD[12:], "piece 0 claims -1 bytes"),
    "a size too large": ("t.bin", b"\2" + GOOD[1:], "piece 0 claims 5 bytes (at most 2)"),
    "a score that is no number": (
        "t.bin",
        tokenizer_of(*SPECIAL, *LETTERS[:-1], (float("nan"), b"x")),
        "score nan",
    ),
    "no UTF-8": ("t.bin", tokenizer_of(*SPECIAL, *LETTERS[:-1], (0.0, b"\xff")), "can't decode"),
    "weights": ("t.bin", LEGACY, "not a tokenizer of llama2.c"),
    "llama2.c's as SentencePiece's": ("t.model", GOOD, "not a SentencePiece BPE model"),
    "an empty .model": ("t.model", b"", "its type is unigram"),
    "a .model cut short": ("t.model", b"\x0a\x0e\x0a\x05<unk>", "it ends too early"),
    "text as .model": ("t.model", b"Once upon a time", "not a SentencePiece BPE model"),
}


@pytest.mark.parametrize(("data", "reason"), MODELS.values(), ids=MODELS)
def test_models_that_are_not_what_they_say(tmp_path, data, reason):
    file = tmp_path / "model.bin"
    file.write_bytes(data)
    with pytest.raises(ImportFormatError) as caught:
        import_llama2c(file, tmp_path / "out")
    assert str(caught.value).startswith(f"{file}: not a model of llama2.c: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("name", "data", "reason"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_that_are_not_what_they_say(tmp_path, name, data, reason):
    (tmp_path / "model.bin").write_bytes(LEGACY)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImportFormatError) as caught:
        import_llama2c(tmp_path / "model.bin", tmp_path / "out", tokenizer=tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", name]


def test_the_tokenizer_that_the_broken_ones_are_made_of_is_good(tmp_path):
    (tmp_path / "model.bin").write_bytes(LEGACY)
    (tmp_path / "t.bin").write_bytes(GOOD)
    import_llama2c(tmp_path / "model.bin", tmp_path / "out", tokenizer=tmp_path / "t.bin")
    vocabulary = json.loads((tmp_path / "out" / "tokenizer.json").read_text("utf-8"))["model"]
    assert vocabulary["vocab"]["\u4e05"] == 8


@pytest.mark.parametrize("missing", ["model", "tokenizer"])
def test_a_file_that_is_not_there(tmp_path, missing):
    (tmp_path / "model.bin").write_bytes(LEGACY)
    file = tmp_path / ("none.bin" if missing == "model" else "model.bin")
    with pytest.raises(ImportFormatError, match=r"cannot read .*none\.bin: No such file"):
        import_llama2c(file, tmp_path / "out", tokenizer=tmp_path / "none.bin")
    with pytest.raises(ImportFormatError, match="Is a directory"):
        import_llama2c(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "model.bin").write_bytes(LEGACY)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for taken, reason in (
        (tmp_path / "out", "is not empty"),
        (tmp_path / "model.bin", "is not a folder"),
    ):
        with pytest.raises(ExportError, match=reason):
            import_llama2c(tmp_path / "model.bin", taken)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    assert (tmp_path / "model.bin").read_bytes() == LEGACY


def test_an_empty_folder_is_filled_and_stays_itself(tmp_path, monkeypatch):
    (tmp_path / "model.bin").write_bytes(LEGACY)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    import_llama2c(Path("../model.bin"), Path())
    assert sorted(str(path) for path in Path().iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    modes = {path.stat().st_mode for path in Path().iterdir()}
    assert len(modes) == 1  # weights are as readable as what describes them


@pytest.fixture
def small_files_only():
    """No file of this process may grow beyond 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("exists", [False, True])
def test_a_disk_that_refuses_leaves_nothing_behind(tmp_path, exists, request):
    (tmp_path / "model.bin").write_bytes(LEGACY)
    if exists:
        (tmp_path / "out").mkdir()
    request.getfixturevalue("small_files_only")
    with pytest.raises(ExportError, match=r"cannot write .*out: .*File too large"):
        import_llama2c(tmp_path / "model.bin", tmp_path / "out")
    left = ["model.bin", "out"] if exists else ["model.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert not exists or list((tmp_path / "out").iterdir()) == []
