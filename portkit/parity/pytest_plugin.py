"""`assert_parity` in a porter's own tests: pytest finds this plugin where portkit is installed.

    def test_my_port(assert_parity):
        assert_parity(load_my_port(), "google/gemma-3-270m", probe="quick")

Imports nothing of the engine until it is asked: every run of pytest loads this file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from portkit.parity.api import Result


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("portkit").addoption(
        "--parity-report",
        metavar="DIR",
        default=None,
        help="write what assert_parity finds as DIR/TEST/report.html, parity.json, junit.xml",
    )


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> Callable[..., Result]:
    """`assert_parity(model, repo, **options)`, options as in `portkit.parity.compare`.

    Fails with the report as its message where the gate does not let the port pass, and also where
    nothing wrong was found but not all was seen that was to be seen.
    """
    chosen = request.config.getoption("--parity-report")
    num_asked = 0

    def check(port: Any, repo: str | Path, **options: Any) -> Result:
        __tracebackhide__ = True
        nonlocal num_asked
        from portkit.errors import PortkitError
        from portkit.parity.api import compare

        num_asked += 1
        try:
            result = compare(port, repo, **options)
            where = ""
            if chosen is not None:
                name = re.sub(r"[^\w.-]+", "-", request.node.nodeid).strip("-")
                folder = Path(chosen) / (name if num_asked == 1 else f"{name}-{num_asked}")
                where = f"\nreport: {result.report(folder)}"
        except PortkitError as error:
            from portkit.shown import shown

            pytest.fail(f"portkit: {shown(str(error))}", pytrace=False)
        if not result.holds:
            pytest.fail(f"{result}{where}", pytrace=False)
        return result

    return check
