"""Count which planted faults everyday gates let through, and write it down:

    PORTKIT_DATA=DIR python tools/write_gates.py [--page]

Measures on two trained models, each in the dtype that it is stored in: the demo checkpoint
(Gemma 3) and stories260K (Llama), which is imported from $PORTKIT_DATA. Writes docs/gates.json and
from it the table in README.md, between its markers; `--page` writes the table alone.

What moves a bit of the logits moves a bit of some site, so a fault that does so is caught by
`portkit parity` with the same tokens; every site is compared where no bit of the logits moves.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from parity_tests.faults.everyday import GATES, SIX_TOKENS, logits_of, passed  # noqa: E402
from parity_tests.faults.judging import plant  # noqa: E402
from parity_tests.faults.planted import PLANTINGS  # noqa: E402
from parity_tests.faults.planted.planting import Planting  # noqa: E402
from portkit.importers.llama2c import import_llama2c  # noqa: E402
from portkit.loading import LoadedModel, load  # noqa: E402
from portkit.parity.comparing import compare  # noqa: E402
from portkit.parity.judging.judge import Verdict  # noqa: E402
from portkit.parity.probes.probe import Probe, chain  # noqa: E402
from portkit.parity.probes.probing import default_probe  # noqa: E402
from portkit.parity.reference import Reference, load_reference  # noqa: E402
from portkit.parity.sides.port import PortSide  # noqa: E402
from portkit.parity.subject.discovery import sites_of  # noqa: E402
from portkit.tokenizer import Tokenizer  # noqa: E402

SAVED, README = ROOT / "docs" / "gates.json", ROOT / "README.md"
BEGIN, END = "<!-- gates: written by tools/write_gates.py -->", "<!-- /gates -->"
OURS = "`portkit parity`"
TEXT = "Once upon a time, there was a little girl"
PROBES = {"six": "6 tokens", "default": "default probe"}


@dataclass
class Stage:
    """A trained model, and what the reference says to each probe."""

    title: str
    folder: Path
    dtype: str

    def __post_init__(self) -> None:
        right = self.load("sdpa")
        tokens = Tokenizer.open(right.files).encode(TEXT)[:SIX_TOKENS]
        assert len(tokens) == SIX_TOKENS
        prompt = chain("prompt", torch.tensor([tokens]), [SIX_TOKENS])
        self.probes = {"six": Probe("six", tuple(prompt)), "default": default_probe(right.model)}
        self._references: dict[str, Reference] = {}
        self._said: dict[tuple[str, str], list[torch.Tensor]] = {}

    def load(self, kernel: str) -> LoadedModel:
        return load(self.folder, dtype=self.dtype, attention=kernel)

    def reference(self, kernel: str) -> Reference:
        if kernel not in self._references:
            dtype = getattr(torch, self.dtype)
            self._references[kernel] = load_reference(self.folder, dtype, kernel)
        return self._references[kernel]

    def said(self, kernel: str, probe: str) -> list[torch.Tensor]:
        if (kernel, probe) not in self._said:
            self._said[kernel, probe] = logits_of(self.reference(kernel), self.probes[probe])
        return self._said[kernel, probe]

    def gates_passed(self, port: LoadedModel, kernel: str, name: str, strict: bool) -> list[str]:
        """The gates that let a port through with a probe, ours among them.

        `strict`: equal in every bit; else it is enough that nothing diverged.
        """
        probe, theirs = self.probes[name], self.said(kernel, name)
        side = PortSide(port.model, probe.longest)
        ours = logits_of(side, probe)
        found = [*passed(probe, ours, theirs)]
        equal = all(map(torch.equal, ours, theirs))
        if strict and not equal:
            return found
        table = sites_of(port.model)
        verdict = compare(side, self.reference(kernel), table, probe).verdict
        allowed = {Verdict.exact} if strict else {Verdict.exact, Verdict.rounding}
        return [*found, *([OURS] if verdict in allowed else [])]


def stages(scratch: Path, data: Path) -> Iterator[Stage]:
    yield Stage("Gemma 3, the demo", ROOT / "portkit" / "demo_checkpoint", "bfloat16")
    stories = data / "weights" / "stories260K"
    import_llama2c(
        stories / "stories260K.bin", scratch / "stories", tokenizer=stories / "tok512.bin"
    )
    yield Stage("Llama, stories260K", scratch / "stories", "float32")


def measure(stage: Stage) -> dict[str, Any]:
    """Which faults each gate lets through, and which gates refuse a right port."""
    names = [*GATES, OURS]
    let: dict[str, dict[str, list[str]]] = {name: {probe: [] for probe in PROBES} for name in names}
    refuses: dict[str, list[str]] = {name: [] for name in names}
    planted = [one for one in PLANTINGS if _possible(stage, one)]
    for number, one in enumerate(planted):
        print(f"\r{stage.title}: {number + 1} of {len(planted)} ", end="", file=sys.stderr)
        port = stage.load(one.kernel)
        plant(port, [one])
        for probe in PROBES:
            for gate in stage.gates_passed(port, one.kernel, probe, strict=True):
                let[gate][probe].append(one.name)
    print(file=sys.stderr)
    for probe in PROBES:  # the reference in sdpa, a right port in eager
        through = stage.gates_passed(stage.load("eager"), "sdpa", probe, strict=False)
        for gate in names:
            refuses[gate] += [probe] if gate not in through else []
    return {
        "dtype": stage.dtype,
        "planted": [one.name for one in planted],
        "lets_through": let,
        "refuses_a_right_port": refuses,
    }


def _possible(stage: Stage, planting: Planting) -> bool:
    if stage.dtype not in planting.dtypes:
        return False
    return planting.unmet(stage.load("sdpa").model) is None


def table(saved: dict[str, Any]) -> str:
    """The table of the README, from what was saved."""
    models = saved["models"]
    head = [f"{title}, {said}" for title in models for said in PROBES.values()]
    lines = [
        f"| let through by | {' | '.join(head)} | refuses a right port |",
        "|---|" + "---:|" * (len(head) + 1),
    ]
    for gate in saved["gates"]:
        counts = [
            f"{len(one['lets_through'][gate][probe])} of {len(one['planted'])}"
            for one in models.values()
            for probe in PROBES
        ]
        refused = any(one["refuses_a_right_port"][gate] for one in models.values())
        lines.append(f"| {gate} | {' | '.join(counts)} | {'yes' if refused else 'no'} |")
    return "\n".join(lines)


def write_table(saved: dict[str, Any], readme: Path = README) -> None:
    """Put the table between its markers."""
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest:
        raise SystemExit(f"{readme} has no line {BEGIN}")
    readme.write_text(f"{before}{BEGIN}\n{table(saved)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="What everyday gates let through.")
    parser.add_argument("--page", action="store_true", help="write the table alone")
    parser.add_argument("--data", type=Path, help="the folder of $PORTKIT_DATA")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page:
        import os

        data = options.data or Path(os.environ["PORTKIT_DATA"])
        with tempfile.TemporaryDirectory() as scratch:
            models = {one.title: measure(one) for one in stages(Path(scratch), data)}
        saved = {"gates": [*GATES, OURS], "models": models}
        SAVED.write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_table(json.loads(SAVED.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
