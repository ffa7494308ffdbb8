"""The one reader of JSON: whatever file it stands in, what is wrong with it is said in one line.

Knows what a text from a stranger can do to a parser and to whoever walks what comes out of it: be
of any size, nest without end, hold a key twice, be no UTF-8, spell a number that is no number. Does
not know what any file means, nor whose error it is.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 1 << 27
"""Of a small file, which is any but weights. A quarter million tokens take a quarter of it."""
_MAX_LEVELS = 64
"""What nests deeper than any released file; Python's own functions give up at a thousand."""


def read_object(
    path: Path, what: str, error: type[Exception], remedy: str = "fetch it again"
) -> dict[str, Any]:
    """The JSON object in a small file. Raises `error`, which calls the file `what`."""
    return parse_object(read_small(path, what, error), what, error, remedy)


def parse_object(
    raw: bytes | str, what: str, error: type[Exception], remedy: str = "fetch it again"
) -> dict[str, Any]:
    """The same of a text that was read already."""
    parsed = parse(raw, what, error, remedy)
    if not isinstance(parsed, dict):
        raise error(f"{what} must be a JSON object, not {type(parsed).__name__}; {remedy}")
    return parsed


def parse(
    raw: bytes | str, what: str, error: type[Exception], remedy: str = "fetch it again"
) -> Any:
    """Any JSON, strictly: no key stands twice, for one of the two would be lost."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise error(f"{what} holds {twice:.80} twice; {remedy}")
        return found

    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
        parsed = json.loads(text, object_pairs_hook=unique)
    except UnicodeDecodeError as problem:
        raise error(f"{what} is not UTF-8 text ({problem.reason}); {remedy}") from None
    except RecursionError:
        raise _too_deep(what, error, remedy) from None
    except ValueError as problem:
        raise error(f"{what} is not JSON ({problem}); {remedy}") from None
    if _levels(parsed) > _MAX_LEVELS:
        raise _too_deep(what, error, remedy)
    return parsed


def read_text(path: Path, what: str, error: type[Exception]) -> str:
    """The text of a small file, in UTF-8. Raises `error`."""
    try:
        return read_small(path, what, error).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(
            f"{what} is not UTF-8 text (byte {problem.start}: {problem.reason}): save it as UTF-8"
        ) from None


def read_small(path: Path, what: str, error: type[Exception]) -> bytes:
    """The bytes of a file that is no weights, and so of some size. Raises `error`."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as problem:  # the latter of a name with a zero byte
        reason = getattr(problem, "strerror", None) or problem
        raise error(
            f"{what} cannot be read ({reason}): see to its path, permissions and disk"
        ) from None
    if len(raw) > MAX_FILE_BYTES:
        raise error(
            f"{what} is larger than {MAX_FILE_BYTES:,} bytes, as no such file is: do not trust it"
        )
    return raw


def _too_deep(what: str, error: type[Exception], remedy: str) -> Exception:
    return error(f"{what} nests more than {_MAX_LEVELS} levels deep; {remedy}")


def _levels(parsed: object) -> int:
    """How deep it nests, without recursion; no more than one above the limit."""
    level: list[Any] = [parsed] if isinstance(parsed, dict | list) else []
    found = 0
    while level and found <= _MAX_LEVELS:
        found += 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return found
