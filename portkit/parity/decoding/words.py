"""The decode-equivalence matrix in words, and in plain values.

Cells whose logits are equal in every bit have one letter. What is printed is plain text.
"""

from __future__ import annotations

import math
from typing import Any

from portkit.columns import table
from portkit.parity.decoding.matrix import Cell, Matrix
from portkit.parity.decoding.proof import DecodeParity
from portkit.parity.judging.judge import Verdict
from portkit.parity.probes.probe import as_json
from portkit.shown import shown

_HEADINGS = ("way", "bits", "reference", "error", "of floor", "float64", "tokens", "verdict")
_LEGEND = (
    "ways with the same letter have equal logits in every bit; reference: fed the same way, is it "
    "equal; of floor: times the reference's own distance from float64"
)


def text(result: DecodeParity) -> list[str]:
    """What stands below the verdict: a table for each dtype, reasons, what was not seen."""
    lines = []
    for matrix in result.matrices:
        lines += ["", *_matrix(matrix)]
    lines += ["", _LEGEND]
    lines += [f"note: {one}" for one in result.notes]
    told = {cell.way for matrix in result.matrices for cell in matrix.cells if cell.not_run}
    unseen = [one for one in result.not_verified if one.name not in told]
    lines += [f"not verified: {one.name} ({one.reason})" for one in unseen]
    return [shown(line) for line in lines]


def _matrix(matrix: Matrix) -> list[str]:
    given = matrix.text
    across = [f", across a window of {one}" for one in given.windows if given.leaves(one)]
    steps = given.num_compared - 1
    numbers: dict[str, int] = {}
    for cell in matrix.cells:
        for reason in cell.reasons:
            numbers.setdefault(reason, len(numbers) + 1)
    rows = [_row(cell, numbers) for cell in matrix.cells]
    lines = table([_HEADINGS, *rows]).splitlines()
    prompt = f"{given.prompt} token{'s' if given.prompt > 1 else ''}"
    return [
        f"{matrix.dtype}: a prompt of {prompt} and {steps} more{''.join(across)}",
        *(f"  {line}" for line in lines),
        *(f"  [{number}] {reason}" for reason, number in numbers.items()),
    ]


def _row(cell: Cell, numbers: dict[str, int]) -> tuple[str, ...]:
    if cell.verdict is None:
        return (cell.way, "", "", "", "", "", "", f"not run: {cell.not_run}")
    assert cell.error is not None
    assert cell.floor is not None
    assert cell.bits is not None
    why = "".join(f"[{numbers[one]}]" for one in cell.reasons)
    verdict = f"{cell.verdict}, {cell.kind}" if cell.kind else str(cell.verdict)
    if cell.verdict is Verdict.rounding and not why:
        why = "nothing explains it"
    return (
        cell.way,
        _letter(cell.bits),
        "equal" if cell.is_equal else "differs",
        f"{cell.error:.1e}",
        f"{cell.error / cell.floor:.2f}" if cell.floor else "",
        "" if cell.function_error is None else f"{cell.function_error:.0e}",
        _tokens(cell),
        f"{verdict} {why}".rstrip(),
    )


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else str(number)


def _tokens(cell: Cell) -> str:
    said = f"{cell.num_same_tokens} of {cell.num_tokens}"
    if cell.parting is None:
        return said
    return f"{said}, {'ties' if cell.parting.is_rounding else 'not by rounding'}"


def as_fields(result: DecodeParity) -> dict[str, Any]:
    """The result's own part of the object that `portkit parity --decode --json` prints."""
    run = [(m, c) for m in result.matrices for c in m.cells if c.verdict is not None]
    culprits = [_culprit(matrix, cell) for matrix, cell in run if cell.kind is not None]
    return {
        "verdict": result.verdict,
        "dtype": result.matrices[0].dtype,
        "probe": as_json(result.probe),
        "sites": len(run),
        "exact": sum(cell.verdict is Verdict.exact for _, cell in run),
        "comparisons": [],
        "culprits": culprits,
        "first": culprits[0] if culprits else None,
        "generation": None,
        "gradients": None,
        "not_verified": [{"name": one.name, "reason": one.reason} for one in result.not_verified],
        "notes": list(result.notes),
        "faults": None,
        "decode": [_as_json(one) for one in result.matrices],
    }


def _as_json(matrix: Matrix) -> dict[str, Any]:
    given = matrix.text
    return {
        "dtype": matrix.dtype,
        "verdict": matrix.verdict,
        "prompt_tokens": given.prompt,
        "decoded_tokens": given.num_compared - 1,
        "windows": [one for one in given.windows if given.leaves(one)],
        "ways": [_cell(one) for one in matrix.cells],
    }


def _cell(cell: Cell) -> dict[str, Any]:
    parting = cell.parting
    return {
        "way": cell.way,
        "verdict": cell.verdict,
        "kind": cell.kind,
        "bits": cell.bits,
        "equals_reference": cell.is_equal if cell.verdict is not None else None,
        "error": _finite(cell.error),
        "floor": _finite(cell.floor),
        "worst_token": _finite(cell.worst_token),
        "function_error": _finite(cell.function_error),
        "tokens": cell.num_tokens,
        "same_tokens": cell.num_same_tokens,
        "first_difference": None
        if parting is None
        else {
            "token": parting.token,
            "ours": parting.ours,
            "theirs": parting.theirs,
            "gap": _finite(parting.gap),
            "floor": _finite(parting.floor),
            "is_rounding": parting.is_rounding,
        },
        "reasons": list(cell.reasons),
        "not_run": cell.not_run,
    }


def _culprit(matrix: Matrix, cell: Cell) -> dict[str, Any]:
    """A way that diverged, as a culprit: what stands for a site is the way's logits."""
    return {
        "site": f"#logits, {cell.way}",
        "dtype": matrix.dtype,
        "pass": cell.way,
        "passes": [cell.way],
        "kind": cell.kind,
        "local_error": None,
        "floor": _finite(cell.floor),
        "carried_error": _finite(cell.error),
        "function_error": _finite(cell.function_error),
        "misshapen": None,
        "worst": [],
        "cause": None,
        **dict.fromkeys(("distribution", "worst_tokens", "worst_channels")),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
