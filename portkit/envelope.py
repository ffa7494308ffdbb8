"""What every JSON object of portkit opens with: its format, its command, and versions.

Imports no package that it tells the version of.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_REPORTED = ("portkit", "torch", "safetensors", "tokenizers", "transformers")


def envelope(command: str, **fields: Any) -> dict[str, Any]:
    """The object of a command: `format`, `command`, `versions`, then `fields`."""
    return {"format": 1, "command": command, "versions": versions(), **fields}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on, where installed."""
    found = {"python": platform.python_version()}
    for package in _REPORTED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
