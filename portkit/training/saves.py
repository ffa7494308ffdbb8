"""Saved steps: each is whole or absent, verified before it is used, and the last few are kept.

    RUN/steps/step-00000200/     torch's distributed checkpoint, and manifest.json
    RUN/steps/LATEST             the name of the newest

A step is written under another name, flushed to disk, given a manifest with the SHA-256 of every
file, renamed, and only then pointed to. Any number of ranks reads what any number wrote. A folder
is a step where its manifest names exactly the files that are there, and they are this run's; what
is anything else is passed over, with a note.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save

from portkit.errors import TrainingError
from portkit.json_reading import read_object
from portkit.training.ranks import Ranks
from portkit.training.stored import load_tensors, misfit

MANIFEST, LATEST = "manifest.json", "LATEST"
_FORMAT = 1
_STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,17})")
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class State:
    """What a step changes: a module and its optimizers, sharded or not."""

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]

    def tensors(self) -> dict[str, Any]:
        """By name, in this rank's shards. Rates and decays are the recipe's, not the state's."""
        model, optimizer = get_state_dict(self.module, self.optimizers, options=_FLAT)
        state = {name: value for name, value in optimizer.items() if name.startswith("state.")}
        return {"model": model, "optimizer": state}

    def put(self, tensors: dict[str, Any]) -> None:
        _, optimizer = get_state_dict(self.module, self.optimizers, options=_FLAT)
        set_state_dict(
            self.module,
            self.optimizers,
            model_state_dict=tensors["model"],
            optim_state_dict={**optimizer, **tensors["optimizer"]},
            options=_FLAT,
        )


class Saves:
    """The steps of one run in `folder`; `note` is told what had to be passed over."""

    def __init__(
        self, folder: Path, keep: int, ranks: Ranks, note: Callable[[str], None] = lambda _: None
    ) -> None:
        self._folder, self._keep, self._ranks, self._note = folder, keep, ranks, note

    def save(self, step: int, state: State) -> None:
        """Save what `step` optimizer steps have made. Raises TrainingError; then nothing changed.

        All ranks call it, and all return when the step is safe.
        """
        target = self._folder / _name(step)
        partial = self._folder / f".{target.name}.partial"
        tensors = state.tensors()
        needed_bytes = self._ranks.sum(torch.tensor(float(_num_bytes(tensors)))).item()
        with self._ranks.first_does() as first, self._explaining(step):
            if first:
                self._make_room(partial, needed_bytes)
        error: Exception | None = None
        try:
            with _single_process_is_meant():
                save(tensors, checkpoint_id=partial, no_dist=self._ranks.world == 1)
        except (OSError, RuntimeError, CheckpointException) as raised:
            error = _cause(raised)
        with self._ranks.first_does() as first, self._explaining(step):
            try:
                if error is not None:
                    raise error
                if first:
                    self._complete(partial, target, step)
            finally:
                if first:
                    shutil.rmtree(partial, ignore_errors=True)

    def load(self, state: State) -> int:
        """Put the newest whole step into `state` and return its number; 0 where none was saved.

        A step that is damaged, or of another model, is passed over, with a note. Raises
        TrainingError where all are.
        """
        with self._ranks.first_does() as first:
            for left in self._folder.glob(".step-*.partial") if first else ():
                _clear(left)
            any_saved = first and bool(self._steps())
        if not self._ranks.tell(any_saved):
            return 0
        tensors = state.tensors()  # which steps the optimizer, for its state to be there
        with self._ranks.first_does() as first:
            step = self._newest(tensors) if first else 0
        step = self._ranks.tell(step)
        folder = self._folder / _name(step)
        try:
            with _single_process_is_meant():
                load_tensors(folder, tensors, no_dist=self._ranks.world == 1)
        except (OSError, RuntimeError, CheckpointException) as error:
            reason = " ".join(str(_cause(error)).split())[:200]
            raise TrainingError(
                f"{folder} cannot be loaded ({reason}): see to disk and memory, or delete it; the "
                "same command then goes on from the step before"
            ) from error
        state.put(tensors)
        return step

    def _make_room(self, partial: Path, needed_bytes: float) -> None:
        _clear(partial)
        partial.mkdir(parents=True)
        free_bytes = shutil.disk_usage(partial).free
        if free_bytes < needed_bytes:
            partial.rmdir()
            raise OSError(0, f"{free_bytes:,} bytes are free and {needed_bytes:,.0f} are needed")

    def _complete(self, partial: Path, target: Path, step: int) -> None:
        """The manifest, the name, the pointer, in this order; then the oldest steps go."""
        files = {path.name: _described(path) for path in sorted(partial.iterdir())}
        _write(partial / MANIFEST, json.dumps({"format": _FORMAT, "step": step, "files": files}))
        _flush(partial)
        _clear(target)  # found damaged when the run went on, and made again
        partial.rename(target)
        pointer = self._folder / f".{LATEST}.partial"
        _write(pointer, target.name + "\n")
        pointer.replace(self._folder / LATEST)
        _flush(self._folder)
        for old in self._steps()[self._keep :]:
            shutil.rmtree(self._folder / _name(old))

    def _newest(self, tensors: dict[str, Any]) -> int:
        steps = self._steps()
        for step in steps:
            damage = _damage(self._folder / _name(step), step, tensors)
            if damage is None:
                return step
            self._note(f"{_name(step)} is passed over: {damage}")
        raise TrainingError(
            f"none of the {len(steps)} saved steps in {self._folder} is whole: delete the run "
            "to begin anew, or bring the folder back from a copy"
        )

    def _steps(self) -> list[int]:
        """Saved steps, the newest first: folders that are called as steps are, and no links."""
        found = (path for path in self._folder.glob("step-*") if _STEP.fullmatch(path.name))
        steps = (int(path.name[5:]) for path in found if path.is_dir() and not path.is_symlink())
        return sorted(steps, reverse=True)

    @contextmanager
    def _explaining(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            held = self._steps()
            safe = f"step {held[0]} is safe" if held else "no step had been saved before"
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise TrainingError(
                f"step {step} cannot be saved in {self._folder} ({reason}); {safe}: make room and "
                "run the same command again, it goes on from there"
            ) from error


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _cause(error: BaseException) -> Exception:
    """The first rank's failure, where torch has gathered them in an exception of its own."""
    if isinstance(error, CheckpointException):
        failure = next(iter(error.failures.values()))
        error = failure[0] if isinstance(failure, tuple) else failure
    if isinstance(error, KeyboardInterrupt):
        raise error
    for cause in _chain(error):
        if isinstance(cause, OSError):
            return cause
    return error if isinstance(error, Exception) else RuntimeError(str(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _damage(folder: Path, step: int, tensors: dict[str, Any]) -> str | None:
    """Why a folder is not the saved step that its name says, of `tensors`; None if it is."""
    try:
        return next(_damages(folder, step, tensors), None)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"


def _damages(folder: Path, step: int, tensors: dict[str, Any]) -> Iterator[str]:
    """What is wrong with it. What follows the first of these has not been looked at."""
    try:
        manifest = read_object(folder / MANIFEST, MANIFEST, TrainingError)
        if manifest["format"] != _FORMAT:
            yield f"it is of format {manifest['format']!r:.40}, this portkit reads {_FORMAT}"
        if manifest["step"] != step:
            yield f"{MANIFEST} is of step {manifest['step']!r:.40}"
        listed = {**manifest["files"]}
    except (TrainingError, LookupError, TypeError) as error:
        yield f"{MANIFEST} cannot be read ({type(error).__name__})"
        return
    # Names that lead out of the folder are none of these.
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(listed.keys() ^ there):
        yield f"{name!r:.80} is {'missing' if name in listed else 'none of its files'}"
    for name, expected in listed.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or _described(path) != expected:
            yield f"{name} is not what was written"
    if problem := misfit(folder, tensors, listed):
        yield problem


def _clear(left: Path) -> None:
    """Remove what a save that did not end has left, or whatever else bears such a name."""
    if left.is_dir() and not left.is_symlink():
        shutil.rmtree(left, ignore_errors=True)
    else:
        left.unlink(missing_ok=True)


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Make the names in a folder durable, where the system lets a folder be opened."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _num_bytes(tensors: dict[str, Any]) -> int:
    values: Iterable[Any] = (value for part in tensors.values() for value in part.values())
    local = (v.to_local() if hasattr(v, "to_local") else v for v in values)
    return sum(v.nbytes for v in local if isinstance(v, torch.Tensor))


@contextmanager
def _single_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
