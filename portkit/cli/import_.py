"""`portkit import`: another project's checkpoint file, into the Hugging Face layout.

Knows which formats there are and how the outcome reads. The formats are in `portkit.importers`.
"""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from portkit.cli import options
from portkit.cli.output import human_bytes, plural, print_json, say


class Format(StrEnum):
    llama2c = "llama2c"


def command(
    format: Annotated[Format, typer.Argument(metavar="FORMAT", help="What FILE is: llama2c.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The weights, e.g. stories15M.bin.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder, new or empty.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            metavar="FILE",
            help="llama2.c's tokenizer.bin, or the SentencePiece .model behind it.",
        ),
    ] = None,
    rope_theta: Annotated[
        float | None,
        typer.Option(
            "--rope-theta",
            metavar="BASE",
            help="The rotary base; else what a legacy file's tables say, or 10000.",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Write a llama2.c model (legacy, v1 or q8_0) as a folder that Transformers reads too."""
    from portkit.importers.llama2c import import_llama2c

    imported = import_llama2c(file, directory, tokenizer=tokenizer, rope_theta=rope_theta)
    header = imported.header
    for note in imported.notes:
        say(f"portkit: note: {note}", aside=True)
    if json:
        print_json(
            "import",
            model_type=imported.model_type,
            parameters=imported.parameters,
            tensors=imported.tensors,
            bytes=imported.weight_bytes,
            source_format=header.source_format,
            tokenizer=None if tokenizer is None else str(tokenizer),
            directory=str(directory),
        )
        return
    say(
        f"read   {file}: {format} {header.source_format}, {imported.parameters:,} parameters, "
        f"{plural(header.num_hidden_layers, 'layer')}, {'tied' if header.tied else 'untied'} head"
    )
    say(
        f"wrote  {directory}: {plural(imported.tensors, 'tensor')}, "
        f"{human_bytes(imported.weight_bytes)} in float32, "
        + (f"tokenizer of {plural(header.vocab_size, 'piece')}" if tokenizer else "no tokenizer")
    )
    folder = shlex.quote(str(directory))
    if tokenizer:
        say(f'next   portkit generate {folder} -p "Once upon a time"')
    else:
        say(f"next   portkit load {folder} (for text, import again with --tokenizer FILE)")
