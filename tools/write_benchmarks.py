"""Write docs/benchmarks.md from what the benchmarks measured:

    mkdir -p build
    PYTEST_ADDOPTS=--benchmark-json=build/benchmarks.json make bench
    python tools/write_benchmarks.py build/benchmarks.json [RUN ...] [--out docs/benchmarks.md]

Knows the page and the fields that parity_tests/benchmarks stores; measures nothing itself. Of what
several runs of one machine measured the last counts; what none did is named on the page.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "parity_tests" / "benchmarks"
PAGE = """# Benchmarks

Written by `tools/write_benchmarks.py` from runs of `make bench`; not by hand. Both sides run in
turn on the same machine, medians are compared, and what counts is the ratio.

- checkpoint: random bfloat16 weights in the size of Gemma 3 270M, in the page cache; a training
  step is a small Llama's
- machine: {cores} cores, {system}
- versions: {versions}
"""
TABLE = """| what | portkit | against | takes | ratio | target |
|---|---:|---|---:|---:|---:|
"""
OPENING = """Opening adds {added_bytes:,} bytes to the process's anonymous memory, {share:.2%} of
the file of {file_bytes:,}; the target is under {target:.0%}.
"""
EXPERTS = """While 3,072 expert tensors, a file of {file_bytes:,} bytes, are opened, anonymous
memory grows by up to {peak_bytes:,} bytes, and in Transformers by {theirs_peak_bytes:,}.
"""
BY_LAYER = """Of a table of embeddings by layer, {table_bytes:,} bytes in the mapped file, a pass of
{num_tokens} tokens makes {read_bytes:,} bytes resident, the pages around the rows that it reads.
"""
PROOF = """A proof with the default probe adds {proof_bytes:,} bytes at its peak. The target is
{proof_target_bytes:,}: two and a half checkpoints, what the largest pass records, one layer and
32,768 rows of the head in float64.
"""


def page(run: dict[str, Any]) -> str:
    """The page as Markdown. `run` is pytest-benchmark's JSON."""
    machine = run["machine_info"]
    found = [benchmark["extra_info"] for benchmark in run["benchmarks"]]
    head = PAGE.format(
        cores=machine["usable_cores"],
        system=f"{machine['system']} {machine['machine']}",
        versions=", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
    )
    rows = [_row(one) for one in found if "ratio" in one]
    parts = [head, *([TABLE + "".join(rows)] if rows else [])]
    for one in found:
        if "added_bytes" in one:
            parts.append(OPENING.format(**one, share=one["added_bytes"] / one["file_bytes"]))
        if "peak_bytes" in one:
            parts.append(EXPERTS.format(**one))
        if "proof_bytes" in one:
            parts.append(PROOF.format(**one))
        if "table_bytes" in one:
            parts.append(BY_LAYER.format(**one))
    ran = {benchmark["fullname"].partition("[")[0] for benchmark in run["benchmarks"]}
    missing = [one for one in benchmarks() if one not in ran]
    if missing:
        listed = "".join(f"- `{one}`\n" for one in missing)
        parts.append(f"Not measured:\n\n{listed}")
    return "\n".join(parts)


def together(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What several runs measured, each benchmark as it was measured last.

    Exits where they are not of one machine and the same packages: figures are not mixed then.
    """
    machine = runs[-1]["machine_info"]
    for run in runs:
        for key in ("usable_cores", "system", "machine", "versions"):
            if run["machine_info"][key] != machine[key]:
                sys.exit(f"write_benchmarks: runs differ in {key}: {run['machine_info'][key]}")
    latest = {one["fullname"]: one for run in runs for one in run["benchmarks"]}
    return {"machine_info": machine, "benchmarks": [*latest.values()]}


def _row(one: dict[str, Any]) -> str:
    missed = " (missed)" if one["ratio"] > one["target"] else ""
    return (
        f"| {one['what']} | {one['ours_s']:.3f} s | {one['against']} | {one['theirs_s']:.3f} s "
        f"| {one['ratio']:.2f}{missed} | {one['target']:.2f} |\n"
    )


def benchmarks() -> Iterator[str]:
    """Every benchmark that there is, as pytest names it: the tests that take `benchmark`."""
    for file in sorted(BENCHMARKS.glob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            if "benchmark" in {argument.arg for argument in node.args.args}:
                yield f"{file.relative_to(ROOT).as_posix()}::{node.name}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/benchmarks.md from a measured run.")
    parser.add_argument(
        "runs", type=Path, nargs="+", help="what pytest wrote with --benchmark-json"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args()
    run = together([json.loads(one.read_text(encoding="utf-8")) for one in options.runs])
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(page(run), encoding="utf-8")


if __name__ == "__main__":
    main()
