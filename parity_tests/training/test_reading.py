"""Training text that is no plain text: read as what it is, or refused by its name."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from parity_tests.training.test_texts import documents
from portkit.cli import main
from portkit.errors import DataError
from portkit.training.texts import find_texts

STORIES = ["Once, there was a cat.", 'She said:\n"Ü!"', "A third {one}, [and] more;\tso."]
RECORDS = [{"id": number, "text": story} for number, story in enumerate(STORIES)]


def as_csv(delimiter: str = ",") -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return file.getvalue()


READ = {
    "a.txt": "<|endoftext|>".join(STORIES),
    "a.jsonl": "\n".join(map(json.dumps, RECORDS)) + "\n\n",
    "A.NDJSON": "\n".join(json.dumps(one, ensure_ascii=False) for one in RECORDS),
    "strings.jsonl": "\n".join(map(json.dumps, STORIES)),
    "list.json": json.dumps(RECORDS, indent=2),
    "strings.json": json.dumps(STORIES),
    "columns.json": json.dumps({"id": [0, 1, 2], "text": STORIES}),
    "lines.json": "\n".join(map(json.dumps, RECORDS)),
    "a.csv": as_csv(),
    "a.tsv": as_csv("\t"),
    "nulls.jsonl": "\n".join(map(json.dumps, [RECORDS[0], {"text": None}, *RECORDS[1:]])),
    "with the separator.jsonl": json.dumps({"text": "<|endoftext|>".join(STORIES)}),
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "gzip"])
@pytest.mark.parametrize("name", READ)
def test_the_same_documents(name: str, packed: bool, mark: bytes, tmp_path: Path) -> None:
    content = mark + READ[name].encode()
    file = tmp_path / (name + ".gz" * packed)
    file.write_bytes(gzip.compress(content) if packed else content)
    assert documents(file) == STORIES


def test_another_key(tmp_path: Path) -> None:
    for name, content in READ.items():
        if name not in ("a.txt", "strings.jsonl", "strings.json"):
            file = tmp_path / name
            file.write_text(content.replace("text", "story", 1 if name[-3:] in "csv tsv" else -1))
            if "separator" not in name:
                assert list(find_texts(str(file), "story")[0].documents()) == STORIES
            with pytest.raises(DataError, match=r"has no (column )?text.*--text-key \(.*story"):
                find_texts(str(file))[0].survey()


def packed_folder() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"Once."))
    return file.getvalue()


LINES = READ["a.jsonl"].encode()
REFUSED = {
    "a.parquet": (b"PAR1\x15\4", "is Parquet: write it as JSON Lines first: python -c"),
    "renamed.txt": (b"PAR1\x15\4", "is Parquet"),
    "a.arrow": (b"ARROW1\0\0", "is Arrow: write it as JSON Lines first"),
    "a.zip": (b"PK\3\4\x14\0", "is a zip archive: unpack it"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd\4", "is compressed by zstd: unpack it"),
    "a.xz": (b"\xfd7zXZ\0\0", "is compressed by xz"),
    "a.bz2": (b"BZh91AY", "is compressed by bzip2"),
    "a.tar.gz": (packed_folder(), "has zero bytes, and no text has"),
    "cut.txt.gz": (gzip.compress(b"Once." * 100)[:-9], "is a damaged gzip file"),
    "data": (LINES, "begins with JSON: name it .json or .jsonl, or .txt to train on it"),
    "a.dat": (b"[\n" + LINES, "begins with JSON"),
    "a.jsonl": (LINES + b"{", "is not JSON Lines: line 5 is not JSON"),
    "a.json": (b"[{]", "as a whole is not JSON ("),
    "deep.json": (b"[" * 200_000, "as a whole nests more than 64 levels deep; fetch it"),
    "one record twice.json": (b'{"text": "a"} {"text": "b"}', "is not JSON (Extra data"),
    "a key twice.jsonl": (b'{"text": "a", "text": "b"}', "line 1 holds text twice; fetch it again"),
    "number.json": (b"[3]", "has no text in record 1: it is neither an object nor a string"),
    "a list.jsonl": (b'{"text": ["a"]}', 'has no text under text in line 1, but ["a"]: give'),
    "chat.jsonl": (b'{"messages": []}', "has no text in line 1: name the text with --text-key (m"),
    "a.csv": (b"id,story\n1,Once", "has no column text: name the text with --text-key (id, story)"),
    "short.csv": (b"id,text\n1,a\n2", "ends before its column text in line 3"),
    "utf16.txt": ("Once".encode("utf-16"), "is not UTF-8"),
    "nulls.jsonl": (b'{"text": null}', "holds no text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, said = REFUSED[name]
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        find_texts(str(file))[0].survey()
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_a_long_field_of_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 300_000)
    assert list(map(len, documents(tmp_path / "a.csv"))) == [300_000]


def test_a_folder_gives_its_text_or_else_its_records(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(READ["a.jsonl"])
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(READ["a.csv"].encode()))
    (tmp_path / "readme.md").write_text("not this")
    assert documents(tmp_path) == STORIES * 2
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"Plain."))
    assert documents(tmp_path) == ["Plain."]


def test_training_on_records_is_training_on_their_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same model, to the last bit; a byte order mark is no character of its tokenizer."""
    stories = [f"{number} cats sat on {number * 7} mats." for number in range(40)]
    (tmp_path / "plain.txt").write_text("<|endoftext|>".join(stories))
    lines = "\n".join(json.dumps({"story": one, "id": 3}) for one in stories)
    (tmp_path / "lines.jsonl").write_text(f"\ufeff{lines}", encoding="utf-8")
    made = []
    for name, more in {"plain.txt": [], "lines.jsonl": ["--text-key", "story"]}.items():
        out = tmp_path / f"run of {name}"
        sizes = [
            "--steps",
            "2",
            "--batch-size",
            "2",
            "--context",
            "32",
            "--tokenizer",
            "characters",
        ]
        data = ["--data", str(tmp_path / name), "--out", str(out)]
        assert code_of("train", "llama-1m", *data, *sizes, *more) == 0
        made.append((out / "model" / "model.safetensors").read_bytes())
    assert made[0] == made[1]
    capsys.readouterr()
    data = ["--data", str(tmp_path / "plain.txt"), "--out", str(tmp_path / "run")]
    assert code_of("train", "llama-1m", *data, "--steps", "2", "--text-key", "story") == 2
    assert "--text-key story: plain text has no keys" in capsys.readouterr().err


def code_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    return int(exit_.value.code or 0)
