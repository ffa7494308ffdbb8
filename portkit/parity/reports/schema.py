"""A parity result in plain values, for machines: what `portkit parity --json` prints.

Errors are relative RMS; a number that is not finite is null. `parity.schema.json` beside this file
says what every key holds, and docs/parity-json.md explains them.
"""

from __future__ import annotations

import math
from typing import Any

from portkit.parity.gradients import GradientParity
from portkit.parity.judging.judge import Judgement, relative
from portkit.parity.probes.probe import as_json
from portkit.parity.reports import detail
from portkit.parity.result import Comparison, ParityResult
from portkit.parity.teeth import fates
from portkit.parity.teeth.diagnose import Cause

_DETAILS = ("distribution", "worst_tokens", "worst_channels")


def as_fields(result: ParityResult) -> dict[str, Any]:
    """The result's own part of the object; the command adds what it was asked."""
    main = result.comparisons[0]
    culprits = [
        _culprit(each, one, in_full=number < detail.MOST_DETAILED)
        for each in result.judged
        for number, one in enumerate(each.culprits)
    ]
    return {
        "verdict": result.verdict,
        "dtype": main.dtype,
        "probe": as_json(main.probe),
        "sites": sum(len(one.judgements) for one in result.comparisons),
        "exact": sum(one.num_exact for one in result.comparisons),
        "comparisons": [
            {
                "dtype": one.dtype,
                "verdict": one.verdict,
                "passes": [each.name for each in one.probe],
                "sites": len(one.judgements),
                "exact": one.num_exact,
                "rounding": [j.site for j in one.judgements if j.verdict == "rounding"],
            }
            for one in result.comparisons
        ],
        "culprits": culprits,
        "first": culprits[0] if culprits else None,
        "rounded": [
            {"site": one.site, "dtype": each.dtype, "cause": _cause(cause)}
            for each in result.comparisons
            for one, cause in each.rounded
        ],
        "generation": _generation(result),
        "gradients": _gradients(result),
        "not_verified": [{"name": one.name, "reason": one.reason} for one in result.not_verified],
        "notes": list(result.notes),
        "faults": None if result.teeth is None else fates.counts(result.teeth),
    }


def _gradients(result: ParityResult) -> dict[str, Any] | None:
    found = result.gradients
    if found is None:
        return None
    return {
        "verdict": found.verdict,
        "tokens": found.num_tokens,
        "parameters": len(found.judgements),
        "exact": found.num_exact,
        "rounding": [one.site for one in found.judgements if one.verdict == "rounding"],
        "places": list(found.places),
        "equal_after_step": found.num_equal_after_step,
    }


def _culprit(
    comparison: Comparison | GradientParity, one: Judgement, in_full: bool
) -> dict[str, Any]:
    account, cause = comparison.accounts[one.site], None
    if isinstance(comparison, Comparison):
        cause = comparison.causes.get(one.site)
    worst = [
        {"pass": record.name, **{k: _finite(v) for k, v in vars(value).items()}}
        for record in account.unequal
        for value in record.worst
    ]
    return {
        "site": one.site,
        "dtype": comparison.dtype,
        "pass": one.passes[0] if one.passes else None,
        "passes": list(one.passes),
        "kind": one.kind,
        "local_error": _finite(one.local_error),
        "floor": _finite(one.floor),
        "carried_error": _finite(relative(account.carried_error, account.truth)),
        "function_error": _finite(one.function_error),
        "misshapen": account.misshapen,
        "worst": worst[:6],
        "cause": None if cause is None else _cause(cause),
        **(_all_finite(detail.as_json(account)) if in_full else dict.fromkeys(_DETAILS)),
    }


def _cause(cause: Cause) -> dict[str, Any]:
    return {
        "fault": cause.name,
        "faults": [one.id for one in cause.faults],
        "explains": cause.explains,
        "alternatives": [
            {"fault": name, "explains": explains} for name, explains in cause.alternatives
        ],
        "says": [one.says for one in cause.faults],
        "mend": [one.mend for one in cause.faults],
        "tendencies": list(cause.tendencies),
        "sentence": cause.sentence,
    }


def _generation(result: ParityResult) -> dict[str, Any] | None:
    found = result.generation
    if found is None:
        return None
    first = found.first_difference
    return {
        "tokens": len(found.reference_tokens),
        "equal": found.is_equal,
        "prompt": list(found.prompt),
        "port": list(found.port_tokens),
        "reference": list(found.reference_tokens),
        "top1_agreement": found.top1_agreement,
        "max_kl": _finite(found.max_kl),
        "first_difference": None
        if first is None
        else {
            **{key: _finite(value) for key, value in vars(first).items()},
            "is_rounding": first.is_rounding,
        },
    }


def _all_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _all_finite(one) for key, one in value.items()}
    return [_all_finite(one) for one in value] if isinstance(value, list) else _finite(value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
