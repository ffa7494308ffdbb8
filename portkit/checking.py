"""Every byte of a checkpoint read once: are its values finite, are its files what was promised?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

from portkit.checkpoint import Checkpoint, Files, reading
from portkit.errors import CheckFailed


def check(checkpoint: Checkpoint, advance: Callable[[], None] = lambda: None) -> dict[str, str]:
    """File name to sha256. `CheckFailed` on values that are not finite, or on another digest.

    `advance` is called after each tensor.
    """
    for info in checkpoint.tensors.values():
        tensor = checkpoint.read(info.name)
        # Of one byte, floats are never loaded but may be dropped, and torch has no isfinite.
        finite = (tensor.float() if tensor.element_size() == 1 else tensor).isfinite()
        if not bool(finite.all()):
            raise CheckFailed(
                f"{info.file}: {info.name} holds {int((~finite).sum())} values that are not "
                f"finite (of {tensor.numel()}): damaged, or its training diverged; fetch the "
                "checkpoint again"
            )
        advance()
    return {name: _sha256(checkpoint.files, name) for name in checkpoint.weight_files}


def _sha256(files: Files, name: str) -> str:
    path = files.path(name)
    with reading(name), path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    promised = path.resolve().name  # the Hub's cache names large files by their digest
    if re.fullmatch("[0-9a-f]{64}", promised) and promised != found:
        raise CheckFailed(
            f"{name} has sha256 {found} where the Hub's cache says {promised}; fetch the "
            "checkpoint again"
        )
    return found
