"""What `portkit parity --out` writes: complete, true to the result, and closed to the outside."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from parity_tests.conftest import CheckpointMaker
from parity_tests.harness.conftest import CULPRIT, asked
from portkit.cli import main
from portkit.errors import ReportError
from portkit.parity.judging.judge import Verdict
from portkit.parity.judging.ledger import SiteAccount
from portkit.parity.reports import report
from portkit.parity.result import NotVerified, ParityResult

NASTY = "<script>alert('|`x`')</script>\x00\x1b[2J\n\u202e\u2028\ufffe\ud800"
SPELLED = r"<script>alert('|`x`')</script>\x00\x1b[2J\n\u202e\u2028\ufffe\ud800"


class Page(HTMLParser):
    """A page's words, its tags with their attributes, and the cells of its maps."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.words += [data.strip()] if data.strip() else []

    @property
    def cells(self) -> Iterator[tuple[list[str], str]]:
        for tag, attributes in self.tags:
            if tag == "td" and "title" in attributes:
                yield (attributes["class"] or "").split(), attributes["title"] or ""


@pytest.fixture(scope="module")
def written(diverged: ParityResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "report.html").write_text("of an earlier run")
    (folder / "mine.txt").write_text("kept")
    report.write(folder, diverged, asked(diverged))
    files = {"report.html", "parity.json", "junit.xml", "summary.md", "mine.txt"}
    assert {one.name for one in folder.iterdir()} == files
    return folder


def test_the_page_has_every_site_in_its_place(diverged: ParityResult, written: Path) -> None:
    page = Page((written / "report.html").read_text(encoding="utf-8"))
    (comparison,) = diverged.comparisons
    cells = list(page.cells)
    assert len(cells) == len(comparison.judgements) > 200
    shades = Counter(classes[0] for classes, _ in cells)
    assert shades == {"e": comparison.num_exact, "d": 1}
    carried = sum(bool(each.carried) for each in comparison.accounts.values())
    assert sum("c" in classes for classes, _ in cells) == carried > 10
    assert sum("q" in classes for classes, _ in cells) == len(cells) - carried - 55  # parameters
    for layer in range(4):
        assert f"layer {layer}" in page.words
    rows = [a["title"] for tag, a in page.tags if tag == "th" and "title" in a]
    assert "model.layers.3" in rows
    for column in (".self_attn#context", ".mlp.down_proj:in", "output", "#logits", ".weight"):
        assert column in page.words, column
    (said,) = (title for classes, title in cells if classes[0] == "d")
    first = comparison.culprits[0]
    assert said.startswith("diverged, function; error ")
    assert f"floor {first.floor:.1e}; in prompt, decode.1, decode.2; carried " in said


def test_the_page_says_what_diverged_and_what_was_not_seen(
    diverged: ParityResult, written: Path
) -> None:
    page = Page((written / "report.html").read_text(encoding="utf-8"))
    first = diverged.comparisons[0].culprits[0]
    worst = diverged.comparisons[0].accounts[CULPRIT].unequal[0].worst[0]
    assert page.words[0].startswith("diverged: a/model")
    for said in (CULPRIT, "left padding", f"{worst.port:.9g}", f"{worst.reference:.9g}"):
        assert said in page.words, said
    assert "(the probe was meant to show it)" in page.text
    assert "portkit parity a/model" in page.words
    assert f"{first.local_error:.1e}" in page.words
    assert f"{first.floor:.1e}" in page.words
    assert "function: it computes another function" in page.text
    assert page.text.index("Not verified") < page.text.index("What diverged")
    floors, *lines = [attributes["points"] for tag, attributes in page.tags if tag == "polyline"]
    bars = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert len((floors or "").split()) >= 2 * len(bars) > 10
    assert sum(float(one["height"] or 0) == 120.0 for one in bars) <= 1
    assert [len((one or "").split()) for one in lines] == [80, 80]  # of 160 channels, in pairs
    heights = [float(point.split(",")[1]) for point in f"{lines[0]} {lines[1]}".split()]
    assert 0 <= min(heights) < max(heights) <= 120


def test_the_page_asks_for_nothing_from_outside(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    reached = [a.get(name) for _, a in page.tags for name in ("src", "href", "action", "srcset")]
    assert {one for one in reached if one} == {"data:,", "#bfloat16-0"}
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp|<script [^>]*src", text)
    policy = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy
    assert (policy[0] or "").startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        page.tags
    )


def test_the_object_and_the_summary(diverged: ParityResult, written: Path) -> None:
    assert json.loads((written / "parity.json").read_text()) == asked(diverged).printed
    summary = (written / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("## diverged: a/model\n")
    assert "- not verified: left padding" in summary
    assert "| model.layers.3 | 41 | diverged |" in summary
    assert f"    first culprit in bfloat16: {CULPRIT}\n" in summary
    assert summary.endswith("    portkit parity a/model\n")


def test_junit_has_a_case_for_what_differs_and_for_each_layer_that_does_not(
    written: Path,
) -> None:
    root = ElementTree.parse(written / "junit.xml").getroot()
    suites = {one.get("name"): one for one in root}
    assert list(suites) == ["bfloat16", "not verified"]
    for one in (root, *root):
        for count, tag in {"tests": "testcase", "failures": "failure", "errors": "error"}.items():
            assert one.get(count) == str(len(list(one.iter(tag))))
    (failed,) = (each for each in root.iter("testcase") if each.find("failure") is not None)
    assert (failed.get("classname"), failed.get("name")) == ("model.layers.3", CULPRIT)
    passed = [each.get("classname") for each in suites["bfloat16"] if not len(each)]
    assert [f"model.layers.{one}" for one in range(3)] == [one for one in passed if "layers" in one]
    assert (root.get("failures"), root.get("errors"), root.get("skipped")) == ("1", "1", "1")


def test_rounding_fails_only_at_the_exact_gate(diverged: ParityResult) -> None:
    (comparison,) = diverged.comparisons
    milder = tuple(
        replace(one, verdict=Verdict.rounding, kind=None) if one.site == CULPRIT else one
        for one in comparison.judgements
    )
    result = ParityResult((replace(comparison, judgements=milder),))
    question = asked(result)
    assert '<failure type="rounding"' in report.junit(result, question)
    at_rounding = replace(question, printed={**question.printed, "gate": "rounding"})
    root = ElementTree.fromstring(report.junit(result, at_rounding))
    assert root.get("failures") == "0"
    assert CULPRIT in [one.get("name") for one in root.iter("testcase")]


def test_names_of_a_checkpoint_are_words_and_nothing_else(
    diverged: ParityResult, tmp_path: Path
) -> None:
    (comparison,) = diverged.comparisons
    site = f"model.layers.3.{NASTY}"
    judged = replace(comparison.culprits[0], site=site, kind="missing", passes=(NASTY,))
    accounts = {**comparison.accounts, site: SiteAccount(site, "", False, missing=True)}
    judgements = (*comparison.judgements, judged)
    result = ParityResult(
        (replace(comparison, judgements=judgements, accounts=accounts),),
        not_verified=(NotVerified(NASTY, NASTY),),
        notes=(NASTY,),
    )
    report.write(tmp_path, result, asked(result, NASTY))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.text.count(SPELLED) >= 6
    assert page.text.count("<script>alert") == page.text.count(SPELLED)
    names = [one.get("name") or "" for one in ElementTree.parse(tmp_path / "junit.xml").iter()]
    assert sum(SPELLED in one for one in names) == 3
    printed = json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))
    assert printed["notes"] == [NASTY.replace("\ud800", r"\ud800")]
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert not re.search(r"^(?!    ).*<script", summary.replace(r"\<", ""), re.MULTILINE)
    for file in tmp_path.iterdir():
        lines = file.read_text(encoding="utf-8").split("\n")
        assert all(line.isprintable() for line in lines), file.name


def test_a_model_of_eighty_layers_is_small(diverged: ParityResult) -> None:
    """Every site of the deep model wrong, in two dtypes: the largest page that there is."""
    (comparison,) = diverged.comparisons
    judgements: list[Any] = []
    accounts = {}
    for layer in range(80):
        for one in comparison.judgements:
            if ".layers.3" in one.site:
                site = one.site.replace(".layers.3", f".layers.{layer}")
                wrong = replace(comparison.culprits[0], site=site)
                judgements.append(wrong)
                accounts[site] = comparison.accounts[CULPRIT]
    deep = replace(comparison, judgements=tuple(judgements), accounts=accounts)
    text = report.report_page.page(*_arguments(ParityResult((deep, deep))))
    assert text.count("<td class=") == 2 * len(judgements) > 8000
    assert len(text.encode()) < 1.5e6
    assert f"and {len(judgements) - 212} more" in text


def _arguments(result: ParityResult) -> tuple[Any, ...]:
    question = asked(result)
    return result, question.repo, question.command, question.printed


def test_the_command_writes_what_it_prints(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = str(tiny_checkpoint("gemma3 shallow", torch.bfloat16)), tmp_path / "a" / "b c"
    with pytest.raises(SystemExit) as exit_:
        main(["parity", folder, "--quick", "--out", str(out), "--json", "--ignore-config", "some"])
    assert exit_.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((out / "parity.json").read_text(encoding="utf-8")) == printed
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.words[0].startswith("exact: ")
    assert f"portkit parity {folder} --quick --ignore-config some --out '{out}' --json" in page.text
    assert {classes[0] for classes, _ in page.cells} == {"e"}
    assert len(list(page.cells)) == printed["exact"] == printed["sites"]
    assert "24, all equal" in page.words
    root = ElementTree.parse(out / "junit.xml").getroot()
    assert (root.get("failures"), root.get("errors")) == ("0", "0")


def test_a_place_that_cannot_be_written_is_said_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], diverged: ParityResult
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_:
        main(["parity", "no-such-repository", "--out", str(tmp_path / "file" / "out")])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert "the report cannot be written to" in said
    assert "name another folder" in said
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ReportError, match=r"report\.html: .*; name another folder"):
        report.write(tmp_path, diverged, asked(diverged))
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]
