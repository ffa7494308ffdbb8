"""Plant every fault in our ports, ask the harness, and write what it said to docs/faults.md:

    python tools/write_fault_rates.py [--family NAME] [--dtype DTYPE] [--only ID] [--pairs] [--page]

What was measured is kept, a line a fault, in docs/faults.jsonl, so that a family can be measured by
itself: a run that was stopped goes on from there, `--again` measures anew what it is asked for,
`--missed` of that what was missed, and `--fresh` forgets all. `--page` writes the page alone. One
core, a few seconds a fault: about an hour for all.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from parity_tests.faults.judging import Finding, Judging, checkpoints_in  # noqa: E402
from parity_tests.faults.misses import NOT_NAMED  # noqa: E402
from parity_tests.faults.pairs import NUM_PAIRS, both_found, draw  # noqa: E402
from parity_tests.faults.stages import FAMILIES, Impossible, Stage, stages  # noqa: E402
from portkit.parity.faults.catalogue import CATALOGUE  # noqa: E402

KEPT, PAGE = ROOT / "docs" / "faults.jsonl", ROOT / "docs" / "faults.md"
Row = dict[str, Any]
TEXT = """# Faults

Written by `tools/write_fault_rates.py` from what it measured; not by hand. Mistakes that real ports
make are planted in ours, by code that shares nothing with the catalogue's edits of the reference
(`parity_tests/faults/planted`), in tiny checkpoints that turn on what a fault needs
(`parity_tests/faults/stages.py`), and held against the reference with the default probe
(loader faults with the quick one: parameters are compared before anything runs).
*Caught*: the exact gate does not pass. *Placed*: the first site that is not exact is the one where
the mistake was made. *Named*: its cause, told first, is the fault.

{measured} of {possible} planted faults are measured here ({dtypes}).

| family | class | planted | caught | placed | named |
|---|---|---:|---:|---:|---:|
{rates}

## Misses

{misses}

## Two at once

{pairs}

## Not possible

What a family cannot get wrong, and why.

| fault | family | because |
|---|---|---|
{impossible}

## The catalogue

| fault | a wrong port | what to do |
|---|---|---|
{catalogue}
"""


def cause_of(found: Finding, site: str | None) -> list[str] | None:
    """The faults that are told as the cause at a site; None where no cause is looked for."""
    causes = getattr(found.comparison, "causes", None)
    if causes is None:
        return None
    cause = causes.get(site)
    return [] if cause is None else [one.id for one in cause.faults]


def measure(judging: Judging, stage: Stage) -> Row:
    found = judging.judge(stage)
    site = found.first.site if found.first else None
    return {
        "key": stage.name,
        "planting": stage.planting.name,
        "fault": stage.planting.fault,
        "family": stage.family,
        "dtype": stage.dtype,
        "expected": found.expected[0],
        "found": site,
        "caught": found.caught,
        "placed": found.placed,
        "causes": cause_of(found, site),
    }


def measure_pair(judging: Judging, possible: list[Stage], seed: int) -> Row:
    stage, other = draw(judging, possible, seed)
    found = judging.judge(stage, other)
    ids = (stage.planting.fault, other.fault)
    causes = [cause_of(found, site) for site in found.expected]
    named = all(fault in (told or []) for fault, told in zip(ids, causes, strict=True))
    return {
        "key": f"pair {seed}",
        "seed": seed,
        "faults": f"{stage.name} + {other.name}",
        "found": both_found(found),
        "named": None if causes[0] is None else named,
    }


def kept() -> dict[str, Row]:
    if not KEPT.exists():
        return {}
    lines = KEPT.read_text(encoding="utf-8").splitlines()
    return {row["key"]: row for row in map(json.loads, lines)}


def keep(row: Row) -> None:
    with KEPT.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def tidy(known: Iterable[str]) -> None:
    """Keep the last row of each key that still means something, in the order of `known`."""
    rows = kept()
    lines = [json.dumps(rows[key], ensure_ascii=False) for key in known if key in rows]
    KEPT.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def is_missed(row: Row) -> bool:
    named = row["causes"] is None or row["causes"][:1] == [row["fault"]]
    return not (row["caught"] and row["placed"] and named)


def share(rows: list[Row], key: str) -> str:
    known = [row[key] for row in rows if row[key] is not None]
    return f"{sum(known) / len(known):.1%} ({sum(known)} of {len(known)})" if known else "not asked"


def rates(rows: list[Row]) -> Iterator[str]:
    """A line for each family and class, each family, and all."""
    for row in rows:
        row["named"] = None if row["causes"] is None else row["causes"][:1] == [row["fault"]]
    for family in FAMILIES:
        own = [row for row in rows if row["family"] == family]
        classes = dict.fromkeys(row["fault"].partition(".")[0] for row in own)
        for one in classes:
            of_class = [row for row in own if row["fault"].startswith(f"{one}.")]
            counts = (
                "not asked"
                if any(row[key] is None for row in of_class)
                else str(sum(row[key] for row in of_class))
                for key in ("caught", "placed", "named")
            )
            yield f"| {family} | {one} | {len(of_class)} | {' | '.join(counts)} |"
        yield _total(f"**{family}**", own)
    yield _total("**all**", rows)


def _total(title: str, rows: list[Row]) -> str:
    shares = " | ".join(share(rows, key) for key in ("caught", "placed", "named"))
    return f"| {title} | | {len(rows)} | {shares} |"


def misses(rows: list[Row]) -> Iterator[str]:
    """One line for each planting that was missed, over its families and dtypes."""
    told: Counter[str] = Counter()
    for row in rows:
        where = f"{row['planting']}, {row['family']}"
        if not row["caught"]:
            told[f"{where}: not caught"] += 1
        elif not row["placed"]:
            told[f"{where}: expected at `{row['expected']}`, found at `{row['found']}`"] += 1
        elif row["named"] is False:
            instead = ", ".join(row["causes"]) or "no cause"
            why = NOT_NAMED.get(row["planting"], "not explained yet")
            told[f"{where}: {instead} is told ({why})"] += 1
    return (f"- {text}" for text in (told or {"None.": 1}))


def page(rows: dict[str, Row], possible: list[Stage], impossible: list[Impossible]) -> str:
    measured = [rows[one.name] for one in possible if one.name in rows]
    pairs = [rows[f"pair {seed}"] for seed in range(NUM_PAIRS) if f"pair {seed}" in rows]
    counts = Counter(row["dtype"] for row in measured)
    of = Counter(one.dtype for one in possible)
    dtypes = ", ".join(f"{name}: {counts[name]} of {of[name]}" for name in sorted(of))
    return TEXT.format(
        measured=len(measured),
        possible=len(possible),
        dtypes=dtypes,
        rates="\n".join(rates(measured)),
        misses="\n".join(misses(measured)),
        pairs=_pairs(pairs),
        impossible="\n".join(
            f"| {one.planting.name} | {one.family} | {one.reason} |" for one in impossible
        ),
        catalogue="\n".join(f"| {one.id} | {one.says} | {one.mend} |" for one in CATALOGUE),
    )


def _pairs(pairs: list[Row]) -> str:
    if not pairs:
        return "Not measured in this run."
    lines = [
        f"| {row['seed']} | {row['faults']} | {'yes' if row['found'] else 'no'} | "
        f"{'not asked' if row['named'] is None else 'yes' if row['named'] else 'no'} |"
        for row in pairs
    ]
    return "\n".join(
        [
            f"Drawn at random, by seed: {len(pairs)} pairs; both found where they were made: "
            f"{share(pairs, 'found')}; both named: {share(pairs, 'named')}.",
            "",
            "| seed | faults | both found | both named |",
            "|---:|---|---|---|",
            *lines,
        ]
    )


def chosen(possible: Iterable[Stage], options: argparse.Namespace) -> Iterator[Stage]:
    for one in possible:
        if (
            options.family in (None, one.family)
            and options.dtype in (None, one.dtype)
            and options.only in (None, one.planting.fault)
        ):
            yield one


def main() -> None:
    parser = argparse.ArgumentParser(description="How many planted faults are caught and named.")
    parser.add_argument("--family", choices=[*FAMILIES])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--only", metavar="ID", help="one fault of the catalogue")
    parser.add_argument("--pairs", action="store_true", help="the stacked pairs alone")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--again", action="store_true", help="measure anew what is asked for")
    parser.add_argument("--missed", action="store_true", help="measure anew what was missed of it")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.fresh:
        KEPT.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        judging = Judging(checkpoints_in(Path(scratch)))
        possible, impossible = stages(judging.folder)
        known = kept()
        if not options.page:
            todo = [] if options.pairs else [*chosen(possible, options)]
            for number, stage in enumerate(todo, start=1):
                row = known.get(stage.name)
                if row is None or options.again or (options.missed and is_missed(row)):
                    print(f"{number} of {len(todo)}: {stage.name}", file=sys.stderr, flush=True)
                    keep(measure(judging, stage))
            everything = not (options.family or options.dtype or options.only)
            for seed in range(NUM_PAIRS if options.pairs or everything else 0):
                if f"pair {seed}" not in known:
                    print(f"pair {seed + 1} of {NUM_PAIRS}", file=sys.stderr, flush=True)
                    keep(measure_pair(judging, possible, seed))
        tidy([one.name for one in possible] + [f"pair {seed}" for seed in range(NUM_PAIRS)])
        PAGE.write_text(page(kept(), possible, impossible), encoding="utf-8")


if __name__ == "__main__":
    main()
