"""The page about ports of one's own: its commands run as written, its code too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from portkit.parity.sides.pairs import SitePairs
from portkit.parity.sides.sites import SiteTable

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "your-own-port.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "docs" / "examples"
DEMO = ROOT / "portkit" / "demo_checkpoint"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", blocks("sh"))
def test_the_commands_run(block: str, tmp_path: Path) -> None:
    run = f'python() {{ "{sys.executable}" "$@"; }}\nportkit() {{ python -m portkit "$@"; }}'
    script = f"set -euo pipefail\n{run}\n{block}"
    environment = {**os.environ, "EXAMPLES": str(EXAMPLES)}
    command = ["bash", "-c", script]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert re.match("(exact|rounding): ", done.stdout)
    if "broken.py" in block:
        (promised,) = blocks("text")
        assert set(promised.splitlines()) <= set(done.stdout.splitlines()), done.stdout


def test_the_code_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"REPO": str(DEMO), "query": torch.ones(2)}
    for block in blocks("python"):
        exec(compile(block, "your-own-port.md", "exec"), names)
    assert torch.equal(names["query"], torch.ones(2))
    assert capsys.readouterr().out == "exact []\n"
    assert (tmp_path / "report" / "report.html").is_file()
    from portkit.parity import assert_parity

    names["test_port"](assert_parity)


def test_the_table_is_one() -> None:
    lines = re.findall(r"^blocks\..*$", PAGE, flags=re.MULTILINE)
    modules = ["blocks.3.attn.wo", "blocks.3.attn.wqkv", "blocks.3.attn.norm"]
    attention = "model.layers.3.self_attn"
    known = [attention, *(f"{attention}.{part}_proj" for part in "qkvo"), f"{attention}.q_norm"]
    dims = dict.fromkeys(known, "batch position channel")
    dims[f"{attention}.q_norm"] = "batch position head channel"
    found = SitePairs("\n".join(lines)).laid_over(modules, SiteTable(dims), known)
    assert {name: pair.sites for name, pair in found.items()} == {
        modules[0]: (f"{attention}.o_proj",),
        modules[1]: tuple(f"{attention}.{part}_proj" for part in "qkv"),
        modules[2]: (f"{attention}.q_norm",),
    }
    assert found[modules[2]].dims == ("batch", "position", "head", "channel")


def test_what_it_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / target).is_file(), target
