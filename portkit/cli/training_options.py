"""The options of `portkit train`, by what they decide. Knows words and help, not what they do."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from portkit.cli import options


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


Config = Annotated[
    str,
    typer.Argument(metavar="CONFIG", help="A variant's name (`portkit list`), or config.json."),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="TEXT",
        help="Text, or JSON, JSON Lines or CSV, also gzipped: a file, a folder, "
        "hf://datasets/OWNER/NAME/FILE, or tinystories.",
    ),
]
Out = Annotated[
    Path,
    typer.Option("--out", metavar="RUN", help="The run's folder; there again, it goes on."),
]
Steps = Annotated[int, typer.Option("--steps", help="Optimizer steps in all.")]
HeldOut = Annotated[
    str | None,
    typer.Option(
        "--held-out", metavar="TEXT", help="Text to evaluate on; else a tenth of the data."
    ),
]
TextKey = Annotated[
    str | None,
    typer.Option("--text-key", metavar="KEY", help='Of records the value that is text: "text".'),
]
Tokenizer = Annotated[
    str,
    typer.Option(
        "--tokenizer",
        metavar="bpe|characters|REPO",
        help="Train one, or take a checkpoint's with its vocabulary.",
    ),
]
VocabSize = Annotated[
    int | None,
    typer.Option("--vocab-size", help="Of a trained BPE, 512 to 32768; else the config's."),
]
Context = Annotated[int, typer.Option("--context", help="Tokens in a row.")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", help="Rows in an optimizer step, over all ranks.")
]
Accumulation = Annotated[
    int, typer.Option("--accumulation", help="Parts that a step's rows are taken in.")
]
LearningRate = Annotated[float, typer.Option("--learning-rate", help="At its peak.")]
FinalRate = Annotated[
    float | None,
    typer.Option("--final-rate", help="At the end; else a tenth of the peak."),
]
ScheduleOption = Annotated[
    Schedule, typer.Option("--schedule", help="How the rate goes on after the warm-up.")
]
WarmupSteps = Annotated[
    int | None, typer.Option("--warmup-steps", help="Else a twentieth of the steps.")
]
DecaySteps = Annotated[
    int | None,
    typer.Option("--decay-steps", help="Of the trapezoid; else a fifth of the steps."),
]
OptimizerOption = Annotated[
    Optimizer,
    typer.Option("--optimizer", help="AdamW for all, or Muon for the hidden matrices."),
]
WeightDecay = Annotated[
    float, typer.Option("--weight-decay", help="Of matrices; vectors do not decay.")
]
Beta1 = Annotated[float, typer.Option("--beta1")]
Beta2 = Annotated[float, typer.Option("--beta2")]
MaxGradientNorm = Annotated[
    float, typer.Option("--max-gradient-norm", help="Clip to it; 0 does not clip.")
]
PrecisionOption = Annotated[
    Precision,
    typer.Option("--precision", help="What matrices are multiplied in; weights are float32."),
]
Seed = Annotated[int, typer.Option("--seed")]
ActivationCheckpointing = Annotated[
    bool,
    typer.Option("--activation-checkpointing", help="Less memory, a third more work."),
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the layers with torch.compile.")]
EvalEvery = Annotated[
    int, typer.Option("--eval-every", help="Steps between evaluations; 0: at the end only.")
]
EvalTokens = Annotated[int, typer.Option("--eval-tokens", help="Held-out tokens at most.")]
SaveEvery = Annotated[int, typer.Option("--save-every", help="Steps between saves.")]
Keep = Annotated[int, typer.Option("--keep", help="Saved steps that are kept.")]
SampleEvery = Annotated[
    int, typer.Option("--sample-every", help="Steps between samples of text; 0: none.")
]
Prompt = Annotated[str, typer.Option("-p", "--prompt", help="What samples begin with.")]
Track = Annotated[
    Tracker | None,
    typer.Option("--track", help="Log to TensorBoard or trackio too, where installed."),
]
PublishedDType = Annotated[
    options.DType, typer.Option("--dtype", help="Of the published weights; auto is float32.")
]
