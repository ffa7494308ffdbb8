"""Spoiled files without end: edits of a sound one that `hypothesis` draws, and shrinks.

An edit of JSON puts junk in some place, takes a place away, or copies one place to another; an edit
of bytes flips, cuts or inserts some. Knows nothing of what files mean.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parity_tests.engine.damage import join_header, split_header
from portkit.errors import PortkitError

MOST_SECONDS = 10.0
_NESTED: Any = []
for _ in range(200):
    _NESTED = [_NESTED]
JUNK: list[Any] = [
    None,
    True,
    False,
    *(-1, 0, 1, 2, 3, 64, 4096, 2**24 - 1, 2**24, 2**31, 2**63 - 1, 2**63, 2**70, 10**400),
    *(0.5, -0.5, 1e-30, 1e20, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", " ", "\ud800", "\0", "\x1b[31m", "a" * 5000, "../x", "/x", "{*}", "a{100000}"),
    *([], [[]], {}, [0] * 70, [2**62] * 3, [[1, 2], [3]], {"": {}}, {"a": None}, _NESTED),
]
_BYTES = [b"", b"\xff", b"\0", b"{", b"[", b'"', b",", b"1e9", b"\\ud800", b"9" * 5000, b"NaN"]

_place = st.integers(0, 1 << 16)
_in_json = st.one_of(
    st.tuples(st.just("put"), _place, st.sampled_from(range(len(JUNK)))),
    st.tuples(st.just("number"), _place, st.one_of(st.integers(), st.floats())),
    st.tuples(st.just("text"), _place, st.text(max_size=12)),
    st.tuples(st.just("copy"), _place, _place),
    st.tuples(st.just("drop"), _place, st.just(0)),
    st.tuples(st.just("rename"), _place, st.text(max_size=6)),
)
_in_bytes = st.tuples(st.just("bytes"), _place, st.integers(0, 40), st.sampled_from(_BYTES))
EDITS = st.tuples(st.lists(_in_json, min_size=0, max_size=3), st.lists(_in_bytes, max_size=1))


def spoil(raw: bytes, edits: tuple[list[Any], list[Any]]) -> bytes:
    """A JSON text with edits: first of what it says, then of its bytes."""
    of_values, of_bytes = edits
    if of_values:
        whole = {"": json.loads(raw)}
        for edit in of_values:
            _change(whole, edit)
        raw = json.dumps(whole.get("")).encode()
    for _, place, length, new in of_bytes:
        start = place % (len(raw) + 1)
        raw = raw[:start] + new + raw[start + length :]
    return raw


def spoil_header(file: bytes, edits: tuple[list[Any], list[Any]]) -> bytes:
    """A safetensors file with edits in its header."""
    header, data = split_header(file)
    return join_header(spoil(header, edits), data)


def _change(whole: Any, edit: Any) -> None:
    kind, place, what = edit
    places = _places(whole)
    if not places:
        return
    section, key = places[place % len(places)]
    if kind == "put":
        section[key] = deepcopy(
            JUNK[what]
        )  # or a later edit would spoil the junk, even with itself
    elif kind in ("number", "text"):
        section[key] = what
    elif kind == "copy":
        other, its = places[what % len(places)]
        section[key] = json.loads(json.dumps(other[its]))
    elif kind == "drop":
        del section[key]
    elif kind == "rename" and isinstance(section, dict):
        section[what] = section.pop(key)


def _places(whole: Any) -> list[tuple[Any, Any]]:
    found, sections = [], [whole]
    for section in sections:
        pairs = section.items() if isinstance(section, dict) else enumerate(section)
        for key, value in [*pairs]:
            found.append((section, key))
            if isinstance(value, dict | list):
                sections.append(value)
    return found


def fuzz(count: int, check: Callable[[Any], None], edits: Any = EDITS) -> None:
    """Call `check` with `count` drawn edits; each must end, in time."""

    def timed(drawn: Any) -> None:
        started = time.perf_counter()
        check(drawn)
        assert time.perf_counter() - started < MOST_SECONDS

    settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count < 1000,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )(given(edits)(timed))()


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """What is wrong may be said; `main` makes one line of it."""
    try:
        yield
    except PortkitError as error:
        assert str(error).strip()  # noqa: PT017


def run(verb: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Run a command's function, which must end by itself or with an answer; what it says is lost.

    Not through `main`: nine tenths of a small command is the reading of its options.
    """
    with (
        answered(),
        contextlib.suppress(typer.Exit),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        verb(*arguments, **options)
