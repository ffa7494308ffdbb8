"""What a file may cost: time, memory and others' exceptions end in one line, exit 2, in time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parity_tests.engine.damage import CONFIG, CONFIGS, WEIGHTS, header_bytes, write_checkpoint
from parity_tests.engine.hub_server import NOWHERE, environment
from parity_tests.generation.specimens import write_tokenizer
from portkit import cli
from portkit.checkpoint import Checkpoint, LocalFiles
from portkit.confined import Confined, Exhausted
from portkit.errors import CheckpointError, InvalidConfig, Mismatch, TokenizerError
from portkit.generation.chat import ChatTemplate
from portkit.generation.settings import GenerationSettings
from portkit.json_reading import parse_object
from portkit.loading import draw
from portkit.parity.probes.probe import from_json
from portkit.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint", CONFIGS["llama"])
    return tmp_path / "checkpoint"


def header_of(entries: dict[str, Any], folder: Path) -> None:
    header_bytes(json.dumps(entries).encode())(folder)


def test_a_shape_of_thousands_of_sizes_is_not_multiplied(folder: Path) -> None:
    """1.6 MB of header took half a minute."""
    shape = {"dtype": "F32", "shape": [2**62] * 80_000, "data_offsets": [0, 4]}
    header_of({"a": shape}, folder)
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"a of shape .* cannot lie from byte 0 to 4"):
        _ = Checkpoint(LocalFiles(folder)).tensors
    assert time.process_time() - started < 3


def test_tensors_are_counted_before_they_are_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portkit.checkpoint._MAX_TENSORS", 5)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} lists \d+ tensors and 5 are read"):
        _ = Checkpoint(LocalFiles(folder)).tensors


def test_shards_are_counted_and_their_headers_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {f"t{i}": f"part-{i}.safetensors" for i in range(5000)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="names 5,000 files and 4,096 are read at most"):
        _ = Checkpoint(LocalFiles(tmp_path)).tensors
    # The same file under many names, and its header each time.
    write_checkpoint(tmp_path / "whole", CONFIGS["llama"])
    shards = {f"t{i}": f"{'./' * i}model.safetensors" for i in range(20)}
    index = tmp_path / "whole" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    (tmp_path / "whole" / WEIGHTS).rename(tmp_path / "whole" / "part")
    monkeypatch.setattr("portkit.checkpoint.MAX_BYTES", 100)
    (tmp_path / "whole" / "part").rename(tmp_path / "whole" / "model-1.safetensors")
    index.write_text(json.dumps({"weight_map": {"t": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"announces|headers up to model-1.safetensors have"):
        _ = Checkpoint(LocalFiles(tmp_path / "whole")).tensors


@pytest.mark.parametrize("num_layers", [10**9, 4096])
def test_layers_that_are_not_there_are_not_built(num_layers: int, folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text()) | {"num_hidden_layers": num_layers}
    (folder / CONFIG).write_text(json.dumps(config))
    said = (
        "num_hidden_layers must be between 1 and 4096, not 1000000000"
        if num_layers > 4096
        else "4096 layers and only 21 tensors"
    )
    started = time.process_time()
    with pytest.raises((InvalidConfig, Mismatch), match=said):
        draw(Checkpoint(LocalFiles(folder)))
    (folder / WEIGHTS).unlink()
    with pytest.raises(InvalidConfig, match="num_hidden_layers"):
        draw(Checkpoint(LocalFiles(folder)))
    assert time.process_time() - started < 3


def test_a_plan_is_not_longer_than_it_is_read(tmp_path: Path) -> None:
    """Layers times experts that only the config claims."""
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, CONFIGS["qwen3_moe"])
    config = json.loads((folder / CONFIG).read_text())
    config |= {"num_hidden_layers": 15, "num_experts": 4096, "mlp_only_layers": []}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(Mismatch, match=r"1\d{4} missing: "):  # of 184,320
        _ = draw(Checkpoint(LocalFiles(folder))).plan


def test_a_chain_of_thousands_of_passes_is_linear() -> None:
    passes = [
        {
            "name": f"p{i}",
            "continues": f"p{i - 1}" if i else None,
            "input_ids": [[1]],
            "positions": [[i]],
        }
        for i in range(5000)
    ]
    probe = from_json({"name": "long", "passes": passes})
    started = time.process_time()
    assert probe.longest == 5000
    assert [probe.past(one) for one in probe] == [*range(5000)]
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"[" * 100_000, "nests more than 64 levels deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nests more than 64 levels deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"a": "\xff"}', "is not UTF-8 text"),
        (b'{"a": 1, "a": 2}', "holds a twice"),
        (b"[1]", "must be a JSON object, not list"),
        (b"", "is not JSON"),
    ],
)
def test_one_reader_of_json(raw: bytes, said: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        parse_object(raw, "it", TokenizerError)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_json_is_read_as() -> None:
    deep = b'{"a":' * 63 + b"{}" + b"}" * 63
    assert parse_object(b'\xef\xbb\xbf{"a": [1.5, "\xc3\xa9"]}', "it", ValueError) == {
        "a": [1.5, "\N{LATIN SMALL LETTER E WITH ACUTE}"]
    }
    assert parse_object(deep, "it", ValueError)["a"]


def test_a_small_file_has_a_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portkit.json_reading.MAX_FILE_BYTES", 50)
    with pytest.raises(InvalidConfig, match=r"config.json is larger than 50 bytes"):
        _ = Checkpoint(LocalFiles(folder)).config


@pytest.mark.parametrize("key", ["temperature", "top_k", "eos_token_id", "do_sample"])
@pytest.mark.parametrize("value", [10**400, [], {}, "x"])
def test_numbers_and_lists_where_none_is_due(key: str, value: object, tmp_path: Path) -> None:
    given = {"do_sample": True, key: value}
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    if (key, value) == ("eos_token_id", []):
        assert GenerationSettings.read(LocalFiles(tmp_path)).eos_token_ids == ()
        return
    with pytest.raises(Exception, match=key) as caught:
        GenerationSettings.read(LocalFiles(tmp_path))
    assert type(caught.value).__name__ == "GenerationError"
    assert len(str(caught.value)) < 400


# -- the child that runs what came with a checkpoint --------------------------------------------


def tokenizer_with(folder: Path, **parts: Any) -> Tokenizer:
    write_tokenizer(folder, "byte_level")
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))
    return Tokenizer.open(LocalFiles(folder))


def test_a_tokenizer_that_doubles_a_text_forty_times(tmp_path: Path) -> None:
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    normalizer = {"type": "Sequence", "normalizers": [double] * 40}
    tokenizer = tokenizer_with(tmp_path, normalizer=normalizer)
    with pytest.raises(TokenizerError, match="cannot encode the text: it ran out of the"):
        tokenizer.encode("a")
    assert tokenizer.encode("b") == tokenizer.encode("b")  # in another child
    assert len(tokenizer.encode("b")) >= 1


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "time"),
        ("{{ 'a' * 10 ** 12 }}", "memory"),
        ("{{ '%999999999999d' % 1 }}", "ran out of|Error"),
        ("{{ 2 ** (2 ** 40) }}", "ran out of|Error"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ ''.__class__ }}", "SecurityError"),
    ],
)
def test_a_chat_template_without_end(template: str, said: str) -> None:
    chat = ChatTemplate({"default": template}, {})
    started = time.monotonic()
    with pytest.raises(TokenizerError, match=said) as caught:
        chat.render([{"role": "user", "content": "x"}])
    assert len(str(caught.value).splitlines()) == 1
    assert time.monotonic() - started < 100  # of a machine that does something else as well
    again = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    assert again.render([{"role": "user", "content": "x"}]) == "x"


def test_a_child_that_ends_by_itself_is_said_and_followed_by_another() -> None:
    child = Confined("parity_tests.engine.ending")
    assert child.ask({"say": "x"}) == "x"
    with pytest.raises(Exhausted, match="it ended by itself, with 7"):
        child.ask({"end": 7})
    assert child.ask({"say": "y"}) == "y"
    child.close()
    assert not child.is_running


# -- the command ---------------------------------------------------------------------------------


class Panic(BaseException):
    """As of libraries in Rust: no `Exception`."""


@pytest.mark.parametrize("raised", [Panic("at the disco"), SystemExit(1), RecursionError()])
def test_whatever_escapes_is_an_internal_error(
    raised: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def escape(**_: object) -> None:
        raise raised

    monkeypatch.setattr(cli, "app", escape)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as exit_:
        cli.main([])
    said = capsys.readouterr().err
    assert exit_.value.code == 70
    assert said.startswith("portkit: error: this is a fault of portkit itself (")
    assert len(said.splitlines()) == 1
    assert len([*tmp_path.iterdir()]) == 1


def test_a_traceback_that_cannot_be_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def escape(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", escape)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit) as exit_:
        cli.main([])
    assert exit_.value.code == 70
    assert "the traceback could not be kept (No such file or directory)" in capsys.readouterr().err


Shell = Callable[[str, Path], "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("generate {folder} -p - <&-", "reads standard input, which is closed"),
        (r"generate {folder} -p - < {folder}/model.safetensors", "not UTF-8"),
        ("load ''", ". has no config.json"),
        ("load {folder} --export ''", ""),
        ("diff '' ''", "no file"),
        ("train '' --data '' --out ''", ""),
    ],
)
def test_closed_and_empty(arguments: str, said: str, folder: Path, tmp_path: Path) -> None:
    write_tokenizer(folder, "byte_level")
    command = arguments.format(folder=folder)
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m portkit {command}"],
        env=environment(NOWHERE, tmp_path / "home", PYTHONUTF8="1", HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("portkit: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
