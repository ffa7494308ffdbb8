"""`portkit train`: a model from scratch, on text, resumable.

Knows how the settings are spelled and how progress reads; the training is in `portkit.training`.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from portkit.cli import options
from portkit.cli.output import human_bytes, print_json


class Schedule(StrEnum):
    cosine = "cosine"
    trapezoid = "trapezoid"
    one_cycle = "one-cycle"
    constant = "constant"


class Optimizer(StrEnum):
    adamw = "adamw"
    muon = "muon"


class Tracker(StrEnum):
    tensorboard = "tensorboard"
    trackio = "trackio"


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


_EVERY_S = 10.0
_EVERY_ON_A_TERMINAL_S = 0.5


def command(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="A variant's name (`portkit list`), or config.json."),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="TEXT",
            help="A text file, a folder of them, tinystories, or hf://datasets/OWNER/NAME/FILE.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="RUN", help="The run's folder; there again, it goes on."),
    ],
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps in all.")],
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out", metavar="TEXT", help="Text to evaluate on; else a tenth of the data."
        ),
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer",
            metavar="bpe|characters|REPO",
            help="Train one, or take a checkpoint's with its vocabulary.",
        ),
    ] = "bpe",
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", help="Of a trained BPE, 512 to 32768; else the config's."),
    ] = None,
    context: Annotated[int, typer.Option("--context", help="Tokens in a row.")] = 256,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Rows in an optimizer step, over all ranks.")
    ] = 32,
    accumulation: Annotated[
        int, typer.Option("--accumulation", help="Parts that a step's rows are taken in.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="At its peak.")] = 1e-3,
    final_rate: Annotated[
        float | None,
        typer.Option("--final-rate", help="At the end; else a tenth of the peak."),
    ] = None,
    schedule: Annotated[
        Schedule, typer.Option("--schedule", help="How the rate goes on after the warm-up.")
    ] = Schedule.cosine,
    warmup_steps: Annotated[
        int | None, typer.Option("--warmup-steps", help="Else a twentieth of the steps.")
    ] = None,
    decay_steps: Annotated[
        int | None,
        typer.Option("--decay-steps", help="Of the trapezoid; else a fifth of the steps."),
    ] = None,
    optimizer: Annotated[
        Optimizer,
        typer.Option("--optimizer", help="AdamW for all, or Muon for the hidden matrices."),
    ] = Optimizer.adamw,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", help="Of matrices; vectors do not decay.")
    ] = 0.1,
    beta1: Annotated[float, typer.Option("--beta1")] = 0.9,
    beta2: Annotated[float, typer.Option("--beta2")] = 0.95,
    max_gradient_norm: Annotated[
        float, typer.Option("--max-gradient-norm", help="Clip to it; 0 does not clip.")
    ] = 1.0,
    precision: Annotated[
        Precision,
        typer.Option("--precision", help="What matrices are multiplied in; weights are float32."),
    ] = Precision.float32,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    activation_checkpointing: Annotated[
        bool,
        typer.Option("--activation-checkpointing", help="Less memory, a third more work."),
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the layers with torch.compile.")
    ] = False,
    eval_every: Annotated[
        int, typer.Option("--eval-every", help="Steps between evaluations; 0: at the end only.")
    ] = 200,
    eval_tokens: Annotated[
        int, typer.Option("--eval-tokens", help="Held-out tokens at most.")
    ] = 262144,
    save_every: Annotated[int, typer.Option("--save-every", help="Steps between saves.")] = 200,
    keep: Annotated[int, typer.Option("--keep", help="Saved steps that are kept.")] = 3,
    sample_every: Annotated[
        int, typer.Option("--sample-every", help="Steps between samples of text; 0: none.")
    ] = 0,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What samples begin with.")] = "",
    track: Annotated[
        Tracker | None,
        typer.Option("--track", help="Log to TensorBoard or trackio too, where installed."),
    ] = None,
    dtype: Annotated[
        options.DType, typer.Option("--dtype", help="Of the published weights; auto is float32.")
    ] = options.DType.auto,
    device: options.DeviceOption = options.Device.auto,
    json: options.Json = False,
) -> None:
    """Train CONFIG on text; RUN/model is then a checkpoint that everything else reads."""
    from portkit.training import recipe as recipes
    from portkit.training.run import Inputs, Watch, train
    from portkit.training.schedule import Shape
    from portkit.training.tracking import TrackerName, open_tracker

    trapezoid = schedule == Schedule.trapezoid
    recipe = recipes.Recipe(
        steps=steps,
        batch_size=batch_size,
        context=context,
        learning_rate=learning_rate,
        final_rate=learning_rate / 10 if final_rate is None else final_rate,
        schedule=Shape(schedule),
        warmup_steps=steps // 20 if warmup_steps is None else warmup_steps,
        decay_steps=steps // 5 if decay_steps is None and trapezoid else decay_steps or 0,
        optimizer=recipes.OptimizerName(optimizer),
        weight_decay=weight_decay,
        beta1=beta1,
        beta2=beta2,
        max_gradient_norm=max_gradient_norm,
        accumulation=accumulation,
        precision=recipes.Precision(precision),
        seed=seed,
        activation_checkpointing=activation_checkpointing,
        compile=compile,
    )
    habits = recipes.Habits(
        eval_every=eval_every,
        eval_tokens=eval_tokens,
        save_every=save_every,
        keep=keep,
        sample_every=sample_every,
        sample_prompt=prompt,
    )
    inputs = Inputs(
        config=config,
        data=data,
        held_out=held_out,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        device=device,
        dtype="float32" if dtype == options.DType.auto else dtype,
    )
    watchers: list[Watch] = [_Narrator()]
    if track is not None:
        watchers.append(open_tracker(TrackerName(track), out))

    def watch(record: Mapping[str, Any]) -> None:
        for one in watchers:
            one(record)

    outcome = train(inputs, recipe, out, habits, watch)
    if int(os.environ.get("RANK", "0")):
        return  # torchrun has started several of us, and the first one speaks
    result = outcome.evaluation
    if json:
        print_json(
            "train",
            model=str(outcome.model),
            parameters=outcome.num_parameters,
            steps=outcome.steps,
            nats_per_token=result.nats_per_token,
            bits_per_byte=result.bits_per_byte,
            held_out_tokens=result.num_tokens,
            seconds=outcome.seconds,
        )
        return
    print(
        f"trained  {outcome.num_parameters:,} parameters, {outcome.steps:,} steps\n"
        f"held out {result.nats_per_token:.4f} nats per token, {result.bits_per_byte:.4f} bits per "
        f"byte, on {result.num_tokens:,} tokens\n"
        f"wrote    {outcome.model}\n"
        f"next     portkit generate {shlex.quote(str(outcome.model))}"
    )


class _Narrator:
    """Tells a run on stderr: a line that changes where a person looks on, else one now and then."""

    def __init__(self) -> None:
        self._on_a_terminal = sys.stderr.isatty()
        self._told_at = 0.0
        self._open_line = False

    def __call__(self, record: Mapping[str, Any]) -> None:
        match record["event"]:
            case "preparing":
                self._progress(f"{record['part']} text: {record['done']:.0%} encoded")
            case "step":
                self._progress(_step_line(record))
            case "evaluation":
                self._say(
                    f"step {record['step']}: held out {record['nats_per_token']:.4f} nats per "
                    f"token, {record['bits_per_byte']:.4f} bits per byte"
                )
            case "sample":
                self._say(f"step {record['step']}: {record['text']}")
            case "note":
                self._say(f"note: {record['text']}")

    def _progress(self, line: str) -> None:
        now = time.monotonic()
        if now - self._told_at < (_EVERY_ON_A_TERMINAL_S if self._on_a_terminal else _EVERY_S):
            return
        self._told_at = now
        if self._on_a_terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            self._open_line = True
        else:
            print(line, file=sys.stderr, flush=True)

    def _say(self, line: str) -> None:
        print("\n" * self._open_line + line, file=sys.stderr, flush=True)
        self._open_line = False


def _step_line(record: Mapping[str, Any]) -> str:
    minutes, seconds = divmod(round(record["left_s"]), 60)
    return (
        f"step {record['step']}/{record['steps']}  loss {record['loss']:.4f}  "
        f"rate {record['learning_rate']:.2e}  gradient {record['gradient_norm']:.2f}  "
        f"{record['tokens_per_s']:,.0f} tokens/s  {human_bytes(record['memory_bytes'])}  "
        f"{minutes}:{seconds:02d} left"
    )
