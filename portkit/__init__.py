"""Load released checkpoints into readable PyTorch ports, and prove the ports right.

    import portkit
    loaded = portkit.load("google/gemma-3-270m")      # a directory or a Hub id
    logits = loaded.model(input_ids)                  # (batch, tokens, vocab_size)
    text = loaded.generate("Once upon a time")

Importing this package imports nothing else: torch is loaded when the first name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from portkit.checkpoint import Checkpoint
    from portkit.errors import PortkitError
    from portkit.exporting import export
    from portkit.generation.loaded import Loaded, load
    from portkit.loading import LoadedModel, open_checkpoint

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "portkit.checkpoint",
    "Loaded": "portkit.generation.loaded",
    "LoadedModel": "portkit.loading",
    "PortkitError": "portkit.errors",
    "export": "portkit.exporting",
    "load": "portkit.generation.loaded",
    "open_checkpoint": "portkit.loading",
}

__all__ = [
    "Checkpoint",
    "Loaded",
    "LoadedModel",
    "PortkitError",
    "__version__",
    "export",
    "load",
    "open_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'portkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
