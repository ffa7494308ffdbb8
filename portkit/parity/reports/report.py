"""A parity result as files in a folder: for a colleague, a machine, a CI job.

`report.html`, `parity.json`, `junit.xml` and `summary.md`. Knows the formats and how to write them
safely; the page is `report_page`'s, the words are `summary`'s, the object is the command's.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4
from xml.etree import ElementTree

from portkit.errors import ReportError
from portkit.parity.gradients import GradientParity
from portkit.parity.judging.judge import Judgement, Verdict
from portkit.parity.judging.ledger import SiteAccount
from portkit.parity.reports import report_page, summary
from portkit.parity.result import Comparison, ParityResult
from portkit.shown import as_json, shown

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+!|~&@])")


@dataclass(frozen=True)
class Asked:
    """What stands in a report beside its result."""

    repo: str
    command: str
    """With which it can be made again."""
    printed: Mapping[str, Any]
    """The object that the command prints: `versions`, `gate`, `device`, `threads`, the result."""


def open_folder(directory: Path) -> None:
    """Make the folder of a report, before what is reported takes its time. Raises `ReportError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        trial = directory / f".portkit-{uuid4().hex}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise _refused(directory, error) from error


def write(directory: Path, result: ParityResult, asked: Asked) -> None:
    """Write the four files; those of an earlier report are replaced. Raises `ReportError`."""
    open_folder(directory)
    files = {
        "parity.json": as_json(asked.printed) + "\n",
        "junit.xml": junit(result, asked),
        "summary.md": markdown(result, asked),
        "report.html": report_page.page(result, asked.repo, asked.command, asked.printed),
    }
    for name, text in files.items():
        partial = directory / f".{name}.{uuid4().hex}"
        try:
            partial.write_bytes(text.encode())
            partial.replace(directory / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _refused(directory / name, error) from error


def junit(result: ParityResult, asked: Asked) -> str:
    """A suite for each dtype: a case for each site that is not exact, and for each group that is.

    A case fails where the gate does not let it through. What was not verified is a suite of its
    own: skipped, or an error where the verdict is inconclusive for it.
    """
    root = ElementTree.Element("testsuites", name=shown(f"portkit parity {asked.repo}"))
    causes = summary.causes(asked.printed)
    gate_is_exact = str(asked.printed["gate"]) == "exact"
    suites = [(one.dtype, one) for one in result.comparisons]
    for name, comparison in [
        *suites,
        *(("gradients", one) for one in result.judged[len(suites) :]),
    ]:
        suite = ElementTree.SubElement(root, "testsuite", name=name)
        for group, members in summary.groups(comparison).items():
            unequal = [one for one in members if one.verdict is not Verdict.exact]
            if not unequal:
                said = f"{group}: all of {len(members)} equal in every bit"
                ElementTree.SubElement(suite, "testcase", classname=shown(group), name=shown(said))
            for one in unequal:
                case = ElementTree.SubElement(
                    suite, "testcase", classname=shown(group), name=shown(one.site)
                )
                if one.verdict is Verdict.diverged or gate_is_exact:
                    cause = summary.said_cause(causes.get((comparison.dtype, one.site)))
                    said = _said(comparison.accounts[one.site], one)
                    said = f"{cause} ({said})" if cause else said
                    failure = ElementTree.SubElement(case, "failure", type=str(one.verdict))
                    failure.set("message", shown(said))
                    failure.text = "\n".join(map(shown, [said, *_values(comparison, one)]))
        _count(suite)
    if result.not_verified:
        suite = ElementTree.SubElement(root, "testsuite", name="not verified")
        for left_out in result.not_verified:
            case = ElementTree.SubElement(
                suite, "testcase", classname="not verified", name=shown(left_out.name)
            )
            kind = "error" if left_out.was_meant else "skipped"
            reason = ElementTree.SubElement(case, kind, message=shown(left_out.reason))
            if left_out.was_meant:
                reason.set("type", "inconclusive")
        _count(suite)
    _count(root)
    ElementTree.indent(root)
    return ElementTree.tostring(root, "unicode") + "\n"


def _count(suite: ElementTree.Element) -> None:
    for name, tag in (
        ("tests", "testcase"),
        ("failures", "failure"),
        ("errors", "error"),
        ("skipped", "skipped"),
    ):
        suite.set(name, str(sum(1 for _ in suite.iter(tag))))


def _said(account: SiteAccount, one: Judgement) -> str:
    if one.kind is None:
        return (
            f"{one.verdict}: {summary.figure(one.local_error)}, floor {summary.figure(one.floor)}"
        )
    return f"{one.kind}: {summary.said_kind(account, one)}{summary.evidence(one)}"


def _values(comparison: Comparison | GradientParity, one: Judgement) -> list[str]:
    account = comparison.accounts[one.site]
    lines = [f"port {account.misshapen} of the reference"] if account.misshapen else []
    if one.passes:
        lines.append(f"passes: {', '.join(one.passes)}")
    for record in account.unequal[:1]:
        lines += [f"{record.name}, {summary.side_by_side(each)}" for each in record.worst]
    return lines


def markdown(result: ParityResult, asked: Asked) -> str:
    """The terminal's report as Markdown: verdict, what was not seen, layers, the first culprit."""
    lines = [f"## {result.verdict}: {_escaped(asked.repo)}", ""]
    lines += [f"- {_escaped(line)}" for line in summary.headline(result)]
    lines += [f"- {_escaped(line)}" for line in summary.caveats(result)]
    for number, comparison in enumerate(result.comparisons):
        if number == 0 or comparison.verdict is not Verdict.exact:
            lines += ["", f"### {comparison.dtype}", ""]
            lines += _markdown_table([summary.HEADINGS, *summary.layer_rows(comparison)])
    for title, code in (
        ("What diverged", "\n".join(map(shown, summary.details(result)))),
        ("Again", shown(asked.command)),
    ):
        if code:
            # Indented, so that no content can end it.
            lines += ["", f"### {title}", "", textwrap.indent(code, "    ", lambda _: True)]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    first, *others = (f"| {' | '.join(map(_escaped, row))} |" for row in rows)
    return [first, "|" + " --- |" * len(rows[0]), *others]


def _escaped(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", shown(" ".join(text.split())))


def _refused(path: Path, error: OSError) -> ReportError:
    return ReportError(
        f"the report cannot be written to {path}: {error.strerror or error}; name another folder"
    )
