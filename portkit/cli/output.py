"""How results reach the reader: JSON envelopes, and numbers as people write them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Protocol

import typer

from portkit.envelope import envelope
from portkit.shown import as_json, prose, shown


def print_json(command: str, **fields: Any) -> None:
    """Print the one JSON object of a command."""
    print(as_json(envelope(command, **fields)))


def say(line: str, *, aside: bool = False) -> None:
    """Print one line for people, which may hold foreign words; `aside`: on stderr."""
    print(shown(line), file=sys.stderr if aside else sys.stdout)


def say_more(text: str) -> None:
    """Print a piece of what a model says: as it is, but for what a terminal would obey."""
    print(prose(text) if sys.stdout.isatty() else text, end="", flush=True)


@contextmanager
def stdout_kept() -> Iterator[None]:
    """What others print within, a port or a library, goes to stderr: stdout is the answer's."""
    with redirect_stdout(sys.stderr), _descriptor_kept():
        yield


@contextmanager
def _descriptor_kept() -> Iterator[None]:
    """The same of what is no Python, which prints past it; streams that are closed stay so."""
    if sys.__stdout__ is not None:
        sys.__stdout__.flush()
    try:
        before = os.dup(1)
        os.dup2(2, 1)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def human_bytes(count: float) -> str:
    """`536223056` as `536.2 MB` (powers of ten, as disks and model cards count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def plural(count: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def coloured(word: str, colour: str) -> str:
    """The word in bold colour where a person looks on and has not set NO_COLOR."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return word
    return typer.style(word, fg=colour, bold=True)


class Advance(Protocol):
    """One step further; `doing` says at what."""

    def __call__(self, doing: str = "") -> None: ...


@contextmanager
def progress_bar(label: str, length: int) -> Iterator[Advance]:
    """A bar on stderr where a person looks on; yields what to call at each of `length` steps."""
    with typer.progressbar(
        length=length, label=label, file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:

        def advance(doing: str = "") -> None:
            bar.label = shown(f"{label}: {doing}") if doing else label
            bar.update(1)

        yield advance
