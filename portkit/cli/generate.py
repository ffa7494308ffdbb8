"""`portkit generate`: text from a checkpoint, streamed while it is made.

Knows options, streams and clocks; what they mean is in `portkit.generation`. Standard output gets
what the model wrote, everything else goes to standard error.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portkit.cli import options
from portkit.cli.output import plural, print_json, say, say_more
from portkit.errors import GenerationError, TokenizerError

if TYPE_CHECKING:
    from portkit.architecture import CausalLM
    from portkit.checkpoint import Files
    from portkit.generation.loop import Startable, Step
    from portkit.tokenizer import Tokenizer

_MOST_FAST_ROWS = 32
_LEAST_FAST_BYTES = 64_000_000
"""A smaller model is held by the processor's own memory, and has little to gain."""

Prompts = Annotated[
    list[str],
    typer.Option(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="What to continue; - reads it from stdin. Repeated, the prompts are one batch.",
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(metavar="N", help="End after so many tokens: 200 where the checkpoint is silent."),
]
Sample = Annotated[
    bool | None,
    typer.Option(
        "--sample/--greedy",
        help="Draw each token, or take the likeliest: greedy where the checkpoint is silent.",
    ),
]
Temperature = Annotated[
    float | None, typer.Option(help="Sample; above 1 more freely, below more surely.")
]
TopK = Annotated[int | None, typer.Option(help="Sample from the K likeliest; 0 is off.")]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the likeliest that hold this probability.")
]
MinP = Annotated[
    float | None,
    typer.Option(help="Sample from what is at least so likely, relative to the likeliest."),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1 makes what has occurred less likely.")
]
Seed = Annotated[
    int | None,
    typer.Option(help="Of the sampling; prompt number i, from 0, draws with SEED + i."),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End before this text (may be repeated)."),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put each prompt into the checkpoint's chat template.")
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="With --chat: the system message.")
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on behind an end-of-sequence token.")
]
Speculate = Annotated[
    bool,
    typer.Option(
        "--speculate",
        help="Propose what followed the same words before, and check it in one pass: faster where "
        "text is copied, the same tokens. One prompt, greedy, by the readable model.",
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Say on stderr how it went, terminal or not.")
]


def command(
    repo: options.Repo,
    *,
    prompts: Prompts,
    max_new_tokens: MaxNewTokens = None,
    sample: Sample = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    chat: Chat = False,
    system: System = None,
    ignore_eos: IgnoreEos = False,
    revision: options.Revision = None,
    dtype: options.DTypeOption = options.DType.auto,
    device: options.DeviceOption = options.Device.auto,
    attention: options.AttentionOption = options.Attention.sdpa,
    engine: options.EngineOption = options.Engine.auto,
    speculate: Speculate = False,
    quantize: options.QuantizeOption = None,
    ignore_config: options.IgnoreConfig = None,
    verbose: Verbose = False,
    json: options.Json = False,
) -> None:
    """Continue text with a checkpoint, in the way its generation_config.json says."""
    from portkit.generation.loop import generate
    from portkit.generation.settings import GenerationSettings
    from portkit.loading import draw, materialize, open_checkpoint
    from portkit.tokenizer import Tokenizer

    checkpoint = open_checkpoint(repo, revision)
    blueprint = draw(checkpoint, attention, ignore_config or ())
    tokenizer = Tokenizer.open(checkpoint.files)
    drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    settings = GenerationSettings.read(
        checkpoint.files,
        ignore=ignore_config or (),
        say=_note,
        **drawing,
        do_sample=_whether_to_sample(sample, drawing),
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens,
        seed=secrets.randbits(32) if seed is None else seed,
        stop=tuple(stop) if stop else None,
        eos_token_ids=() if ignore_eos else None,
    )
    texts = _read_prompts(prompts)
    if chat:
        texts = _render_chats(checkpoint.files, tokenizer, texts, system)
    elif system is not None:
        raise GenerationError("--system is a message of a chat: give --chat with it")
    token_ids = [tokenizer.encode(text, special=not chat) or _bos(tokenizer) for text in texts]
    _check_ids(token_ids, blueprint.config.vocab_size)
    model = materialize(blueprint, dtype, device).model
    if quantize is not None:
        _quantize(model, quantize)
    continued = (
        _speculative(model, engine)
        if speculate
        else _with_engine(engine, model, len(token_ids), attention)
    )
    limit = blueprint.config.max_position_embeddings
    run = _Run(len(token_ids), streaming=len(token_ids) == 1 and not json)
    steps = generate(continued, token_ids, settings, context_length=limit, tokenizer=tokenizer)
    run.take(steps)
    seeds = [settings.seed + row if settings.do_sample else None for row in range(len(token_ids))]
    if json:
        print_json("generate", **run.fields(prompt_tokens=list(map(len, token_ids)), seed=seeds))
    elif not run.streaming:
        run.print_texts(prompts)
    run.say(seeds[0], limit, verbose=verbose or sys.stderr.isatty())


def _quantize(model: CausalLM, scheme: options.Quantize) -> None:
    from portkit.quantizing import quantize

    found = quantize(model, scheme)
    for note in found.notes:
        _note(note)


def _speculative(model: CausalLM, engine: options.Engine) -> Startable:
    from portkit.generation.speculation import Speculative

    if engine is options.Engine.fast:
        raise GenerationError("--speculate runs the readable model: leave --engine fast out")
    return Speculative(model)


def _with_engine(
    engine: options.Engine, model: CausalLM, num_rows: int, attention: options.Attention
) -> CausalLM | Startable:
    """The model, or its fast path where that was asked for, or is worth its while."""
    weight_bytes = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    suits = attention is options.Attention.sdpa and num_rows <= _MOST_FAST_ROWS
    if engine is options.Engine.fast and not suits:
        raise GenerationError(
            f"--engine fast takes at most {_MOST_FAST_ROWS} prompts, and --attention sdpa: leave "
            "it out"
        )
    gains = suits and weight_bytes >= _LEAST_FAST_BYTES
    if engine is options.Engine.readable or (engine is options.Engine.auto and not gains):
        return model
    from portkit.decoding.fast import FastModel
    from portkit.decoding.packages import Packages, default_folder

    packages = Packages(default_folder(), _note) if weight_bytes >= _LEAST_FAST_BYTES else None
    return FastModel(model, packages, _note)


def _note(line: str) -> None:
    say(f"portkit: note: {line}", aside=True)


class _Run:
    """The rows as their steps come in: shown, kept, timed."""

    def __init__(self, num_rows: int, *, streaming: bool) -> None:
        self.streaming = streaming
        self.texts = [""] * num_rows
        self.token_ids: list[list[int]] = [[] for _ in range(num_rows)]
        self.finish_reasons: list[str | None] = [None] * num_rows
        self.prefill_s = 0.0
        self.decode_s = 0.0

    def take(self, steps: Iterable[Step]) -> None:
        started = time.perf_counter()
        try:
            for step in steps:
                if not any(self.token_ids):
                    self.prefill_s = time.perf_counter() - started
                self.token_ids[step.row].append(step.token_id)
                self.texts[step.row] += step.text
                self.finish_reasons[step.row] = step.finish_reason
                if self.streaming:
                    say_more(step.text)
        finally:
            if self.streaming and any(self.texts):
                print(flush=True)
        self.decode_s = time.perf_counter() - started - self.prefill_s

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_s(self) -> float | None:
        """Of all rows together, without the prefill and the one token of each row that it gives."""
        num_decoded = self.num_tokens - len(self.token_ids)
        return num_decoded / self.decode_s if num_decoded else None

    def fields(self, **by_row: list[Any]) -> dict[str, Any]:
        """What JSON says: lists with an entry a row, or the entry itself for a single prompt."""
        by_row = {
            "text": self.texts,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reasons,
            **by_row,
        }
        alone = len(self.token_ids) == 1
        return {
            **{name: values[0] if alone else values for name, values in by_row.items()},
            "tokens_per_s": self.tokens_per_s,
            "prefill_s": self.prefill_s,
        }

    def print_texts(self, prompts: Sequence[str]) -> None:
        for prompt, text in zip(prompts, self.texts, strict=True):
            say(f"==> {' '.join(prompt.split())[:60]} <==")
            say_more(f"{text}\n\n")

    def say(self, seed: int | None, context_length: int, *, verbose: bool) -> None:
        if "context" in self.finish_reasons:
            print(
                f"portkit: note: cut at the end of the model's context of {context_length} tokens",
                file=sys.stderr,
            )
        if verbose:
            parts = [plural(self.num_tokens, "token"), f"prefill {self.prefill_s:.2f} s"]
            parts += [] if self.tokens_per_s is None else [f"{self.tokens_per_s:.1f} tokens/s"]
            parts += [] if seed is None else [f"seed {seed}"]
            print(", ".join(parts), file=sys.stderr)


def _read_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts, `-` replaced by standard input without the newline that ends its last line."""
    if prompts.count("-") > 1:
        raise GenerationError("-p - reads standard input to its end: give it once")
    return [_standard_input() if text == "-" else text for text in prompts]


def _standard_input() -> str:
    if sys.stdin is None:
        raise GenerationError("-p - reads standard input, which is closed: give the text after -p")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise GenerationError(
            f"standard input is not {error.encoding} text ({error.reason}): convert it, say with "
            "iconv"
        ) from None
    except OSError as error:
        raise GenerationError(f"standard input cannot be read: {error.strerror}") from None


def _whether_to_sample(sample: bool | None, drawing: Mapping[str, float | None]) -> bool | None:
    """An option that only sampling reads asks for sampling; None leaves it to the checkpoint."""
    given = ["--" + name.replace("_", "-") for name, value in drawing.items() if value is not None]
    if given and sample is False:
        raise GenerationError(f"{given[0]} has no effect with --greedy: leave one of them out")
    return True if given else sample


def _render_chats(
    files: Files, tokenizer: Tokenizer, texts: Sequence[str], system: str | None
) -> list[str]:
    from portkit.generation.chat import ChatTemplate

    template = ChatTemplate.open(files, tokenizer)
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [template.render([*opening, {"role": "user", "content": text}]) for text in texts]


def _bos(tokenizer: Tokenizer) -> list[int]:
    """What stands for an empty prompt."""
    if tokenizer.bos_id is None:
        raise GenerationError(
            "the prompt is empty and the tokenizer has no BOS token to begin with: give a text"
        )
    return [tokenizer.bos_id]


def _check_ids(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    highest = max(map(max, prompts))
    if highest >= vocab_size:
        raise TokenizerError(
            f"the tokenizer gives id {highest} where the model has {vocab_size} tokens: "
            "they are not of one checkpoint"
        )
