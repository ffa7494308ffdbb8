"""The page of a proof in a real browser: it opens, its controls work, and it stays by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parity_tests.harness.browser import Browser, open_browser
from parity_tests.harness.conftest import CULPRIT, asked
from portkit.parity.judging.judge import Judgement, Verdict
from portkit.parity.reports import report
from portkit.parity.result import Comparison, ParityResult

LEAST_CONTRAST = 4.5
"""Of text, by the Web Content Accessibility Guidelines 2.2, success criterion 1.4.3 (AA)."""
CAUSE = {
    "fault": "attention.scale_of_head_dim",
    "sentence": "your port multiplies the scores by another scale",
    "explains": 0.99981,
    "alternatives": [{"fault": "attention.scale_twice", "explains": 0.5}],
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(diverged: ParityResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two culprits, of which the first has its cause."""
    (comparison,) = diverged.comparisons
    later = replace(comparison.culprits[0], site="#logits", kind="glue", passes=())
    judged = (one for one in comparison.judgements if one.site != "#logits")
    result = replace(diverged, comparisons=(_with(comparison, *judged, later),))
    question = asked(result)
    question.printed["culprits"][0]["cause"] = CAUSE
    return _written(tmp_path_factory, result, question)


@pytest.fixture(scope="module")
def every_shade(diverged: ParityResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sites that are rounding, and that diverged by more and more, in 62 layers."""
    (comparison,) = diverged.comparisons
    layer = [one for one in comparison.judgements if one.site.startswith("model.layers.3")]
    judgements, accounts = [], {}
    for number in range(62):
        for place, one in enumerate(layer):
            site = one.site.replace(".3", f".{number}", 1)
            wrong = replace(one, site=site)
            if number % 2 and place % 6:
                verdict = Verdict.rounding if place % 6 == 1 else Verdict.diverged
                error = 10.0 ** (place % 6 * 1.2 - 2)
                wrong = replace(wrong, verdict=verdict, local_error=error, floor=0.01)
            judgements.append(wrong)
            accounts[site] = comparison.accounts[one.site]
    deep = replace(comparison, judgements=tuple(judgements), accounts=accounts)
    result = replace(diverged, comparisons=(deep,))
    return _written(tmp_path_factory, result, asked(result))


@pytest.fixture(scope="module")
def clean(diverged: ParityResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (comparison,) = diverged.comparisons
    right = [one for one in comparison.judgements if one.verdict is Verdict.exact]
    result = ParityResult((_with(comparison, *right),))
    return _written(tmp_path_factory, result, asked(result))


def _with(comparison: Comparison, *judgements: Judgement) -> Comparison:
    return replace(comparison, judgements=judgements)


def _written(folders: pytest.TempPathFactory, result: ParityResult, question: report.Asked) -> Path:
    folder = folders.mktemp("page")
    report.write(folder, result, question)
    return folder / "report.html"


def test_it_opens_and_asks_for_nothing(browser: Browser, page: Path, clean: Path) -> None:
    for file in (page, clean):
        browser.open(file)
        assert browser.complaints() == []
        outside = [one for one in browser.reached() if not one.startswith("data:")]
        assert outside == [file.as_uri()]
    assert browser.one("h1").text == "exact a/model"
    assert browser.one("#culprits + p").text == "Nothing."


def test_a_request_would_be_seen(browser: Browser, tmp_path: Path) -> None:
    """The test above has teeth: an image from elsewhere is noticed, and so is an error."""
    file = tmp_path / "page.html"
    file.write_text("<img src='http://127.0.0.1:9/image.png'><script>nowhere()</script>")
    browser.open(file)
    assert "http://127.0.0.1:9/image.png" in browser.reached()
    assert any("nowhere is not defined" in one for one in browser.complaints())


def test_local_and_carried_errors_can_be_switched(browser: Browser, page: Path) -> None:
    browser.open(page)
    marked = (
        "return [...document.querySelectorAll('.map td[title]')]"
        ".map((one) => getComputedStyle(one, '::before').content.replaceAll('\"', ''))"
    )
    local = browser.run(marked)
    assert sum(one.startswith("✕") for one in local) == 2
    assert {one[0] for one in local} == {"·", "✕"}
    assert not browser.one(".of-carried").is_displayed()
    browser.one("label[for=carried]").click()
    carried = browser.run(marked)
    assert sum(one.startswith("≠") for one in carried) > 10
    assert browser.one(".of-carried").is_displayed()
    assert not browser.one(".of-local").is_displayed()
    browser.one("#carried").send_keys("\ue012")  # an arrow goes back, as in any group of radios
    assert browser.run(marked) == local


def test_a_site_that_is_pointed_at_tells_its_figures(browser: Browser, page: Path) -> None:
    browser.open(page)
    cell = browser.one(".map td.d")
    browser.run("arguments[0].dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))", cell)
    said = browser.one("#shown").text
    assert said.startswith(f"{CULPRIT}: diverged, function; error ")
    assert "; floor " in said
    assert "; carried " in said
    assert said.endswith(" in full")


def test_the_maps_can_be_walked_by_keys(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("return document.querySelectorAll('.map [tabindex=\"0\"]').length") == 3
    browser.run("document.querySelector('.map [tabindex=\"0\"]').focus()")
    shown: Any = lambda: browser.one("#shown").text.partition(": ")[0]  # noqa: E731
    assert shown() == CULPRIT
    for key, at in (
        ("\ue014", "model.layers.3.self_attn.o_proj:in"),  # right
        ("\ue013", "model.layers.2.self_attn.o_proj:in"),  # up
        ("\ue012", "model.layers.2.self_attn#context"),  # left
        ("\ue010", "model.layers.2"),  # end
        ("\ue014", "model.layers.2"),  # and no further
        ("\ue015", "model.layers.3"),  # down
        ("\ue011", "model.layers.3:in"),  # home
    ):
        browser.press(key)
        assert shown() == at
    assert browser.run("return document.querySelectorAll('.map [tabindex=\"0\"]').length") == 3


def test_a_culprit_opens(browser: Browser, page: Path) -> None:
    browser.open(page)
    first, second = browser.driver.find_elements("css selector", "details.culprit")
    assert (first.get_attribute("open"), second.get_attribute("open")) == ("true", None)
    lines = first.text.split("\n")
    assert lines[1] == CAUSE["sentence"]
    at = lines.index("cause")
    assert lines[at + 1 : at + 4] == [
        "attention.scale_of_head_dim, which explains 99.98 % of the difference",
        "next",
        "attention.scale_twice, 50 %",
    ]
    assert first.find_element("css selector", "svg").is_displayed()
    second.find_element("css selector", "summary").click()
    assert second.get_attribute("open") == "true"
    browser.open(page)
    browser.run("document.querySelectorAll('.map [tabindex=\"0\"]')[1].focus()")
    browser.press("\ue007")  # enter
    second = browser.driver.find_elements("css selector", "details.culprit")[1]
    assert second.get_attribute("open") == "true"
    assert browser.run("return location.hash") == "#bfloat16-1"


def test_on_a_phone_nothing_sticks_out(
    browser: Browser, page: Path, every_shade: Path, clean: Path
) -> None:
    for file in (page, every_shade, clean):
        browser.open(file, width=360)
        browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
        assert browser.overflow() == 0, file
    browser.run("document.body.insertAdjacentHTML('beforeend', '<p style=width:400px>wide</p>')")
    assert browser.overflow() > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_there_is_contrast_in_both_schemes(
    browser: Browser, every_shade: Path, page: Path, scheme: str
) -> None:
    for file in (every_shade, page):
        browser.open(file, scheme=scheme)
        ground = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
        for view in ("local", "carried"):
            browser.one(f"label[for={view}]").click()
            faint = {k: v for k, v in browser.contrasts().items() if v < LEAST_CONTRAST}
            assert faint == {}, (scheme, view)
    browser.open(every_shade, scheme=scheme)
    shades = {one for one in browser.contrasts() if one.startswith("i.key d")}
    assert shades == {f"i.key d l{level}" for level in range(5)}


def test_printed_it_shows_what_a_reader_would_open(browser: Browser, page: Path) -> None:
    for media, shown in (("screen", False), ("print", True)):
        browser.open(page, media=media)
        second = browser.driver.find_elements("css selector", "details.culprit")[1]
        assert second.get_attribute("open") is None
        assert browser.is_visible(second.find_element("css selector", "dl")) == shown
        assert browser.is_visible(browser.one("#shown")) != shown
        assert browser.is_visible(browser.one("label[for=local]")) != shown
    printed = browser.command("Page.printToPDF", printBackground=False)["data"]
    assert printed.startswith("JVBERi0")  # %PDF-
