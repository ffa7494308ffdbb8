"""Compiled regions on disk: made in the background once, loaded in milliseconds ever after.

Knows the folder, the process that fills it and torch's loader. A package is named after everything
that it depends on: code, shapes, threads, torch, the processor; a stale one is never found.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor

from portkit.decoding.compiler import PREFETCH, Recipe, as_json
from portkit.decoding.owned import strangeness

Function = Callable[[list[Tensor]], Sequence[Tensor]]
"""A region's: its arguments in order to its results."""
_LOWEST = 19
"""How nice a process can be: whoever decodes meanwhile comes first."""


class Packages:
    """The packages of a folder, and at most one process that makes more of them.

    The process goes on behind the end of this one, at the lowest priority and for about a minute,
    so that the next run finds what a short one could not wait for.

    `say` gets a line for people when compiling is not possible. Nothing here raises: without
    packages decoding goes on as it is.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._loaded: dict[Path, Function] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._given_up = False
        self._started: float | None = None
        self.compile_s = 0.0
        """How long it took until what was asked for was there; 0 where it was there already."""

    def find(self, recipes: Sequence[Recipe], nice: int = _LOWEST) -> list[Function] | None:
        """The recipes' functions, or None if any is not there yet: then it is being made, by a
        process that is so much `nice`r than this one.
        """
        paths = [self.path(one) for one in recipes]
        by_path = dict(zip(paths, recipes, strict=True))
        missing = [(one, path) for path, one in by_path.items() if not path.is_file()]
        if missing:
            self._make(missing, nice)
            return None
        self._stop_clock()
        try:
            for path in by_path.keys() - self._loaded.keys():
                if self._is_strange(self._folder) or self._is_strange(path):
                    return None
                loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
                self._loaded[path] = loader.run
        except (OSError, RuntimeError) as error:
            self._give_up(f"a compiled region cannot be loaded ({error})")
            return None
        return [self._loaded[path] for path in paths]

    def path(self, one: Recipe) -> Path:
        """Where a recipe's package is, or will be."""
        return self._folder / f"{_digest(one)}.pt2"

    def wait(self, recipes: Sequence[Recipe]) -> list[Function] | None:
        """The same, once they are made; None where they cannot be. Who waits has nothing better to
        do: the compiler gets its share of the machine.
        """
        while (found := self.find(recipes, nice=0)) is None and not self._given_up:
            time.sleep(0.05)
        return found

    def close(self) -> None:
        """End the process, if one runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _make(self, missing: list[tuple[Recipe, Path]], nice: int) -> None:
        if self._given_up:
            return
        if self._process is None:
            self._start(missing, nice)
            return
        code = self._process.poll()
        if code is None:
            return
        self._stop_clock()
        self._process = None
        if code != 0:
            log = self._folder / "compiler.log"
            self._give_up(f"the compiler failed (exit code {code}; its words are in {log})")

    def _stop_clock(self) -> None:
        if self._started is not None:
            self.compile_s += time.perf_counter() - self._started
            self._started = None

    def _start(self, missing: list[tuple[Recipe, Path]], nice: int) -> None:
        if not has_compiler():
            self._give_up("no C++ compiler was found (g++, clang++, or the one that CXX names)")
            return
        self._started = time.perf_counter()
        try:
            # Where the compiler keeps code; by itself it takes a folder that anybody could make.
            inner = self._folder.absolute() / "inductor"
            for folder in (self._folder, inner):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                if self._is_strange(folder):
                    return
            # Nobody else's file is written to: what a link leads to stays as it is.
            log_path = self._folder / "compiler.log"
            log_path.unlink(missing_ok=True)
            with log_path.open("xb") as log, TemporaryFile("w+", encoding="utf-8") as recipes:
                json.dump([(as_json(one), str(path.absolute())) for one, path in missing], recipes)
                recipes.seek(0)
                self._process = subprocess.Popen(
                    # -P: the folder that somebody stands in is no place to import from.
                    [sys.executable, "-P", "-m", "portkit.decoding.compiler", str(nice)],
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(inner)},
                    stdin=recipes,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for whoever reads the text
                )
        except OSError as error:
            self._give_up(f"compiled regions cannot be kept in {self._folder} ({error})")

    def _is_strange(self, path: Path) -> bool:
        why = strangeness(path)
        if why is not None:
            self._give_up(
                f"{path} {why}, so that it may hold another's code: remove it, or name a folder of "
                "your own with PORTKIT_CACHE"
            )
        return why is not None

    def _give_up(self, why: str) -> None:
        self._given_up = True
        self._say(f"decoding without compiled regions: {why}")


def default_folder() -> Path:
    """`$PORTKIT_CACHE`, else a folder of portkit's in the user's cache."""
    if named := os.environ.get("PORTKIT_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "portkit" / "compiled"


def has_compiler() -> bool:
    """Whether there is a C++ compiler to make packages with."""
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ([named] if named else ["g++", "clang++"]))


def _digest(one: Recipe) -> str:
    modules = [
        find_spec(f"portkit.decoding.{name}") for name in ("compiler", "compiled_operations")
    ]
    sources = [PREFETCH, *(Path(str(spec.origin)) for spec in modules if spec)]
    parts = [
        torch.__version__,
        _processor(),
        one.code,
        repr((sorted(one.names.items()), one.shapes, one.dtypes, one.growing, one.threads)),
        *(path.read_text(encoding="utf-8") for path in sources),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """What machine code is made for: the compiler uses every instruction that it finds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
