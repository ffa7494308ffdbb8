"""Words in columns, as a terminal or a failing test shows them."""

from __future__ import annotations

from collections.abc import Sequence

from portkit.shown import shown


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words in aligned columns, two spaces apart; plain text, as long as it needs to be.

    Words may be foreign.
    """
    rows = [[shown(word) for word in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)
