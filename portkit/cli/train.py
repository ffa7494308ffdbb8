"""`portkit train`: a model from scratch, on text, resumable.

Knows how the settings are spelled and how progress reads; the training is in `portkit.training`.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from portkit.cli import options, training_options
from portkit.cli.output import human_bytes, print_json
from portkit.shown import prose, shown

if TYPE_CHECKING:
    from portkit.training.run import Outcome

_EVERY_S = 10.0
_EVERY_ON_A_TERMINAL_S = 0.5


def command(
    config: training_options.Config,
    data: training_options.Data,
    out: training_options.Out,
    steps: training_options.Steps,
    held_out: training_options.HeldOut = None,
    text_key: training_options.TextKey = None,
    tokenizer: training_options.Tokenizer = "bpe",
    vocab_size: training_options.VocabSize = None,
    context: training_options.Context = 256,
    batch_size: training_options.BatchSize = 32,
    accumulation: training_options.Accumulation = 1,
    learning_rate: training_options.LearningRate = 1e-3,
    final_rate: training_options.FinalRate = None,
    schedule: training_options.ScheduleOption = training_options.Schedule.cosine,
    warmup_steps: training_options.WarmupSteps = None,
    decay_steps: training_options.DecaySteps = None,
    optimizer: training_options.OptimizerOption = training_options.Optimizer.adamw,
    weight_decay: training_options.WeightDecay = 0.1,
    beta1: training_options.Beta1 = 0.9,
    beta2: training_options.Beta2 = 0.95,
    max_gradient_norm: training_options.MaxGradientNorm = 1.0,
    precision: training_options.PrecisionOption = training_options.Precision.float32,
    seed: training_options.Seed = 0,
    activation_checkpointing: training_options.ActivationCheckpointing = False,
    compile: training_options.Compile = False,
    eval_every: training_options.EvalEvery = 200,
    eval_tokens: training_options.EvalTokens = 262144,
    save_every: training_options.SaveEvery = 200,
    keep: training_options.Keep = 3,
    sample_every: training_options.SampleEvery = 0,
    prompt: training_options.Prompt = "",
    track: training_options.Track = None,
    dtype: training_options.PublishedDType = options.DType.auto,
    device: options.DeviceOption = options.Device.auto,
    json: options.Json = False,
) -> None:
    """Train CONFIG on text; RUN/model is then a checkpoint that everything else reads."""
    from portkit.training import recipe as recipes
    from portkit.training.run import Inputs, Watch, train
    from portkit.training.schedule import Shape
    from portkit.training.tracking import TrackerName, open_tracker

    trapezoid = schedule == training_options.Schedule.trapezoid
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
        text_key=text_key,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        device=device,
        dtype="float32" if dtype == options.DType.auto else dtype,
    )
    # torchrun starts several of us, and the first one speaks.
    first = os.environ.get("RANK", "0") == "0"
    watchers: list[Watch] = [_Narrator()]
    if track is not None and first:
        watchers.append(open_tracker(TrackerName(track), out))

    def watch(record: Mapping[str, Any]) -> None:
        for one in watchers:
            one(record)

    outcome = train(inputs, recipe, out, habits, watch)
    if first:
        _print_outcome(outcome, json)


def _print_outcome(outcome: Outcome, json: bool) -> None:
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
                self._say(f"step {record['step']}: {prose(record['text'])}")
            case "note":
                self._say(shown(f"note: {record['text']}"))

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
