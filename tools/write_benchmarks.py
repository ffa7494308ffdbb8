"""Write docs/benchmarks.md from what the benchmarks measured:

    mkdir -p build
    PYTEST_ADDOPTS=--benchmark-json=build/benchmarks.json make bench
    python tools/write_benchmarks.py build/benchmarks.json [--out docs/benchmarks.md]

Knows the page and the fields that parity_tests/benchmarks stores; measures nothing itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = """# Benchmarks

Written by `tools/write_benchmarks.py` from a run of `make bench`; not by hand. Both sides run in
turn on the same machine, medians are compared, and what counts is the ratio.

- checkpoint: random bfloat16 weights in the size of Gemma 3 270M, {file_bytes:,} bytes, in the page
  cache
- machine: {cores} cores, {system}
- versions: {versions}

| what | portkit | against | takes | ratio | target |
|---|---:|---|---:|---:|---:|
{rows}

Opening adds {added_bytes:,} bytes to the process's anonymous memory, {share:.2%} of the file; the
target is under {share_target:.0%}.

A proof with the default probe adds {proof_bytes:,} bytes at its peak. The target is
{proof_target_bytes:,}: two and a half checkpoints, what the largest pass records, one layer and
32,768 rows of the head in float64. What is beyond it are the layer's activations in float64.
"""


def page(run: dict[str, Any]) -> str:
    """The page as Markdown. `run` is pytest-benchmark's JSON."""
    machine = run["machine_info"]
    found = [benchmark["extra_info"] for benchmark in run["benchmarks"]]
    memory = next((one for one in found if "added_bytes" in one), None)
    proof = next((one for one in found if "proof_bytes" in one), None)
    if memory is None or proof is None:
        raise SystemExit("the run lacks the checkpoint's benchmarks: set PORTKIT_DATA for it")
    rows = [
        f"| {one['what']} | {one['ours_s']:.3f} s | {one['against']} | {one['theirs_s']:.3f} s "
        f"| {one['ratio']:.2f} | {one['target']:.2f} |"
        for one in found
        if "ratio" in one
    ]
    return PAGE.format(
        file_bytes=memory["file_bytes"],
        added_bytes=memory["added_bytes"],
        share=memory["added_bytes"] / memory["file_bytes"],
        share_target=memory["target"],
        **proof,
        cores=machine["usable_cores"],
        system=f"{machine['system']} {machine['machine']}",
        versions=", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        rows="\n".join(rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/benchmarks.md from a measured run.")
    parser.add_argument("run", type=Path, help="what pytest wrote with --benchmark-json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args()
    run = json.loads(options.run.read_text(encoding="utf-8"))
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(page(run), encoding="utf-8")


if __name__ == "__main__":
    main()
