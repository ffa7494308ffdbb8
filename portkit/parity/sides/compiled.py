"""Compiled modules are seen from outside: which modules of a model can be watched."""

from __future__ import annotations

from torch import nn


def reachable(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name; of compiled ones the outermost alone: hooks within would undo the fusion."""
    modules = dict(model.named_modules(remove_duplicate=False))
    compiled = [name for name, module in modules.items() if hasattr(module, "_orig_mod")]
    return {
        name: module
        for name, module in modules.items()
        if not any(name.startswith(f"{one}." if one else "_orig_mod") for one in compiled)
    }
