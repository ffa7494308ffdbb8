"""Foreign words reach terminal, JSON and files in characters that are printable, on their line."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import portkit
from portkit.cli import main, output
from portkit.columns import table
from portkit.layout import write_json
from portkit.shown import as_json, prose, shown
from portkit.training.journal import Journal, read_lines

SPELLED = {
    "plain Übergröße 模型 🙂": "plain Übergröße 模型 🙂",
    "\x1b]0;title\x07\x9b31m": r"\x1b]0;title\x07\x9b31m",
    "a\nportkit: forged\r\x0b\x85\u2028\u2029": r"a\nportkit: forged\r\x0b\x85\u2028\u2029",
    "\u202egnp.exe\u2066\u200b\ufeff": r"\u202egnp.exe\u2066\u200b\ufeff",
    "\x00\ud800\udfff\ufffe\uffff\U000e0041": r"\x00\ud800\udfff\ufffe\uffff\U000e0041",
}
FOREIGN = "".join(SPELLED)


@pytest.mark.parametrize("text", SPELLED, ids=ascii)
def test_what_is_not_printable_is_spelled(text: str) -> None:
    assert shown(text) == SPELLED[text]
    assert table([("a", "b"), (text, "c")]).count("\n") == 1
    assert table([(text,)]) == SPELLED[text]


def test_every_character_there_is() -> None:
    all_of_them = "".join(map(chr, range(0x110000)))
    assert shown(all_of_them).isprintable()
    written = as_json([all_of_them])
    assert written.isprintable()
    (read,) = json.loads(written)
    assert read.replace(r"\ud8", "").encode(), "no half of a pair is left"
    halves = "".join(map(chr, range(0xD800, 0xE000)))
    assert read == all_of_them.replace(halves, "".join(ascii(one)[1:-1] for one in halves))


def test_json_keeps_its_values_and_its_lines() -> None:
    value = {"a\u2028\x7f": ["\x1b[0m", "é\U000e0041", 1.5, None], "b": {"\\": '"'}}
    assert json.loads(as_json(value)) == value
    assert as_json(value).isprintable()
    indented = as_json(value, indent=2)
    assert json.loads(indented) == value
    assert indented.count("\n") == json.dumps(value, indent=2).count("\n")
    assert as_json("\ud800") == r'"\\ud800"'
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_json(float("nan"))


def test_what_a_model_says_keeps_its_lines_and_joiners() -> None:
    said = "one\n\ttwo 👩\u200d🚀 \u200f\x1b[2J\x9b\r\u202e"
    assert prose(said) == "one\n\ttwo 👩\u200d🚀 \u200f\\x1b[2J\\x9b\\r\\u202e"


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model_type = "\x1b[2J\nportkit: exact\u202e\ud800"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", str(tmp_path)])
    said = capsys.readouterr().err
    assert exit_.value.code == 2
    assert said.removesuffix("\n").isprintable()
    assert r"\x1b[2J" in said
    assert r"\u202e\ud800" in said


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    """A path of bytes that are not UTF-8, as old archives hold them."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9\n\x1b[31m"
    command = [os.fsencode(sys.executable), b"-m", b"portkit"]
    done = subprocess.run(
        [*command, b"export", folder, folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    source = os.fsencode(Path(portkit.__file__).parent / "demo_checkpoint")
    for option in ([], [b"--json"]):
        target = folder + str(len(option)).encode()
        done = subprocess.run(
            [*command, b"export", source, target, *option], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.removesuffix("\n").isprintable()
        assert "caf\\" in done.stdout


def test_what_is_streamed_is_exact_in_a_pipe_and_harmless_on_a_terminal() -> None:
    code = "from portkit.cli.output import say_more; say_more('a\\x1b[2Jb\\u202e\\n')"
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert piped.stdout == "a\x1b[2Jb\u202e\n".encode()
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=theirs, check=True)
    os.close(theirs)
    assert os.read(ours, 100) == b"a\\x1b[2Jb\\u202e\r\n"
    os.close(ours)


def test_files_of_a_run_and_a_checkpoint(tmp_path: Path) -> None:
    """A line stays a line: a reader that splits at what Unicode calls one loses none."""
    journal = Journal(tmp_path, 0)
    records = [{"event": "sample", "step": 1, "text": f"a\u2028b\x85{n}"} for n in range(2)]
    for record in records:
        journal.write(record)
    journal.close()
    assert read_lines(tmp_path) == records
    write_json(tmp_path, "config.json", {"architectures": [FOREIGN]})
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.splitlines())
    assert json.loads(text)["architectures"][0].startswith(FOREIGN.partition("\ud800")[0])


def test_a_line_for_people_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    output.say(FOREIGN)
    output.say(FOREIGN, aside=True)
    expected = "".join(SPELLED.values()) + "\n"
    assert capsys.readouterr() == (expected, expected)
