"""`module:factory`: finding somebody else's factory, calling it, and saying what went wrong.

`factory(directory, dtype, device)` returns the callable that `foreign` runs. Names are resolved as
`python -m` does, with the current folder first; `path/to/file.py:factory` names a file.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from portkit.errors import PortError
from portkit.parity.judging.precision import ran_out_of_memory
from portkit.parity.sides.calling import said
from portkit.parity.sides.compiled import reachable
from portkit.parity.sides.pairs import near

Factory = Callable[[Path, torch.dtype, torch.device], Callable[..., Any]]


@dataclass(frozen=True)
class Made:
    """What a factory returned."""

    call: Callable[..., Any]
    sites: str
    """The table of site pairs that the factory, or what it makes, has as its attribute `sites`."""
    notes: tuple[str, ...] = ()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Those that can be watched; none of what is no module."""
        model = self.call if isinstance(self.call, nn.Module) else getattr(self.call, "__self__", 0)
        return reachable(model) if isinstance(model, nn.Module) else {}


def find(spec: str) -> Factory:
    """The factory that `module:factory` or `path/to/file.py:factory` names. `PortError` if none."""
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise PortError(f"{spec}: give module:factory, or path/to/file.py:factory")
    module = _from_file(Path(where), spec) if where.endswith(".py") else _imported(where, spec)
    factory = getattr(module, name, None)
    if factory is None:
        public = [one for one in vars(module) if not one.startswith("_")]
        raise PortError(f"{spec}: {where} has no {name}{near(name, public)}")
    if not callable(factory):
        raise PortError(f"{spec}: {name} is no function (directory, dtype, device)")
    return factory  # type: ignore[no-any-return]  # whatever the user's is


def make(
    factory: Factory, origin: str, directory: Path, dtype: torch.dtype, device: torch.device
) -> Made:
    """Call a factory; what it returns is in evaluation mode. Raises `PortError`."""
    try:
        call = factory(directory, dtype, device)
    except (Exception, SystemExit) as error:
        if ran_out_of_memory(error):
            raise
        raise PortError(f"{origin} raised {said(error)}") from error
    if not callable(call):
        raise PortError(
            f"{origin} returned {type(call).__name__} {call!r:.60}: it returns a callable "
            "(input_ids, positions, attention_mask, cache=None)"
        )
    notes: tuple[str, ...] = ()
    if isinstance(call, nn.Module):
        _check_dtype(call, origin, dtype)
        if call.training:
            call.eval()
            notes = (f"{origin} returned a model in training mode; it was compared in evaluation",)
    sites = getattr(factory, "sites", None) or getattr(call, "sites", "")
    return Made(call, sites if isinstance(sites, str) else "", notes)


def _check_dtype(model: nn.Module, origin: str, dtype: torch.dtype) -> None:
    held = {one.dtype for one in model.parameters() if one.is_floating_point()}
    if held and dtype not in held:
        words = ", ".join(sorted(str(one).removeprefix("torch.") for one in held))
        raise PortError(
            f"{origin} was asked for {str(dtype).removeprefix('torch.')} and returned a model in "
            f"{words}: have it use the dtype that it is given"
        )


def _imported(name: str, spec: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise PortError(
                f"{spec}: there is no module {error.name} in {here}, and none is installed"
            ) from error
        raise PortError(f"{spec}: importing {name} raised {said(error)}") from error
    except (Exception, SystemExit) as error:
        raise PortError(f"{spec}: importing {name} raised {said(error)}") from error


def _from_file(file: Path, spec: str) -> ModuleType:
    if not file.is_file():
        raise PortError(f"{spec}: there is no file {file}")
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    known = sys.modules.get(file.stem)
    if known is not None and Path(getattr(known, "__file__", "") or "").resolve() == file.resolve():
        return known
    found = spec_from_file_location(file.stem, file)
    assert found is not None, "a file that ends in .py has a loader"
    assert found.loader is not None, "a file that ends in .py has a loader"
    module = module_from_spec(found)
    sys.modules.setdefault(file.stem, module)
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if sys.modules.get(file.stem) is module:
            del sys.modules[file.stem]
        raise PortError(f"{spec}: {file} raised {said(error)}") from error
    return module
