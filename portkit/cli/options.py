"""Options that several verbs share, spelled once. Knows words and defaults, not what they do."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

Repo = Annotated[
    str, typer.Argument(metavar="REPO", help="A directory, or a repository id on the Hub.")
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a Hub repository.", metavar="REV"),
]


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Attention(StrEnum):
    sdpa = "sdpa"
    eager = "eager"


class Quantize(StrEnum):
    int8 = "int8"
    int4 = "int4"


class Engine(StrEnum):
    auto = "auto"
    fast = "fast"
    readable = "readable"


DTypeOption = Annotated[
    DType, typer.Option("--dtype", help="Compute in this dtype; auto is the checkpoint's own.")
]
DeviceOption = Annotated[
    Device, typer.Option("--device", help="Where to compute; auto takes the fastest there is.")
]
AttentionOption = Annotated[
    Attention, typer.Option("--attention", help="Which attention kernel the port runs.")
]
EngineOption = Annotated[
    Engine,
    typer.Option(
        "--engine",
        help="What decodes: the readable model, bit for bit the reference; or the fast path, equal "
        "within rounding. auto is fast where a model is large enough to gain.",
    ),
]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(
        "--quantize",
        help="Hold the matrices in 8 or 4 bits, the head in 8: fewer bytes a token, other logits.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")
]


def _each_key(given: list[str] | None) -> list[str] | None:
    return given and [key for keys in given for key in keys.split(",")]


IgnoreConfig = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-config",
        metavar="KEY[,KEY]",
        callback=_each_key,
        help="Go on although these keys of config.json, or of generation_config.json, are not "
        "understood; the result says that they were ignored.",
    ),
]
