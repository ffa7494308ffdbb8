"""One process at a time in a run's folder: a second one would clear away what the first is saving.

The system lets go of the lock when its holder ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from portkit.errors import TrainingError

LOCK = ".lock"


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if need be. Raises TrainingError where another process holds it.

    Where the system has no such locks (Windows) nothing is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(
                f"another process is training in {folder}: wait for it, or name another --out"
            ) from error
        yield
