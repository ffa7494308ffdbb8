"""Foreign words as people and parsers are given them: names, dtypes, messages out of others' files.

Such a word may hold what a terminal obeys, what begins another line, what turns letters round, or
what no parser reads. Whatever is printed or written for people or machines comes through here, and
every character that is not printable is spelled out, in the spelling of the place that it goes to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    r"""`text` on one line, in characters that are printable: others as `\n`, `\x1b`, `\u202e`."""
    return _spelled(text, lambda character: ascii(character)[1:-1])


def prose(text: str) -> str:
    """What a model says, with its lines and joiners: without what a terminal would obey."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def as_json(value: Any, **style: Any) -> str:
    """JSON of the same values, printable throughout; `style` is `json.dumps`'s.

    Half of a surrogate pair, which many a parser refuses, is written as `shown` would.
    """
    style = {"ensure_ascii": False, "allow_nan": False, **style}
    lines = json.dumps(value, **style).split("\n")
    return "\n".join(_spelled(line, _in_json) for line in lines)


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _in_json(character: str) -> str:
    if "\ud800" <= character <= "\udfff":
        return json.dumps(ascii(character)[1:-1])[1:-1]
    return json.dumps(character)[1:-1] if ord(character) > 0x7F else f"\\u{ord(character):04x}"


def _spelled(text: str, spell: Callable[[str], str]) -> str:
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else spell(one) for one in text)
