"""Sides that strangers bring by `--port` and `--reference`: what can be said of them, and is."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from parity_tests.conftest import CheckpointMaker
from portkit.cli import main

PORTS = "parity_tests.harness.foreign_ports"
FILE = str(Path(__file__).with_name("foreign_ports.py"))


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: CheckpointMaker) -> str:
    return str(tiny_checkpoint("qwen3 yarn tempered", torch.bfloat16))


def parity(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as exit_:
        main(["parity", *arguments, "--json"])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, json.loads(capsys.readouterr().out)


def reasons(printed: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["reason"] for one in printed["not_verified"]}


def test_a_function_has_tokens_and_logits(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = parity(capsys, folder, "--port", f"{PORTS}:bare", "--quick")
    assert (code, printed["verdict"], printed["sites"]) == (0, "exact", 1)
    assert printed["generation"]["equal"]
    left_out = reasons(printed)
    assert left_out["the port: the same function"] == (
        "it cannot be asked in float64: it is no module whose parameters could be held"
    )
    assert left_out["where errors are made"].startswith("one side shows nothing but its logits")
    assert "model.layers.*.mlp: gate_proj, act_fn, up_proj, down_proj" in left_out


def test_of_a_function_the_floor_decides(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = parity(capsys, folder, "--port", f"{FILE}:scaled", "--quick")
    assert (code, printed["verdict"], printed["first"]["site"]) == (1, "diverged", "#logits")
    assert printed["first"]["function_error"] is None
    assert printed["first"]["local_error"] > 1.25 * printed["first"]["floor"] > 0


def test_a_function_has_the_points_that_it_records(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = parity(capsys, folder, "--port", f"{PORTS}:recording", "--quick")
    assert (code, printed["verdict"], printed["sites"]) == (0, "exact", 2)


def test_what_a_port_does_not_run_is_not_verified(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = parity(capsys, folder, "--port", f"{PORTS}:limited")
    assert (code, printed["verdict"]) == (3, "inconclusive")
    left_out = reasons(printed)
    assert left_out["pass padded"] == "the port does not run it: it takes no attention_mask"
    line = 'raise NotImplementedError("positions count from zero here")'
    assert re.fullmatch(
        "the port does not run it: it raised NotImplementedError: positions count from zero here "
        rf"\({re.escape(FILE)}, line \d+: {re.escape(line)}\)",
        left_out["pass far"],
    )
    stopped = [name for name, why in left_out.items() if why.endswith("it takes no cache")]
    assert stopped == ["pass decode.1, decode.2, decode.3 and 7 more", "generation"]
    assert [one["verdict"] for one in printed["comparisons"]] == ["exact"]
    code, printed = parity(capsys, folder, "--port", f"{PORTS}:limited", "--quick")
    assert (code, printed["verdict"]) == (0, "exact")  # nobody claimed that to be all


def test_logits_in_float32_are_compared_as_the_model_computes(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = parity(capsys, folder, "--port", f"{PORTS}:wide", "--quick")
    assert (code, printed["verdict"]) == (0, "exact")
    assert printed["notes"] == [
        f"{PORTS}:wide returned logits in float32; they were compared in bfloat16"
    ]


def test_a_fused_version_in_the_references_place_rounds_where_it_is_fused(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = parity(capsys, folder, "--reference", f"{PORTS}:fused")
    assert (code, printed["verdict"], printed["culprits"]) == (0, "rounding", [])
    (found,) = printed["comparisons"]
    assert found["rounding"] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
    ]
    left_out = reasons(printed)
    assert left_out["model.layers.*.mlp: gate_proj, up_proj"] == "the reference does not show it"
    code, _ = parity(capsys, folder, "--reference", f"{PORTS}:fused", "--quick", "--gate", "exact")
    assert code == 1


@pytest.mark.slow
def test_a_compiled_version_in_the_references_place_rounds_where_it_is_compiled(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = parity(capsys, folder, "--reference", f"{PORTS}:compiled")
    assert (code, printed["verdict"], printed["culprits"]) == (0, "rounding", [])
    assert printed["comparisons"][0]["rounding"] == ["model.layers.0.mlp"]


def test_a_reference_that_cannot_run_in_float64_leaves_the_truth_to_the_port(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = parity(capsys, folder, "--reference", f"{PORTS}:scaled", "--quick")
    assert "the truth is the port in float64: the reference cannot run in it" in printed["notes"]
    assert (code, printed["verdict"]) == (0, "rounding")  # ours is the nearer one
    port, reference = f"{PORTS}:bare", f"{PORTS}:scaled"
    code, printed = parity(capsys, folder, "--port", port, "--reference", reference, "--quick")
    assert (code, printed["verdict"]) == (3, "inconclusive")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "nowhere:load"], "there is no module nowhere in "),
        (["--port", f"{PORTS}.deeper:load"], f"no module {PORTS}.deeper in"),
        (["--port", "load"], "give module:factory, or path/to/file.py:factory"),
        (["--port", "nowhere/port.py:load"], "there is no file nowhere/port.py"),
        (["--port", f"{PORTS}:barre"], "has no barre; near: bare"),
        (["--port", f"{PORTS}:NO_FACTORY"], "NO_FACTORY is no function"),
        (["--port", "BROKEN:load"], "raised SyntaxError"),
        (["--port", f"{PORTS}:raises"], "raises raised KeyError: 'wq.weight' ("),
        (["--port", f"{PORTS}:leaves"], "leaves raised SystemExit: 0 ("),
        (["--port", f"{PORTS}:always_leaves"], "it raised SystemExit: 0 ("),
        (["--port", f"{PORTS}:no_callable"], "no_callable returned dict"),
        (["--port", f"{PORTS}:other_dtype"], "asked for bfloat16 and returned a model in float16"),
        (
            ["--port", f"{PORTS}:other_arguments"],
            "sin may be anything: say it in a line of the table of pairs (--sites)",
        ),
        (["--port", f"{PORTS}:wrong_shape"], "where [2, 12, 509] (batch, tokens, vocab_size)"),
        (["--port", f"{PORTS}:wrong_type"], "returned a list in the pass prompt"),
        (["--port", f"{PORTS}:whole_numbers"], "logits in torch.int64"),
        (["--port", f"{PORTS}:always_raises"], "IndexError: index 7 is out of range"),
        (["--port", f"{PORTS}:in_place"], "changed its positions in place in the pass prompt"),
        (["--port", f"{PORTS}:forgetful"], "given a cache in the pass decode.1 and returned none"),
        (
            ["--port", f"{PORTS}:misspelling"],
            "records '#qurey' in no module that stands for",
        ),
        (["--reference", f"{PORTS}:raises"], "raises raised KeyError"),
        (["--reference", "FILE:x"], "is a file: give module:factory, or a"),
        (["--sites", "FILE:a = b"], "--sites goes with --port or --reference"),
        (
            ["--port", f"{PORTS}:fused", "--sites", "nowhere"],
            "nowhere with its site pairs cannot be read",
        ),
        (["--port", f"{PORTS}:bare", "--sites", "FILE:a b"], "'a b' is no pair: write PORT = SITE"),
        (["--port", f"{PORTS}:bare", "--sites", "FILE:a = model.norm"], "port has no module a"),
        (["--port", f"{PORTS}:bare", "--sites", "FILE:{a = b"], "site pairs: template '{a'"),
    ],
    ids=lambda given: " ".join(given)[-40:] if isinstance(given, list) else "",
)
def test_bad_input_is_one_clear_line(
    arguments: list[str],
    said: str,
    folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken.py").write_text("def load(:\n")
    (tmp_path / "file").write_text(arguments[-1].removeprefix("FILE:"))
    given = [
        str(tmp_path / "file")
        if one.startswith("FILE:")
        else one.replace("BROKEN", str(tmp_path / "broken.py"))
        for one in arguments
    ]
    with pytest.raises(SystemExit) as exit_:
        main(["parity", folder, "--quick", *given])
    printed = capsys.readouterr()
    assert exit_.value.code == 2, printed
    assert printed.out == ""
    assert printed.err.startswith("portkit: error: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err


EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "somebodys_gemma.py"
DEMO = str(Path(__file__).resolve().parents[2] / "portkit" / "demo_checkpoint")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("blocks.{layer}.atn = model.norm", "near: blocks.{layer}.attn"),
        (
            "blocks.{layer}.ffn = model.layers.{layer}.mpl",
            "no site model.layers.0.mpl; near: model.layers.{layer}.mlp",
        ),
        ("blocks.{layer}.ffn = model.layers.{l}.mlp", "{l} stands on the right alone"),
        ("wte = model.layers.99.mlp", "the reference has no site model.layers.99.mlp"),
        ("blocks.{layer}.ffn = model.norm", "model.norm is both blocks.0.ffn and blocks.1.ffn"),
        ("wte = model.norm\nwte = model.embed_tokens", "two lines name wte"),
        ("wte = model.embed_tokens [batch channel]", "the dimensions of model.embed_tokens are"),
        (
            "blocks.{layer} = model.layers.{layer}\n"
            "blocks.{layer}.attn = model.layers.{layer}.self_attn\n"
            "blocks.{layer}.ffn.w_out = model.layers.{layer}.mlp.{p=gate|up}_proj",
            "do not lie side by side in 160 channels",
        ),
    ],
)
def test_pairs_that_match_nothing(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs").write_text(line)
    port = ["--port", f"{EXAMPLE}:load", "--sites", str(tmp_path / "pairs")]
    with pytest.raises(SystemExit) as exit_:
        main(["parity", DEMO, "--quick", *port])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert said in error
    assert error.count("\n") == 1


def test_modules_are_found_from_the_current_folder(
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "my_port.py").write_text(f"from {PORTS} import bare as load\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    code, printed = parity(capsys, folder, "--port", "my_port:load", "--quick")
    assert (code, printed["verdict"]) == (0, "exact")


def test_a_misspelt_point_is_near_what_was_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(EXAMPLE).read_text().replace('"#context"', '"#contxt"')
    (tmp_path / "port.py").write_text(text)
    pairs = str(EXAMPLE.with_suffix(".sites"))
    with pytest.raises(SystemExit) as exit_:
        main(["parity", DEMO, "--quick", "--port", f"{tmp_path}/port.py:load", "--sites", pairs])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "records '#contxt' within model.layers.0.self_attn, and there is no such" in error
    assert "near: #context" in error


def test_a_recording_in_the_references_place(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = str(tmp_path / "recorded.safetensors")
    with pytest.raises(SystemExit):
        main(["record", folder, "--quick", "--out", trace])
    capsys.readouterr()
    code, printed = parity(capsys, folder, "--reference", trace)
    assert (code, printed["verdict"]) == (0, "exact")
    with pytest.raises(SystemExit) as exit_:
        main(["parity", folder, "--reference", trace, "--quick"])
    assert exit_.value.code == 2
    assert "leave --quick out" in capsys.readouterr().err
