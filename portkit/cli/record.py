"""`portkit record`: write down what a model produces at every site, for those who hold against it.

Knows options and streams; what they mean is in `portkit.parity.traces.recording`.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from portkit.cli import options, parity
from portkit.cli.output import human_bytes, plural, print_json, say
from portkit.envelope import versions


class Engine(StrEnum):
    transformers = "transformers"
    portkit = "portkit"


Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE", help="The trace; one there is replaced.")
]
EngineOption = Annotated[
    Engine,
    typer.Option(
        "--engine",
        help="What is recorded: the reference, or our port, which needs no Transformers.",
    ),
]
Sites = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Keep these sites alone, as 'model.layers.*.mlp' or '*#context' (may be repeated).",
    ),
]
LastTokens = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Keep the last tokens of each pass: megabytes for gigabytes."
    ),
]
Inputs = Annotated[
    bool,
    typer.Option("--inputs", help="Keep what goes into modules too: errors can be judged locally."),
]
Floors = Annotated[
    bool,
    typer.Option(
        "--floors/--no-floors",
        help="Measure how far the recorded model is from float64, by which rounding is judged.",
    ),
]


def command(
    repo: options.Repo,
    out: Out,
    *,
    engine: EngineOption = Engine.transformers,
    sites: Sites = None,
    last_tokens: LastTokens = None,
    inputs: Inputs = False,
    floors: Floors = True,
    revision: options.Revision = None,
    dtype: options.DTypeOption = options.DType.auto,
    device: options.DeviceOption = options.Device.cpu,
    attention: options.AttentionOption = options.Attention.sdpa,
    prompt: parity.Prompt = None,
    tokens: parity.Tokens = None,
    quick: parity.Quick = False,
    thorough: parity.Thorough = False,
    layers: parity.Layers = None,
    threads: parity.Threads = 1,
    seed: parity.Seed = 0,
    ignore_config: options.IgnoreConfig = None,
    json: options.Json = False,
) -> None:
    """Record a trace of the reference, or of the port, that others can be held against."""
    if inputs and (sites or last_tokens is not None):
        raise typer.BadParameter(
            "--inputs is for judging every site where it is made, which takes all sites and "
            "tokens: leave --sites and --last-tokens out; --layers A-B keeps to some layers"
        )
    choose = parity.probe_choice(prompt, tokens, quick, thorough, seed)
    kept = None if layers is None else parity.layer_range(layers)

    import torch

    from portkit.loading import resolve_device
    from portkit.parity.question import Question
    from portkit.parity.traces.recording import Keep, Order, record
    from portkit.parity.traces.trace_file import TraceFile

    torch.set_num_threads(threads)
    question = Question(
        repo,
        revision=revision,
        dtype=dtype,
        device=str(resolve_device(device)),
        attention=attention,
        layers=kept,
        ignore_config=tuple(ignore_config or ()),
        choose_probe=choose,
    )
    keep = Keep(tuple(sites or ()), last_tokens, inputs, floors)
    expected: list[int] = []

    def expect(num_bytes: int) -> None:
        expected.append(num_bytes)
        parity.tell("")
        say(f"{out}: about {human_bytes(num_bytes)}", aside=True)

    found = record(Order(question, engine, keep, versions()), out, parity.tell, expect)
    parity.tell("")
    for name in found.not_finite[:3]:
        say(f"note: {name} holds NaN", aside=True)
    for name, reason in list(found.refused.items())[:3]:
        say(f"note: the pass {name} is left out: {reason}", aside=True)
    written = TraceFile(out)
    if json:
        print_json(
            "record",
            file=str(out),
            bytes=written.num_bytes,
            expected_bytes=expected[0],
            engine=engine,
            dtype=written.provenance.dtype,
            passes=len(written.probe),
            sites=len(written.sites),
            inputs=inputs,
            last_tokens=last_tokens,
            floors=written.floors is not None,
            not_finite=found.not_finite,
        )
        return
    say(
        f"{out}: {human_bytes(written.num_bytes)}, {plural(len(written.sites), 'site')} in "
        f"{len(written.probe)} passes of {engine} in {written.provenance.dtype}"
    )
