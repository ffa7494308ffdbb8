"""The README's table is what was saved, and what was saved is of the faults that are planted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from parity_tests.faults.everyday import GATES, passed
from parity_tests.faults.planted import PLANTINGS
from portkit.parity.faults.catalogue import CATALOGUE
from portkit.parity.probes.probe import Probe, chain

ROOT = Path(__file__).resolve().parents[2]
SAVED = json.loads((ROOT / "docs" / "gates.json").read_text(encoding="utf-8"))


def test_the_readme_has_the_figures_that_were_saved() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- gates")[2].partition("<!-- /gates -->")[0]
    rows = re.findall(r"^\| (.+?) \| (\d.*) \| (yes|no) \|$", table, flags=re.MULTILINE)
    models = SAVED["models"].values()
    assert [name for name, _, __ in rows] == SAVED["gates"]
    for name, counts, refuses in rows:
        assert counts.split(" | ") == [
            f"{len(one['lets_through'][name][probe])} of {len(one['planted'])}"
            for one in models
            for probe in ("six", "default")
        ]
        assert (refuses == "yes") == any(one["refuses_a_right_port"][name] for one in models)


def test_what_was_saved_is_of_the_faults_that_there_are() -> None:
    names = {one.name for one in PLANTINGS}
    for one in SAVED["models"].values():
        assert {*one["planted"]} <= names
        assert one["lets_through"]["`portkit parity`"]["default"] == []


def test_each_gate_says_yes_and_no() -> None:
    """Of logits that are another's times so much, plus so much in one place."""
    probe = Probe("one", tuple(chain("one", torch.zeros(2, 3, dtype=torch.long), [3])))
    theirs = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) + 5
    close, tight = 1 + 5e-4, 1 + 5e-5
    *loose, relative, _allclose = GATES
    assert [*passed(probe, [theirs], [theirs])] == [*GATES]
    assert [*passed(probe, [theirs * tight], [theirs])] == [*GATES]
    assert [*passed(probe, [theirs * close], [theirs])] == [*loose, relative]
    assert [*passed(probe, [theirs * 1.05], [theirs])] == loose
    assert [*passed(probe, [theirs * 1.2], [theirs])] == loose[:2]
    assert [*passed(probe, [-theirs], [theirs])] == []


def test_the_page_of_faults_has_every_one_of_the_catalogue() -> None:
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    listed = re.findall(
        r"^\| (\w+\.\w+) \| .+ \| .+ \|$", page.partition("## The catalogue")[2], re.M
    )
    assert listed == [one.id for one in CATALOGUE]
    assert "not explained yet" not in page
    assert "not caught" not in page
