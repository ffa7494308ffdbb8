"""The table of bad input, last part: sound checkpoints, and a fault in what surrounds them.

Names that lead nowhere, no network, arguments, and places that cannot be exported to.
"""

from __future__ import annotations

from pathlib import Path

from parity_tests.engine.damage import (
    CONFIG,
    WEIGHTS,
    Case,
    Damage,
    nothing,
    with_options,
)
from parity_tests.engine.hub_server import NOWHERE, fill_cache


def beside(name: str) -> Damage:
    """A file next to the checkpoint, in a folder if `name` says so."""

    def damage(folder: Path) -> None:
        path = folder.parent / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("not ours")

    return damage


def half_cached(folder: Path) -> None:
    fill_cache(folder.parent / "home", "org/half", {CONFIG: (folder / CONFIG).read_bytes()})


def alias(folder: Path) -> None:
    (folder.parent / "alias").symlink_to(folder)


SURROUNDINGS = [
    Case("neither", nothing, ("'./no'", "neither a folder", "an id"), arguments=("load", "./no")),
    Case("name too long", nothing, ("xxx", "File name too long"), arguments=("load", "x" * 300)),
    Case(
        "a file for a folder",
        nothing,
        (f"{WEIGHTS} is a file", "give the folder"),
        arguments=("load", "{folder}/" + WEIGHTS),
    ),
    Case(
        "no network",
        nothing,
        ("config.json of org/tiny", NOWHERE, "check the network", "local folder"),
        arguments=("load", "org/tiny"),
        hub={},
    ),
    Case(
        "half-downloaded",
        half_cached,
        ("org/half", "HF_HUB_OFFLINE is set", WEIGHTS),
        arguments=("load", "org/half"),
        hub={"HF_HUB_OFFLINE": "1"},
    ),
    Case(
        "revision of a folder",
        nothing,
        ("--revision v2", "{folder} is a folder"),
        arguments=with_options("--revision", "v2"),
    ),
    Case("no argument", nothing, ("Missing argument", "REPO"), arguments=("load",)),
    Case("no such option", nothing, ("--bogus",), arguments=with_options("--bogus")),
    Case("no such command", nothing, ("'lode'",), arguments=("lode", "{folder}")),
    Case(
        "no such dtype",
        nothing,
        ("--dtype", "int8", "bfloat16"),
        arguments=with_options("--dtype", "int8"),
    ),
    Case(
        "no such device here",
        nothing,
        ("--device mps", "--device auto"),
        arguments=with_options("--device", "mps"),
    ),
]

EXPORTS = [
    Case(
        "target not empty",
        beside("new/file"),
        ("{parent}/new is not empty", "new or empty"),
        arguments=with_options("--export", "{parent}/new"),
    ),
    Case(
        "target is a file",
        beside("file"),
        ("{parent}/file is not a folder", "new or empty"),
        arguments=with_options("--export", "{parent}/file"),
    ),
    Case(
        "target in a file",
        beside("file"),
        ("cannot write {parent}/file/copy", "Not a directory", "name another"),
        arguments=with_options("--export", "{parent}/file/copy"),
    ),
    Case(
        "target is the source",
        nothing,
        ("{folder} is the checkpoint itself", "name another"),
        arguments=with_options("--export", "{folder}"),
    ),
    Case(
        "target is a link to the source",
        alias,
        ("{parent}/alias is the checkpoint itself", "name another"),
        arguments=with_options("--export", "{parent}/alias"),
    ),
    Case(
        "target's name too long",
        nothing,
        ("cannot write {parent}", "File name too long", "name another"),
        arguments=with_options("--export", "{parent}/" + "x" * 300),
    ),
    Case(
        "no space",
        nothing,
        ("/proc has 0 bytes free", "make room"),
        arguments=with_options("--export", "/proc/copy"),
        needs_proc=True,
    ),
    Case(
        "disk full midway",
        nothing,
        ("cannot write {parent}/new/copy", "File too large", "nothing was left there", "make room"),
        arguments=with_options("--export", "{parent}/new/copy"),
        disk_is_small=True,
    ),
]
