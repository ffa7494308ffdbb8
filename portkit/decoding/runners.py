"""How a region is run: as torch runs it, by Triton's kernels, or compiled in this process.

The last two are for CUDA devices; regions compiled ahead, for the CPU, are `packages`'. Knows
graphs; imports a compiler only where one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from portkit.decoding import operations
from portkit.decoding.fusing import fused
from portkit.decoding.packages import Function


@dataclass(frozen=True)
class Runner:
    """`function` makes a region's function of its graph. `likeliest`, if any, takes what a head
    reads, (1, 1, hidden_size), and its matrix to the token that greedy decoding goes on with.
    """

    function: Callable[[fx.Graph], Function]
    likeliest: Callable[[Tensor, Tensor], Tensor] | None = None


def _as_torch_runs_it(graph: fx.Graph) -> Function:
    forward: Callable[..., Sequence[Tensor]] = fx.GraphModule({}, graph).forward
    return lambda arguments: forward(*arguments)


AS_TORCH_RUNS_IT = Runner(_as_torch_runs_it)


def by_kernels() -> Runner:
    """With chains of operations fused, by `kernel_operations`."""
    from portkit.decoding.kernel_operations import IN_PLACE_OF, likeliest

    return Runner(lambda graph: _as_torch_runs_it(fused(graph, IN_PLACE_OF)), likeliest)


def compiling(say: Callable[[str], None], backend: str = "inductor") -> Runner:
    """Compiled when first called, for each size of what is visible of the caches.

    A region that cannot be compiled runs as torch runs it, and `say` gets a line for the first.
    """
    failed: list[str] = []

    def function(graph: fx.Graph) -> Function:
        plain = _as_torch_runs_it(graph)
        module = fx.GraphModule({}, fused(graph, {operations.project: _project}))
        compiled: Any = torch.compile(module, fullgraph=True, dynamic=False, backend=backend)

        def run(arguments: list[Tensor]) -> Sequence[Tensor]:
            if not failed:
                try:
                    results: Sequence[Tensor] = compiled(*arguments)
                except Exception as error:  # whatever a compiler raises
                    failed.append(f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}")
                    say(f"regions cannot be compiled ({failed[0]:.200}): they run as torch does it")
                else:
                    return results
            return plain(arguments)

        return run

    return Runner(function)


def default_runner(device: torch.device) -> Runner:
    """Kernels on a CUDA device with Triton, torch's own operations elsewhere."""
    return by_kernels() if device.type == "cuda" and find_spec("triton") else AS_TORCH_RUNS_IT


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `operations.project`; for one row a sum that the compiler makes a kernel of by itself."""
    if x.shape[0] > 1:
        return F.linear(x, weight, bias)
    product = (weight.float() * x.reshape(1, -1).float()).sum(-1).to(weight.dtype)
    return (product if bias is None else product + bias).view(1, 1, -1)
