"""`portkit demo`: the whole story on the small checkpoint that ships with the package."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portkit.cli import options
from portkit.cli.output import human_bytes, plural, print_json, table

if TYPE_CHECKING:
    from portkit.loading import LoadedModel
    from portkit.parity.logits import PassResult

PROMPT = "Once upon a time"
DTYPES, KERNELS = ("float32", "bfloat16"), ("sdpa", "eager")


def command(
    path: Annotated[
        bool, typer.Option("--path", help="Print where the shipped checkpoint lies, and stop.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Load the checkpoint that ships with portkit, prove it right, hear it tell a story."""
    from importlib.resources import as_file, files

    if path:
        print(files("portkit") / "demo_checkpoint")
        return
    import torch

    from portkit.loading import load
    from portkit.parity.reference import is_available

    torch.set_num_threads(1)  # how many threads share a sum decides its last bit
    proofs: dict[str, list[PassResult]] = {}
    with as_file(files("portkit") / "demo_checkpoint") as folder:
        loaded = load(folder, device="cpu")
        report = loaded.report
        if not json:
            print(
                f"1. load      {loaded.architecture.model_type}: {report.parameters:,} parameters, "
                f"{plural(report.tensors, 'tensor')}, {human_bytes(report.bytes)} in "
                f"{report.seconds * 1000:.0f} ms; every tensor accounted for\n"
            )
            print("2. prove     every logit of every pass against Transformers, bit for bit")
        if is_available():
            for dtype in DTYPES:
                for kernel in KERNELS:
                    proofs[f"{dtype}, {kernel}"] = _prove(folder, dtype, kernel)
        if not json:
            print(_proof_table(proofs) if proofs else _NOT_PROVEN)
            print("\n3. generate  ", end="")
        text, tokens_per_s = _tell(loaded, aloud=not json)
    exact = all(one.exact for passes in proofs.values() for one in passes)
    verdict = ("exact" if exact else "diverged") if proofs else None
    if json:
        print_json(
            "demo",
            parameters=report.parameters,
            verdict=verdict,
            passes={name: [vars(one) for one in passes] for name, passes in proofs.items()},
            text=text,
            tokens_per_s=tokens_per_s,
        )
    if verdict == "diverged":
        raise typer.Exit(1)


_NOT_PROVEN = (
    "             not verified: Transformers is not installed (pip install 'portkit[parity]')"
)


def _prove(folder: Path, dtype: str, kernel: str) -> list[PassResult]:
    import torch

    from portkit.loading import load
    from portkit.parity.logits import compare_logits, run_all
    from portkit.parity.probing import thorough_probe
    from portkit.parity.reference import load_reference
    from portkit.parity.sites import PortSide

    model = load(folder, dtype=dtype, device="cpu", attention=kernel).model
    probe = thorough_probe(model)
    reference = load_reference(folder, getattr(torch, dtype), kernel)
    port = PortSide(model, probe.longest)
    return compare_logits(probe, run_all(port, probe), run_all(reference, probe))


def _proof_table(proofs: dict[str, list[PassResult]]) -> str:
    rows = []
    for name, passes in proofs.items():
        num_exact = sum(one.exact for one in passes)
        num_logits = sum(one.num_logits for one in passes)
        first = next((f"first unequal: {one.name}" for one in passes if not one.exact), "equal")
        rows.append(
            (
                " " * 10,
                name,
                f"{num_exact} of {len(passes)} passes",
                f"{num_logits:,} logits",
                first,
            )
        )
    return table(rows)


def _tell(loaded: LoadedModel, aloud: bool) -> tuple[str, float]:
    """Greedy text from `PROMPT`, printed as it comes; and tokens per second."""
    from portkit.generation.loop import generate
    from portkit.generation.settings import GenerationSettings
    from portkit.tokenizer import Tokenizer

    tokenizer = Tokenizer.open(loaded.files)
    settings = GenerationSettings.read(loaded.files).override(do_sample=False)
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
            print(step.text, end="", flush=True)
    if aloud:
        print()
    return "".join(pieces), num_tokens / (time.perf_counter() - started)
