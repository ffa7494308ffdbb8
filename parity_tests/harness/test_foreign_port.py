"""The example port of the documents, which portkit did not write, taken through `--port`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from portkit.cli import main

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "portkit" / "demo_checkpoint")
EXAMPLE = ROOT / "docs" / "examples" / "somebodys_gemma.py"
PAIRS = EXAMPLE.with_suffix(".sites")


def parity(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as exit_:
        main(["parity", DEMO, *arguments, "--json"])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, json.loads(capsys.readouterr().out)


def test_the_table_has_at_most_ten_lines() -> None:
    lines = [one for one in PAIRS.read_text().splitlines() if one and not one.startswith("#")]
    assert 0 < len(lines) <= 10


def test_the_example_rounds_where_it_packs_no_heads_and_is_exact_elsewhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where a decode step has a mask the reference packs heads into their group, it does not."""
    port = ["--port", f"{EXAMPLE}:load", "--sites", str(PAIRS), "--dtype", "float32"]
    code, printed = parity(capsys, *port)
    assert (code, printed["verdict"], printed["culprits"]) == (0, "rounding", [])
    in_float32, in_bfloat16 = printed["comparisons"]
    assert in_float32["rounding"]
    rounding = [*in_float32["rounding"], *in_bfloat16["rounding"]]
    assert all(one.endswith("self_attn#context") for one in rounding)
    assert in_float32["sites"] == in_bfloat16["sites"] > 190
    assert printed["generation"]["equal"]
    names = [one["name"] for one in printed["not_verified"]]
    assert not [one for one in names if "same function" in one], names
    # The example's activation is no module: of all sites in the layers the only one not shown.
    assert [one for one in names if "layers" in one] == ["model.layers.*.mlp: act_fn"]
