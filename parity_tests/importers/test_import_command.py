"""`portkit import`, as a person and as a program reads it."""

from __future__ import annotations

import json

import pytest

from parity_tests.importers import llama2c_writer as writer
from portkit.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `portkit import` with these arguments."""
    with pytest.raises(SystemExit) as exit_:
        main(["import", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out, captured.err


def test_lines(capsys, tmp_path):
    file, folder = tmp_path / "model.bin", tmp_path / "out"
    file.write_bytes(writer.versioned("q8_0", tied=False).data)
    code, out, err = run(capsys, "llama2c", file, folder)
    assert (code, err) == (0, "")
    parameters = sum(
        tensor.numel() for tensor in writer.versioned("q8_0", tied=False).expected.values()
    )
    assert out.splitlines() == [
        f"read   {file}: llama2c q8_0, {parameters:,} parameters, 11 layers, untied head",
        f"wrote  {folder}: 102 tensors, {4 * parameters / 1000:.1f} kB in float32, no tokenizer",
        f"next   portkit load {folder} (for text, import again with --tokenizer FILE)",
    ]


def test_json(capsys, tmp_path):
    file, folder = tmp_path / "model.bin", tmp_path / "out"
    written = writer.legacy(tied=True, rotary_base=1e6)
    file.write_bytes(written.data)
    code, out, err = run(capsys, "llama2c", file, folder, "--json")
    answer = json.loads(out)
    assert answer.pop("versions").keys() >= {"python", "portkit", "torch", "safetensors"}
    parameters = sum(tensor.numel() for tensor in written.expected.values())
    assert answer == {
        "format": 1,
        "command": "import",
        "model_type": "llama",
        "parameters": parameters,
        "tensors": 101,
        "bytes": 4 * parameters,
        "source_format": "legacy",
        "tokenizer": None,
        "directory": str(folder),
    }
    assert code == 0
    assert err.splitlines() == [
        "portkit: note: the rotary base 1000000 is read off the file's tables (llama2.c itself "
        "takes 10000; --rope-theta gives another)"
    ]


def test_a_real_checkpoint_with_its_tokenizer(capsys, tmp_path, data_folder):
    source = data_folder / "weights" / "stories260K"
    tokenizer, folder = source / "tok512.bin", tmp_path / "out"
    code, out, err = run(
        capsys, "llama2c", source / "stories260K.bin", folder, "--tokenizer", tokenizer
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == [
        f"wrote  {folder}: 47 tensors, 1.0 MB in float32, tokenizer of 512 pieces",
        f'next   portkit generate {folder} -p "Once upon a time"',
    ]


def test_errors_are_one_line(capsys, tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"GGUF" + bytes(1000))
    for arguments in (["llama2c", file, tmp_path / "out"], ["gguf", file, tmp_path / "out"]):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert err.startswith("portkit: error: ")
    assert list(tmp_path.iterdir()) == [file]
