"""`portkit bench`: how fast, beside whom, under which ceiling, and whether the tokens agree.

Knows options, tables and files; what is measured, and how, is in `portkit.bench`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portkit.cli import options
from portkit.cli.output import human_bytes, print_json, say
from portkit.columns import table
from portkit.errors import BenchError

if TYPE_CHECKING:
    from portkit.bench.decode import Plan, Row

_ROUNDS, _ROUNDS_S = 5, 45.0
_COMPARED, _COMPARED_S = 256, 45.0

app = typer.Typer(
    help="Measure speed: ours in its modes, and others beside it, in turn and in one run.",
    no_args_is_help=True,
)


class Against(StrEnum):
    transformers = "transformers"
    llama_cpp = "llama.cpp"


AgainstOption = Annotated[
    list[Against] | None, typer.Option("--against", help="Measured beside ours (may be repeated).")
]
Contexts = Annotated[
    str, typer.Option("--context", metavar="N,…", help="Tokens of the prompt; several, by commas.")
]
Batches = Annotated[
    str, typer.Option("--batch", metavar="N,…", help="Rows at a time; several, by commas.")
]
Tokens = Annotated[int, typer.Option("--tokens", min=2, help="Tokens to decode in each run.")]
Rounds = Annotated[
    int | None,
    typer.Option(
        "--rounds",
        min=1,
        help=f"Rounds, in which all engines take their turn; else {_ROUNDS}, or as many as are "
        f"begun in {_ROUNDS_S:.0f} seconds.",
    ),
]
Compared = Annotated[
    int | None,
    typer.Option(
        "--compare",
        min=0,
        help="Tokens, across the window, over which engines are compared, untimed; 0 for none; "
        f"else {_COMPARED}, or as many as fit into {_COMPARED_S:.0f} seconds.",
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of each engine; torch's default.")
]
Gguf = Annotated[
    str | None,
    typer.Option(
        "--gguf", metavar="FILE", help="For --against llama.cpp; made of the weights if left out."
    ),
]
Quantized = Annotated[
    list[options.Quantize] | None,
    typer.Option(
        "--quantize",
        help="Measure the fast path with matrices of 8 or 4 bits beside it (may be repeated).",
    ),
]
DeviceOption = Annotated[
    options.Device, typer.Option("--device", help="Where to decode: cpu or cuda.")
]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw the speeds as an image.")
]


@app.command("decode")
def decode(
    repo: options.Repo,
    against: AgainstOption = None,
    contexts: Contexts = "128",
    batches: Batches = "1",
    tokens: Tokens = 32,
    rounds: Rounds = None,
    compare: Compared = None,
    threads: Threads = None,
    dtype: options.DTypeOption = options.DType.auto,
    device: DeviceOption = options.Device.cpu,
    gguf: Gguf = None,
    quantize: Quantized = None,
    plot: Plot = None,
    json: options.Json = False,
) -> None:
    """Time a token behind contexts of several lengths, in batches of several sizes.

    Compiled regions, the exact head and llama.cpp continue single rows: batches are without them.
    """
    _check_plot(plot)
    found = _plan(repo, dtype, threads, against or [], gguf) | {"device": _device(device)}
    if found["device"] == "cuda":
        found["engines"] = _on_a_gpu(found["engines"])
    found["engines"] += tuple(f"fast, {scheme}" for scheme in dict.fromkeys(quantize or []))
    found |= _compared(repo, compare)
    plan = _with_sizes(found, contexts, batches, tokens, rounds)
    with _measured(plan) as (bandwidth, rows, complete):
        if json:
            results = [row.fields(bandwidth) for row in rows]
            print_json(
                "bench decode",
                hardware=_hardware(plan),
                bandwidth_bytes_per_s=bandwidth,
                complete=complete,
                results=results,
            )
        else:
            say(f"{_hardware(plan)}, reads at best {human_bytes(bandwidth)}/s")
            lines = table([_HEADINGS, *(_words(row, bandwidth) for row in rows)]).splitlines()
            for line in (*lines, *_losses(rows)):
                say(line)
        if plot and rows:
            from portkit.bench.plotting import plot_speeds

            plot_speeds(rows, plot)


@app.command("prefill")
def prefill(
    repo: options.Repo,
    against: AgainstOption = None,
    contexts: Contexts = "128,2000",
    batches: Batches = "1",
    rounds: Rounds = None,
    threads: Threads = None,
    dtype: options.DTypeOption = options.DType.auto,
    gguf: Gguf = None,
    json: options.Json = False,
) -> None:
    """Time the first token behind prompts of several lengths."""
    plan = _plan(repo, dtype, threads, against or [], gguf, prefill_only=True)
    with _measured(_with_sizes(plan, contexts, batches, 2, rounds)) as (bandwidth, rows, complete):
        if json:
            kept = ("engine", "dtype", "batch", "context", "prefill_ms", "same_tokens", "verdict")
            fields = [row.fields(bandwidth) for row in rows]
            results = [{key: one[key] for key in kept} for one in fields]
            print_json("bench prefill", complete=complete, results=results)
            return
        words = [
            (row.engine, str(row.context), str(row.batch), f"{1000 * row.prefill_s:.1f}")
            for row in rows
        ]
        print(table([("engine", "context", "batch", "ms to the first token"), *words]))


@app.command("load")
def load(
    repo: options.Repo,
    against: AgainstOption = None,
    rounds: Rounds = None,
    threads: Threads = None,
    dtype: options.DTypeOption = options.DType.auto,
    gguf: Gguf = None,
    json: options.Json = False,
) -> None:
    """Time whole processes: start, import, load, first token."""
    from portkit.bench.decode import with_gguf
    from portkit.bench.loading import first_tokens

    found = _plan(repo, dtype, threads, against or [], gguf, prefill_only=True)
    with with_gguf(_with_sizes(found, "16", "1", 2, rounds)) as plan:
        results = first_tokens(plan)
    if json:
        print_json("bench load", results=results)
        return
    words = [(one["engine"], f"{one['seconds']:.2f}", f"{one['load_s']:.2f}") for one in results]
    print(table([("engine", "s to the first token", "of it s to be loaded"), *words]))


def _compared(repo: str, num_tokens: int | None) -> dict[str, Any]:
    """How many tokens are compared, and the windows that they should cross."""
    from portkit.loading import draw, open_checkpoint
    from portkit.nn.cache import SlidingCache

    blueprint = draw(open_checkpoint(repo))
    limit = blueprint.config.max_position_embeddings
    layers = blueprint.skeleton.new_cache(1, 1).layers
    windows = tuple(one.window for one in layers if isinstance(one, SlidingCache))
    bound = {"compared_s": _COMPARED_S} if num_tokens is None else {}
    num_tokens = min(_COMPARED if num_tokens is None else num_tokens, limit // 2)
    return {"windows": windows, "num_compared": num_tokens, **bound}


def _device(device: options.Device) -> str:
    from portkit.loading import resolve_device

    found = resolve_device(device).type
    if found == "mps":
        raise BenchError("--device mps is not measured: give --device cpu or cuda")
    return found


def _on_a_gpu(engines_: Sequence[str]) -> tuple[str, ...]:
    """The engines that there are on a GPU, of those there are on the CPU."""
    from portkit.bench import engines

    if engines.LLAMA_CPP in engines_:
        raise BenchError("--against llama.cpp is measured on the CPU: leave --device out")
    ours = [engines.READABLE, engines.EAGER]
    if find_spec("triton"):
        ours += [engines.KERNELS, engines.FAST]
    theirs = [one for one in engines_ if one in (engines.TRANSFORMERS, engines.STATIC)]
    return (*ours, *theirs)


def _hardware(plan: Plan) -> str:
    import torch

    from portkit.bench.devices import hardware

    return hardware(torch.device(plan.device))


_HEADINGS = (
    "engine", "context", "batch", "tokens/s", "ms/token", "of the bandwidth", "ms to the first",
    "memory", "compiled in", "same tokens", "verdict",
)  # fmt: skip


def _words(row: Row, bandwidth: float) -> tuple[str, ...]:
    fraction = row.fields(bandwidth)["bandwidth_fraction"]
    agreement = row.agreement
    longest = agreement if row.compared is None else row.compared
    return (
        row.engine,
        str(row.context),
        str(row.batch),
        f"{row.tokens_per_s:.1f}",
        f"{1000 * row.step_s:.2f}",
        "" if fraction is None else f"{fraction:.0%}",
        f"{1000 * row.prefill_s:.1f}",
        human_bytes(row.peak_device_bytes or row.peak_rss_bytes),
        f"{row.compile_s:.0f} s" if row.compile_s else "",
        "" if agreement is None else str(longest if agreement.same else agreement),
        "not asked" if agreement is None else agreement.verdict or "",
    )


def _losses(rows: Sequence[Row]) -> list[str]:
    """Of paths that are another model by intent: what they gain, what they lose, and where."""
    lines = []
    dense = next(row.bytes_per_token for row in rows if row.loss is None)
    for row in {row.engine: row for row in reversed(rows)}.values():
        if row.loss is not None:
            assert row.bytes_per_token is not None
            assert dense is not None
            read = f"reads {human_bytes(row.bytes_per_token)} a token, not {human_bytes(dense)}"
            lines += ["", f"{row.engine}: {read}; {row.loss}; local errors:"]
            lines += [f"  {name} {error:.1e}" for name, error in row.loss.blocks.items()]
    return lines


def _plan(
    repo: str,
    dtype: options.DType,
    threads: int | None,
    against: Sequence[Against],
    gguf: str | None,
    *,
    prefill_only: bool = False,
) -> dict[str, Any]:
    """What a plan says before sizes are known."""
    import torch

    from portkit.bench import engines
    from portkit.decoding.packages import has_compiler
    from portkit.loading import draw, open_checkpoint, resolve_dtype

    _check_others(against, gguf)
    checkpoint = open_checkpoint(repo)
    blueprint = draw(checkpoint)
    ours = [engines.READABLE, engines.EAGER, engines.FAST, engines.EXACT]
    theirs = [engines.TRANSFORMERS, engines.STATIC] if Against.transformers in against else []
    if prefill_only:
        ours, theirs = ours[:1], theirs[:1]
    theirs += [engines.LLAMA_CPP] if Against.llama_cpp in against else []
    found = resolve_dtype(dtype, checkpoint)
    if not has_compiler():
        print("portkit: note: there is no C++ compiler: without compiled regions", file=sys.stderr)
        ours = [one for one in ours if one not in (engines.FAST, engines.EXACT)]
    if found is not torch.bfloat16:
        ours = [one for one in ours if one != engines.EXACT]  # which is bfloat16's alone
    return {
        "repo": repo,
        "dtype": str(found).removeprefix("torch."),
        "engines": (*ours, *theirs),
        "threads": threads or torch.get_num_threads(),
        "vocab_size": blueprint.config.vocab_size,
        "limit": blueprint.config.max_position_embeddings,
        "gguf": gguf,
    }


def _with_sizes(
    found: dict[str, Any], contexts: str, batches: str, tokens: int, rounds: int | None
) -> Plan:
    from portkit.bench.decode import Plan

    limit = found["limit"]
    if rounds is None:
        rounds, found["rounds_s"] = _ROUNDS, _ROUNDS_S
    sizes, rows = _numbers("--context", contexts), _numbers("--batch", batches)
    if max(sizes) + tokens > limit:
        raise BenchError(
            f"--context {max(sizes)} and {tokens} tokens exceed the model's context of {limit}: "
            "take less"
        )
    if max(rows) > 32:
        raise BenchError(f"--batch {max(rows)}: batches of 1 to 32 are measured")
    return Plan(**found, contexts=sizes, batches=rows, num_tokens=tokens, rounds=rounds)


@contextmanager
def _measured(plan: Plan) -> Iterator[tuple[float, list[Row], bool]]:
    """The bandwidth, the rows, and whether these are all: of what is interrupted, or fails, those
    that were measured are kept.
    """
    import torch

    from portkit.bench.decode import Measurement, with_gguf
    from portkit.bench.devices import bandwidth

    torch.set_num_threads(plan.threads)
    _tell(plan.beforehand())
    # Before and behind the rest: how fast a machine is changes from minute to minute.
    fastest = bandwidth(torch.device(plan.device))
    measurement, ended = Measurement(plan, _tell), None
    try:
        with with_gguf(plan) as whole:
            measurement = Measurement(whole, _tell)
            rows = measurement.run()
        fastest = max(fastest, bandwidth(torch.device(plan.device)))
    except (KeyboardInterrupt, BenchError) as error:
        rows, ended = measurement.rows(), error
        if not rows:
            raise
    yield fastest, rows, ended is None
    if ended is not None:
        sys.stdout.flush()
        raise ended


def _tell(line: str) -> None:
    say(f"portkit: {line}", aside=True)


def _check_others(against: Sequence[Against], gguf: str | None) -> None:
    if Against.transformers in against and find_spec("transformers") is None:
        raise BenchError("--against transformers: it is missing; pip install 'portkit[parity]'")
    if Against.llama_cpp in against and find_spec("llama_cpp") is None:
        raise BenchError("--against llama.cpp: it is missing; pip install llama-cpp-python")
    if gguf is not None and not Path(gguf).is_file():
        raise BenchError(f"--gguf {gguf}: there is no such file")


def _check_plot(plot: Path | None) -> None:
    if plot is not None and find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'portkit[plot]'")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise BenchError(f"{option} {text}: give whole numbers above 0, separated by commas")
    return numbers
