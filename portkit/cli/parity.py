"""`portkit parity`: does the port compute what the reference computes, and where not?

Knows options and streams; what they mean is in `portkit.parity`.
"""

from __future__ import annotations

import re
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portkit.cli import options, parity_decode
from portkit.cli.output import coloured, plural, print_json, stdout_kept
from portkit.envelope import envelope
from portkit.errors import ProbeError, SiteError
from portkit.json_reading import parse, read_text
from portkit.shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from portkit.checkpoint import Files
    from portkit.parity.probes.probe import Probe
    from portkit.parity.result import ParityResult
    from portkit.parity.subject.traits import Traits
    from portkit.parity.traces.trace_file import TraceFile


class Gate(StrEnum):
    exact = "exact"
    rounding = "rounding"


class Amount(StrEnum):
    full = "full"
    sampled = "sampled"
    off = "off"


GateOption = Annotated[
    Gate | None,
    typer.Option(
        "--gate",
        help="exact: equal in every bit, the default for our ports on a CPU; rounding: or as "
        "careful as the reference, the default elsewhere.",
    ),
]
ReferenceAttention = Annotated[
    options.Attention | None,
    typer.Option(help="Which kernel the reference runs, where not the port's."),
]
Prompt = Annotated[
    str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Compare on this text.")
]
Tokens = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Compare on these token ids, in words or as a JSON list; or run the probe of an "
        "earlier result (--json) again.",
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="A few tokens: seconds, and less is seen.")]
Thorough = Annotated[
    bool, typer.Option("--thorough", help="More rows and lengths, the logits of every token.")
]
Layers = Annotated[
    str | None,
    typer.Option(metavar="A-B", help="Hold only these layers against the truth, from 0."),
]
Backward = Annotated[
    bool,
    typer.Option(
        "--backward",
        help="Hold the gradient of every parameter against the reference's as well, and the "
        "parameters after a step of AdamW.",
    ),
]
Decode = Annotated[
    bool,
    typer.Option(
        "--decode",
        help="Hold every way of decoding against the reference in place of every site: prefill, "
        "chunks, token by token, padded and batch rows, the fast path, compiled. The gate exact "
        "then asks for equal bits where a way can have them.",
    ),
]
Threads = Annotated[
    int, typer.Option("--threads", min=1, help="How many threads compute; bits depend on it.")
]
PortOption = Annotated[
    str | None,
    typer.Option(
        "--port",
        metavar="MODULE:FACTORY",
        help="Prove this port in place of ours, of any family that Transformers can load: "
        "factory(directory, dtype, device) returns a model or callable. It takes input_ids and, "
        "as far as it likes, positions, attention_mask and cache, by these names or Hugging "
        "Face's. A file.py:factory too.",
    ),
]
ReferenceOption = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="MODULE:FACTORY|TRACE",
        help="Hold the port against this, called likewise, in place of Transformers; or against a "
        "recording, a .safetensors file, as --golden does.",
    ),
]
Sites = Annotated[
    Path | None,
    typer.Option(
        "--sites",
        metavar="FILE",
        help="Which of its modules is which site, a pair a line: "
        "blocks.{layer}.wo = model.layers.{layer}.self_attn.o_proj; and what it is given: "
        "takes = input_ids as tokens, past as start_pos",
    ),
]
Golden = Annotated[
    Path | None,
    typer.Option(
        "--golden",
        metavar="FILE",
        help="Hold the port against this recording (portkit record), on its probe and in its "
        "dtype; Transformers is not needed.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Write report.html, parity.json, junit.xml and summary.md there; those of an earlier "
        "report are replaced.",
    ),
]
Faults = Annotated[
    Amount,
    typer.Option("--faults", help="How many known mistakes to try: would the probe see them?"),
]
Inputs = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Of an encoder, a vision tower or the like: its inputs by name, a safetensors file.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code of the checkpoint, as the reference."),
]
Seed = Annotated[int, typer.Option("--seed", help="Of the probe's token ids.")]


def command(
    context: typer.Context,
    repo: options.Repo,
    *,
    revision: options.Revision = None,
    dtype: options.DTypeOption = options.DType.auto,
    device: options.DeviceOption = options.Device.cpu,
    attention: options.AttentionOption = options.Attention.sdpa,
    reference_attention: ReferenceAttention = None,
    port: PortOption = None,
    reference: ReferenceOption = None,
    sites: Sites = None,
    golden: Golden = None,
    inputs: Inputs = None,
    gate: GateOption = None,
    prompt: Prompt = None,
    tokens: Tokens = None,
    quick: Quick = False,
    thorough: Thorough = False,
    layers: Layers = None,
    backward: Backward = False,
    decode: Decode = False,
    threads: Threads = 1,
    seed: Seed = 0,
    ignore_config: options.IgnoreConfig = None,
    trust_remote_code: TrustRemoteCode = False,
    faults: Faults = Amount.full,
    out: Out = None,
    json: options.Json = False,
) -> None:
    """Hold every activation of the port against the reference in Transformers."""
    choose = probe_choice(prompt, tokens, quick, thorough, seed)
    kept = None if layers is None else layer_range(layers)
    _refuse_beside(context, decode, by_inputs=inputs is not None)
    if golden is not None:
        _refuse_beside_golden(context, "reference")
    elif reference is not None and Path(reference).suffix == ".safetensors":
        golden, reference = Path(reference), None
        _refuse_beside_golden(context)

    import torch

    from portkit.loading import resolve_device
    from portkit.parity.probes.named import read_inputs
    from portkit.parity.prove import prove
    from portkit.parity.question import Question
    from portkit.parity.reports import report, schema
    from portkit.parity.traces.golden import prove_by
    from portkit.parity.traces.trace_file import TraceFile

    trace = None if golden is None else TraceFile(golden)
    if trace is not None and not _is_given(context, "attention"):
        attention = _recorded_attention(trace)
    where = resolve_device(device)
    if where.type == "mps":
        raise typer.BadParameter("the truth is float64, which mps does not have: --device cpu")
    if out is not None:
        report.open_folder(out)
    torch.set_num_threads(threads)
    of_ours = port is None and reference is None
    passing = gate or (Gate.exact if where.type == "cpu" and of_ours else Gate.rounding)
    question = Question(
        repo,
        revision=revision,
        dtype=dtype,
        device=str(where),
        attention=attention,
        reference_attention=reference_attention,
        layers=kept,
        ignore_config=tuple(ignore_config or ()),
        backward=backward,
        gate=passing,
        faults=faults,
        choose_probe=choose,
        port=port,
        reference=reference,
        sites=None if sites is None else _read_pairs(sites, port, reference),
        inputs=None if inputs is None else read_inputs(inputs),
        trust_remote_code=trust_remote_code,
    )
    answered = {"gate": passing, "device": where.type, "threads": threads}
    if decode:
        has_prompt = prompt is not None or tokens is not None
        matrices = parity_decode.prove(question, seed, has_prompt=has_prompt, tell=tell)
        tell("")
        asked = {"repo": repo, "attention": attention, "printed": answered}
        parity_decode.show(matrices, asked, coloured_verdict(matrices.verdict), json=json)
        return
    with stdout_kept():
        result = prove(question, tell) if trace is None else prove_by(trace, question, tell)
    tell("")
    fields = {**answered, **schema.as_fields(result)}
    if out is not None:
        printed = envelope("parity", **fields)
        report.write(out, result, report.Asked(repo, _as_typed(context), printed))
    if json:
        print_json("parity", **fields)
    else:
        how = f"{result.comparisons[0].dtype} on {where.type}, {attention}"
        told = shown(f"{repo} in {how}, {plural(threads, 'thread')}")
        print(f"{coloured_verdict(result.verdict)}: {told}")
        print_report(result)
    exit_by(result.verdict, passing)


def exit_by(verdict: str, gate: Gate) -> None:
    """Leave with the code of a verdict: inconclusive, or not what the gate lets through."""
    if verdict == "inconclusive":
        raise typer.Exit(3)
    if verdict != "exact" and not (verdict == "rounding" == gate):
        raise typer.Exit(1)


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_beside(context: typer.Context, decode: bool, *, by_inputs: bool) -> None:
    if decode:
        _refuse(context, parity_decode.REFUSED, "--decode: it compares ways of decoding")
    if by_inputs:
        taken = "prompt tokens quick thorough seed backward faults"
        because = "--inputs: they are the probe, and what needs tokens is not asked"
        _refuse(context, taken.split(), because)


def _refuse_beside_golden(context: typer.Context, *further: str) -> None:
    """A recording has its probe and is the reference: what would choose another is a mistake."""
    taken = "prompt tokens quick thorough seed port reference_attention sites faults inputs"
    because = "--golden: the recording is the reference, with a probe of its own"
    _refuse(context, (*taken.split(), *further), because)


def _refuse(context: typer.Context, names: Iterable[str], because: str) -> None:
    for name in names:
        if _is_given(context, name):
            raise typer.BadParameter(f"{because}: leave --{name.replace('_', '-')} out")


def _recorded_attention(trace: TraceFile) -> options.Attention:
    """The kernel that was recorded, where it is one that the port has."""
    named = trace.provenance.attention
    return next((one for one in options.Attention if one == named), options.Attention.sdpa)


def _as_typed(context: typer.Context) -> str:
    """The command with the options that were given, as a shell reads it."""
    words = ["portkit", "parity", str(context.params["repo"])]
    for option in context.command.params:
        if option.name == "repo" or not _is_given(context, option.name or ""):
            continue
        value = context.params[option.name or ""]
        if value is True:
            words.append(option.opts[0])
            continue
        for each in value if isinstance(value, list) else [value]:
            words += [option.opts[0], str(each)]
    return shlex.join(words)


def layer_range(layers: str) -> range:
    """`4-7`, or `4`, as a range."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", layers)
    if found is None or int(found[2] or found[1]) < int(found[1]):
        raise typer.BadParameter(f"--layers {layers}: give a range as 4-7, or one layer as 4")
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def probe_choice(
    prompt: str | None, tokens: Path | None, quick: bool, thorough: bool, seed: int
) -> Callable[[Traits, Files | None], Probe]:
    """How the probe is chosen once the model is known; a file is read at once."""
    if sum((prompt is not None, tokens is not None, quick, thorough)) > 1:
        raise typer.BadParameter("--prompt, --tokens, --quick and --thorough: choose one")
    saved = None if tokens is None else _read_tokens(tokens)

    def choose(traits: Traits, files: Files | None) -> Probe:
        from portkit.parity.probes import probing
        from portkit.parity.probes.probe import from_json
        from portkit.tokenizer import Tokenizer

        if prompt is not None:
            assert files is not None, "a command names a checkpoint"
            ids = Tokenizer.open(files).encode(prompt)
            return probing.probe_of_tokens("prompt", ids)
        if isinstance(saved, dict):
            return from_json(saved)
        if saved is not None:
            return probing.probe_of_tokens("tokens", saved)
        if quick:
            return probing.quick_probe(traits, seed)
        if thorough:
            return probing.thorough_probe(traits, seed)
        return probing.default_probe(traits, seed)

    return choose


def _read_tokens(file: Path) -> list[int] | dict[str, object]:
    """Token ids, or a saved probe: by itself or within the result of a comparison."""
    text = read_text(file, str(file), ProbeError)
    listed = text if text.lstrip()[:1] in ("[", "{") else f"[{','.join(text.split())}]"
    try:
        read = parse(listed, str(file), ProbeError)
    except ProbeError:
        read = None
    if isinstance(read, dict):
        inner = read.get("probe", read)
        if isinstance(inner, dict):
            return inner
    if isinstance(read, list) and all(type(one) is int and abs(one) < 1 << 62 for one in read):
        return read
    raise ProbeError(
        f"{file} holds neither token ids (whole numbers, or a JSON list of them) nor a saved probe"
    )


def _read_pairs(file: Path, port: str | None, reference: str | None) -> str:
    if port is None and reference is None:
        raise typer.BadParameter("--sites goes with --port or --reference")
    return read_text(file, f"{file} with its site pairs", SiteError)


def tell(line: str) -> None:
    """Show what is being done, where a person looks on."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{shown(line)}", end="", file=sys.stderr, flush=True)


def coloured_verdict(verdict: str) -> str:
    """The word in its colour, where a person looks on."""
    colours = {"exact": "green", "rounding": "green", "inconclusive": "yellow", "diverged": "red"}
    return coloured(verdict, colours[verdict])


def print_report(result: ParityResult) -> None:
    """What stands below the verdict: counts, layers, the first culprit, what was not seen."""
    from portkit.parity.reports import summary

    print("\n".join(summary.text(result)))
