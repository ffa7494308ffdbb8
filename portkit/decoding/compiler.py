"""Compiling regions, in a process of its own: whoever decodes waits for no compiler.

    python -P -m portkit.decoding.compiler NICE < RECIPES

RECIPES is a JSON list of recipes and where their packages go, NICE how much nicer than its parent
the process is. A package holds machine code that torch runs without its compiler; nothing else in
the fast path imports that. What is written on the way is its user's alone. Knows torch's export and
inductor.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, fx, nn

from portkit.decoding.compiled_operations import IN_PLACE_OF


@dataclass(frozen=True)
class Recipe:
    """A region to compile: its code, and shape, dtype and what grows of each argument.

    `growing[i]` names the size of argument i's first dimension, where that changes from call to
    call, and is 0 in its shape; None where nothing does.
    """

    code: str
    names: dict[str, str]
    """What stands for something in the code, and what: a `module`, or a `module:attribute`."""
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    growing: tuple[str | None, ...]
    threads: int


def recipe(
    graph: fx.Graph, arguments: Sequence[Tensor], growing: Sequence[str | None], threads: int
) -> Recipe:
    """What compiles a region that is called with such arguments."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in copy.nodes:
        if node.op == "call_function":
            node.target = IN_PLACE_OF.get(node.target, node.target)
    code = copy.python_code("self")
    return Recipe(
        code.src,
        {name: _whence(one) for name, one in code.globals.items()},
        tuple(
            tuple(one.shape) if name is None else (0, *one.shape[1:])
            for one, name in zip(arguments, growing, strict=True)
        ),
        tuple(one.dtype for one in arguments),
        tuple(growing),
        threads,
    )


def as_json(one: Recipe) -> dict[str, Any]:
    """A recipe in plain values."""
    return {**vars(one), "dtypes": [str(dtype).removeprefix("torch.") for dtype in one.dtypes]}


def from_json(saved: dict[str, Any]) -> Recipe:
    """The recipe that `as_json` gave."""
    return Recipe(
        saved["code"],
        saved["names"],
        tuple(map(tuple, saved["shapes"])),
        tuple(getattr(torch, word) for word in saved["dtypes"]),
        tuple(saved["growing"]),
        saved["threads"],
    )


def _whence(value: Any) -> str:
    if isinstance(value, ModuleType):
        path = value.__name__
    elif isinstance(value, float):  # inf and nan
        path = f"math:{value}"
    else:
        module = "types" if value is NoneType else value.__module__
        path = f"{module}:{value.__qualname__}"
    assert _found(path) is value, f"{value!r} is not what {path} leads to"
    return path


def _found(path: str) -> Any:
    module, _, attribute = path.partition(":")
    imported = import_module(module)
    return attrgetter(attribute)(imported) if attribute else imported


class _Region(nn.Module):
    def __init__(self, one: Recipe) -> None:
        super().__init__()
        names = {name: _found(path) for name, path in one.names.items()}
        exec(one.code, names)
        self._run = names["forward"]

    def forward(self, *arguments: Tensor) -> Any:
        return self._run(self, *arguments)


def compile_region(one: Recipe, package: Path) -> None:
    """Write the compiled region; a package appears whole or not at all."""
    from torch._inductor import aoti_compile_and_package
    from torch.export import Dim, export

    torch.set_num_threads(one.threads)
    sizes = {name: Dim(name, min=2) for name in one.growing if name is not None}
    # Examples of different lengths, or two sizes would be taken for one.
    lengths = {name: 64 + 16 * index for index, name in enumerate(sizes)}
    arguments, dynamic = [], []
    for shape, dtype, name in zip(one.shapes, one.dtypes, one.growing, strict=True):
        size = shape if name is None else (lengths[name], *shape[1:])
        arguments.append(torch.zeros(size, dtype=dtype))
        dynamic.append(None if name is None else {0: sizes[name]})
    unfinished = package.with_suffix(f".{os.getpid()}.pt2")
    with torch.no_grad():
        exported = export(_Region(one), tuple(arguments), dynamic_shapes=(tuple(dynamic),))
        aoti_compile_and_package(
            exported, package_path=str(unfinished), inductor_configs=_INDUCTOR_OPTIONS
        )
    unfinished.replace(package)


PREFETCH = Path(__file__).with_name("prefetch.h")
"""A header that is put before the generated code."""
_INDUCTOR_OPTIONS = {
    # The one option that becomes a compiler's flag as it is: torch has none for further flags.
    "cpp.enable_floating_point_contract_flag": f"fast -include {shlex.quote(str(PREFETCH))}",
    # A header that was compiled before would have to come first, and is not used behind another.
    "aot_inductor.precompile_headers": False,
    "size_asserts": False,
}


if __name__ == "__main__":
    os.nice(int(sys.argv[1]))
    os.umask(0o077)
    for one, path in json.load(sys.stdin):
        compile_region(from_json(one), Path(path))
