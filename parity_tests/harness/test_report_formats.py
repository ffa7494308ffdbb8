"""What machines read: parity.json follows its schema, junit.xml what CI systems expect."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from lxml import etree

from parity_tests.conftest import CheckpointMaker
from parity_tests.harness.conftest import asked
from portkit.cli import main
from portkit.parity.generation import FirstDifference, GenerationParity
from portkit.parity.judging.judge import Verdict
from portkit.parity.reports import report
from portkit.parity.reports.detail import MOST_DETAILED
from portkit.parity.result import ParityResult

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parity-json.md"
CAUSE = {
    "fault": "norm.epsilon",
    "explains": 0.9998,
    "alternatives": [{"fault": "norm.mean_subtracted", "explains": 0.2}],
    "sentence": "your port divides by another epsilon",
}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    read = json.loads((files("portkit.parity") / "parity.schema.json").read_text("utf-8"))
    Draft202012Validator.check_schema(read)
    return read


@pytest.fixture(scope="module")
def strict(schema: dict[str, Any]) -> Draft202012Validator:
    """What is written here has no key that the schema does not tell of."""

    def close(one: Any) -> None:
        if isinstance(one, dict):
            if "properties" in one:
                one["additionalProperties"] = False
            for each in one.values():
                close(each)
        elif isinstance(one, list):
            for each in one:
                close(each)

    closed = copy.deepcopy(schema)
    close(closed)
    return Draft202012Validator(closed)


def object_of(result: ParityResult) -> dict[str, Any]:
    """As it stands in the file: through JSON and back."""
    around = {"format": 1, "command": "parity", **asked(result).printed}
    return json.loads(json.dumps(around, allow_nan=False))


def judged(diverged: ParityResult, verdict: Verdict) -> ParityResult:
    """The result with its culprit judged otherwise."""
    (comparison,) = diverged.comparisons
    judgements = tuple(
        one if one.verdict is Verdict.exact else replace(one, verdict=verdict, kind=None)
        for one in comparison.judgements
    )
    milder = replace(comparison, judgements=judgements)
    return replace(diverged, comparisons=(milder,), not_verified=diverged.not_verified[:1])


def test_results_of_every_verdict_follow_the_schema(
    diverged: ParityResult, strict: Draft202012Validator
) -> None:
    inconclusive = replace(
        judged(diverged, Verdict.exact), not_verified=diverged.not_verified, notes=()
    )
    results = {
        "exact": judged(diverged, Verdict.exact),
        "rounding": judged(diverged, Verdict.rounding),
        "inconclusive": inconclusive,
        "diverged": diverged,
    }
    for verdict, result in results.items():
        printed = object_of(result)
        assert printed["verdict"] == verdict
        assert [one.message for one in strict.iter_errors(printed)] == []
    assert len(printed["first"]["worst_tokens"]) == len(printed["first"]["worst_channels"]) == 4
    spread = printed["first"]["distribution"]
    assert spread["measured_from"] == "truth"
    assert sum(spread["port"]["below_power_of_two"].values()) > 0.9 * spread["port"]["values"]


def test_what_is_not_finite_or_not_there_follows_it_too(
    diverged: ParityResult, strict: Draft202012Validator
) -> None:
    (comparison,) = diverged.comparisons
    (culprit,) = comparison.culprits
    broken = replace(culprit, local_error=math.inf, floor=None, passes=())
    many = (*comparison.judgements, *[broken] * MOST_DETAILED)
    result = ParityResult(
        (replace(comparison, judgements=many),),
        GenerationParity(
            (2,), (5, 6), (5, 7), FirstDifference(1, 7, 6, 0.5, math.inf, 0.1), math.inf, 0.5
        ),
    )
    printed = object_of(result)
    printed["culprits"][0]["cause"] = CAUSE
    assert [one.message for one in strict.iter_errors(printed)] == []
    last = printed["culprits"][-1]
    assert (last["local_error"], last["pass"], last["distribution"]) == (None, None, None)
    assert last["worst_tokens"] is last["worst_channels"] is None
    assert printed["generation"]["first_difference"]["reference_gap"] is None


def test_the_command_follows_it(
    tiny_checkpoint: CheckpointMaker,
    capsys: pytest.CaptureFixture[str],
    strict: Draft202012Validator,
) -> None:
    with pytest.raises(SystemExit):
        main(["parity", str(tiny_checkpoint("qwen3 yarn tempered")), "--quick", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert [one.message for one in strict.iter_errors(printed)] == []
    assert printed["verdict"] == "exact"


def test_the_difference_of_two_traces_follows_it(
    tiny_checkpoint: CheckpointMaker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    strict: Draft202012Validator,
) -> None:
    folder, trace = str(tiny_checkpoint("qwen3 yarn tempered")), str(tmp_path / "trace")
    with pytest.raises(SystemExit):
        main(["record", folder, "--quick", "--no-floors", "-o", trace])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["diff", trace, trace, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert [one.message for one in strict.iter_errors(printed)] == []
    assert (printed["command"], printed["verdict"]) == ("diff", "exact")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["verdict"], "fine"),
        (["format"], 2),
        (["culprits", 0, "kind"], None),
        (["culprits", 0, "local_error"], -1.0),
        (["culprits", 0, "distribution", "port", "below_power_of_two"], {"x": 1}),
        (["culprits", 0, "cause"], {"fault": "norm.epsilon"}),
        (["probe", "passes", 0, "input_ids"], [1, 2]),
        (["not_verified", 0], {"name": "far"}),
    ],
    ids=str,
)
def test_the_schema_refuses_what_is_wrong(
    diverged: ParityResult, schema: dict[str, Any], path: list[Any], value: Any
) -> None:
    printed = object_of(diverged)
    assert Draft202012Validator(schema).is_valid(printed)
    inner: Any = printed
    for one in path[:-1]:
        inner = inner[one]
    inner[path[-1]] = value
    assert not Draft202012Validator(schema).is_valid(printed)


def test_a_reader_may_meet_keys_that_are_new(diverged: ParityResult, schema: Any) -> None:
    printed = object_of(diverged)
    printed["of_tomorrow"] = printed["culprits"][0]["of_tomorrow"] = 1
    assert Draft202012Validator(schema).is_valid(printed)


def test_the_page_explains_every_key(schema: dict[str, Any]) -> None:
    def names(one: Any) -> set[str]:
        if isinstance(one, list):
            return set().union(*map(names, one))
        if not isinstance(one, dict):
            return set()
        return set(one.get("properties", {})) | names(list(one.values()))

    explained = set(re.findall(r"`(\w+)`", PAGE.read_text(encoding="utf-8")))
    assert names(schema) - explained == set()


def test_junit_is_what_ci_systems_read(diverged: ParityResult) -> None:
    xsd = etree.XMLSchema(etree.parse(Path(__file__).with_name("junit.xsd")))
    for result in (diverged, judged(diverged, Verdict.rounding), judged(diverged, Verdict.exact)):
        document = etree.fromstring(report.junit(result, asked(result)))
        xsd.assertValid(document)
    question = asked(diverged)
    question.printed["culprits"][0]["cause"] = CAUSE
    document = etree.fromstring(report.junit(diverged, question))
    xsd.assertValid(document)
    (message,) = document.xpath("//failure/@message")
    assert message.startswith("your port divides by another epsilon (function: it computes")
    document[0][0].attrib.pop("name")
    assert not xsd.validate(document)


def test_the_summary_has_whole_tables(diverged: ParityResult) -> None:
    """As GitHub reads them: a blank line before, as many cells in each row as in the first."""
    lines = report.markdown(diverged, asked(diverged)).split("\n")
    rows = [number for number, line in enumerate(lines) if line.startswith("|")]
    assert lines[rows[0] - 1] == ""
    assert set(lines[rows[0] + 1]) == {"|", " ", "-"}
    cells = {len(re.findall(r"(?<!\\)\|", lines[number])) for number in rows}
    assert cells == {7}
    assert rows == list(range(rows[0], rows[0] + len(rows)))
    headings = [line for line in lines if line.startswith("#")]
    assert headings == [
        "## diverged: a/model", "### bfloat16", "### What diverged", "### Again"
    ]  # fmt: skip
