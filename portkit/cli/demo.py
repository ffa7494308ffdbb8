"""`portkit demo`: the whole story on the small checkpoint that ships with the package."""

from __future__ import annotations

import shlex
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portkit.cli import options
from portkit.cli.output import coloured, human_bytes, plural, print_json, say_more
from portkit.columns import table
from portkit.envelope import envelope

if TYPE_CHECKING:
    from portkit.loading import LoadedModel
    from portkit.parity.demonstration import Found
    from portkit.parity.result import Comparison

PROMPT = "Once upon a time"
DTYPES, KERNELS = ("float32", "bfloat16"), ("sdpa", "eager")
_INDENT = " " * 13


def command(
    path: Annotated[
        bool, typer.Option("--path", help="Print where the shipped checkpoint lies, and stop.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write the report of the faulty port there; otherwise into a temporary folder.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Load the shipped checkpoint, prove it right, break it, find the fault, hear a story."""
    from importlib.resources import as_file, files

    if path:
        print(files("portkit") / "demo_checkpoint")
        return
    import torch

    from portkit.loading import load
    from portkit.parity.reference import is_available

    torch.set_num_threads(1)  # how many threads share a sum decides its last bit
    say = (lambda _: None) if json else print
    proofs: dict[str, Comparison] = {}
    fault = None
    with as_file(files("portkit") / "demo_checkpoint") as folder:
        loaded = load(folder, device="cpu")
        report = loaded.report
        say(
            f"1. load      {loaded.architecture.model_type}: {report.parameters:,} parameters, "
            f"{plural(report.tensors, 'tensor')}, {human_bytes(report.bytes)} in "
            f"{report.seconds * 1000:.0f} ms; every tensor accounted for"
        )
        if is_available():
            proofs, fault = _prove_and_break(folder, loaded, out, say)
        else:
            say(f"2. prove     {_NOT_PROVEN}")
        if not json:
            print(f"{5 if proofs else 3}. generate  ", end="")
        text, tokens_per_s = _tell(loaded, aloud=not json)
    exact = all(one.verdict == "exact" for one in proofs.values())
    verdict = ("exact" if exact else "diverged") if proofs else None
    if json:
        print_json(
            "demo",
            parameters=report.parameters,
            verdict=verdict,
            proofs={
                name: {
                    "verdict": one.verdict,
                    "passes": len(one.probe),
                    "sites": len(one.judgements),
                    "exact": one.num_exact,
                }
                for name, one in proofs.items()
            },
            fault=fault,
            text=text,
            tokens_per_s=tokens_per_s,
        )
    if not exact or (fault is not None and not fault["found"]):
        raise typer.Exit(1)


_NOT_PROVEN = "not verified: Transformers is not installed (pip install 'portkit[parity]')"


def _prove_and_break(
    folder: Path, loaded: LoadedModel, out: Path | None, say: Any
) -> tuple[dict[str, Comparison], dict[str, Any]]:
    """Steps 2 to 4: the proofs, and what is found of a planted mistake."""
    from portkit.parity import demonstration
    from portkit.parity.reports import report, summary
    from portkit.tokenizer import Tokenizer

    if out is not None:
        report.open_folder(out)
    say("2. prove     every activation of every pass against Transformers, bit for bit")
    proofs = {}
    for dtype in DTYPES:
        for kernel in KERNELS:
            one = demonstration.prove_shipped(folder, dtype, kernel)
            proofs[f"{dtype}, {kernel}"] = one
            say(
                f"{_INDENT}{f'{dtype}, {kernel}':<15}  {one.verdict}: {one.num_exact:,} of "
                f"{len(one.judgements):,} sites equal in every bit over {len(one.probe)} passes"
            )
    prompt = Tokenizer.open(loaded.files).encode(PROMPT)
    found = demonstration.find_planted(folder, prompt)
    gates, generation = found.gates, found.result.generation
    assert generation is not None, "the demo generates"
    say(
        f"3. break     {demonstration.SITE} is given an epsilon of {demonstration.EPSILON:g} where "
        f"the checkpoint has {demonstration.epsilon(loaded.model):g}"
    )
    say(table([(_INDENT[2:], *row) for row in _gate_rows(found)]))
    (comparison,) = found.result.comparisons
    first = comparison.culprits[0] if comparison.culprits else None
    where = out or Path(tempfile.mkdtemp(prefix="portkit-demo-report-"))
    fields = _write(where, found, out)
    say(
        f"4. find      {coloured(found.result.verdict, 'red')}, {comparison.num_exact:,} of "
        f"{len(comparison.judgements):,} sites equal in every bit"
    )
    if first is not None:
        kind = first.kind or "function"
        say(f"{_INDENT}first made at {first.site}")
        cause = summary.said_cause(fields["first"]["cause"])
        if cause:
            say(f"{_INDENT}{cause}")
        say(f"{_INDENT}{kind}: {summary.KINDS[kind]}{summary.evidence(first)}")
    say(f"{_INDENT}report: {where / 'report.html'} (one file: open it in a browser)")
    return proofs, {
        "planted": demonstration.SITE,
        "found": first is not None and first.site == demonstration.SITE,
        "everyday_gates": {**vars(gates), "pass_it": gates.pass_it},
        "equal_tokens": generation.is_equal,
        "verdict": found.result.verdict,
        "first": fields["first"],
        "report": str(where / "report.html"),
    }


def _write(where: Path, found: Found, out: Path | None) -> dict[str, Any]:
    """The report of the faulty port; gives the object's fields."""
    from portkit.parity.reports import report, schema

    fields = {"gate": "exact", "device": "cpu", "threads": 1, **schema.as_fields(found.result)}
    words = ["portkit", "demo", *(["--out", str(out)] if out else [])]
    title = "the shipped checkpoint with a planted fault"
    asked = report.Asked(title, shlex.join(words), envelope("demo", **fields))
    report.write(where, found.result, asked)
    return fields


def _gate_rows(found: Found) -> list[tuple[str, str, str]]:
    """What everyday gates ask, what they see, and what they say."""
    from portkit.parity.demonstration import COSINE, DIFFERENCE, TOP1

    gates, generation = found.gates, found.result.generation
    assert generation is not None, "the demo generates"
    num_tokens = len(generation.reference_tokens)
    equal = "equal" if generation.is_equal else "differ"
    passes = {True: "passes", False: "fails"}
    return [
        (f"cosine at least {COSINE}", f"{gates.cosine:.9f}", passes[gates.cosine >= COSINE]),
        (f"top-1 agreement {TOP1:.0%}", f"{gates.top1:.0%}", passes[gates.top1 >= TOP1]),
        (
            f"difference at most {DIFFERENCE:g}",
            f"{gates.max_difference:.1e}",
            passes[gates.max_difference <= DIFFERENCE],
        ),
        ("the same greedy text", f"{num_tokens} tokens {equal}", passes[generation.is_equal]),
    ]


def _tell(loaded: LoadedModel, aloud: bool) -> tuple[str, float]:
    """Greedy text from `PROMPT`, printed as it comes; and tokens per second."""
    from portkit.generation.loop import generate
    from portkit.generation.settings import GenerationSettings
    from portkit.tokenizer import Tokenizer

    tokenizer = Tokenizer.open(loaded.files)
    settings = GenerationSettings.read(loaded.files, do_sample=False)
    started, pieces = time.perf_counter(), [PROMPT]
    steps = generate(
        loaded.model,
        [tokenizer.encode(PROMPT)],
        settings,
        context_length=loaded.config.max_position_embeddings,
        tokenizer=tokenizer,
    )
    if aloud:
        print(PROMPT, end="", flush=True)
    num_tokens = 0
    for step in steps:
        num_tokens += 1
        pieces.append(step.text)
        if aloud:
            say_more(step.text)
    if aloud:
        print()
    return "".join(pieces), num_tokens / (time.perf_counter() - started)
