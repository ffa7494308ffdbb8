"""`portkit parity --decode`: is a token the same, however it is decoded?

Knows streams; what the ways are, and what is said of them, is in `portkit.parity.decoding.matrix`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from portkit.cli.output import plural, print_json
from portkit.shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from portkit.parity.decoding.proof import DecodeParity
    from portkit.parity.question import Question

REFUSED = (
    "quick", "thorough", "layers", "backward", "port", "reference", "sites", "golden", "faults",
    "out", "reference_attention", "inputs",
)  # fmt: skip
"""Options of a proof that have no meaning here."""


def prove(
    question: Question, seed: int, *, has_prompt: bool, tell: Callable[[str], None]
) -> DecodeParity:
    """Answer the question, with compiled regions in the user's folder."""
    from portkit.decoding.packages import Packages, default_folder
    from portkit.parity.decoding.proof import prove_decoding

    def packages(say: Callable[[str], None]) -> Packages:
        return Packages(default_folder(), say)

    return prove_decoding(question, seed, has_prompt, packages, tell)


def show(result: DecodeParity, asked: dict[str, Any], verdict: str, *, json: bool) -> None:
    """Print the matrix, or its object, and leave with the code of the gate."""
    from portkit.parity.decoding import words

    if json:
        print_json("parity", **asked["printed"], **words.as_fields(result))
    else:
        where = f"{asked['repo']} on {asked['printed']['device']}, {asked['attention']}"
        threads = plural(asked["printed"]["threads"], "thread")
        print(f"{verdict}: {shown(f'decoding {where}, {threads}')}")
        print("\n".join(words.text(result)))
    if not result.holds(asked["printed"]["gate"]):
        raise typer.Exit(1)
