"""Our own port as a side of a comparison. Knows the modules that our families are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from portkit.architecture import CausalLM
from portkit.nn.moe import ByChoice, Routing
from portkit.nn.rope import RotaryEmbedding
from portkit.parity.probes.probe import Pass
from portkit.parity.sides.attention import visit_inputs
from portkit.parity.sides.compiled import reachable
from portkit.parity.sides.roles import Visit, visit_choices, visit_tables, visit_value
from portkit.parity.sides.routing import visit_routing
from portkit.parity.sides.sites import KERNEL, weights_of

SHORT = 16
"""Tokens that a model is run for to find out its sites, and some more."""


class PortSide:
    """Our own model. `length`: how many tokens its caches are made for, at the least.

    `is_partial`: somebody has changed it, fused or compiled, and what it lacks is not amiss.
    """

    attention = "port"
    takes_positions = True

    def __init__(self, model: CausalLM, length: int = SHORT, is_partial: bool = False) -> None:
        self.model, self.length, self.is_partial = model, length, is_partial
        self._modules = reachable(model)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def run(self, one: Pass, caches: dict[str, Any]) -> Tensor:
        batch = len(one.input_ids)
        cache = caches.pop(one.continues or "", None)
        if cache is None:
            cache = self.model.new_cache(batch, max(self.length, one.num_tokens))
        hidden = self.model.hidden_states(one.input_ids, one.positions, cache, one.attention_mask)
        cache.advance(one.num_tokens)
        caches[one.name] = cache
        return self.model.logits(hidden[:, -(one.num_logits or one.num_tokens) :])

    def differentiable_logits(self, input_ids: Tensor) -> Tensor:
        """Logits of (batch, tokens) ids in one pass without a cache, with their graph."""
        logits: Tensor = self.model(input_ids)
        return logits

    def module_sites(self) -> Mapping[str, nn.Module]:
        return self._modules

    def visit_output(self, name: str, output: Any, visit: Visit) -> Any:
        if isinstance(output, Routing):
            return visit_routing(name, visit, output)
        if isinstance(output, ByChoice):
            return visit_choices(name, visit, output)
        return visit_value(name, output, visit)

    def parameters(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        held = weights_of(self)
        return {name: held[name] for name in names if name in held}

    def plain_experts(self) -> Any:
        return nullcontext()

    @contextmanager
    def watch_attention(self, visit: Visit) -> Iterator[None]:
        with ExitStack() as stack:
            for path, module in self._modules.items():
                if path.endswith(KERNEL):
                    name = path.removesuffix(KERNEL)
                    for handle in self._kernel_hooks(name, module, visit):
                        stack.callback(handle.remove)
            yield

    def _kernel_hooks(self, name: str, kernel: nn.Module, visit: Visit) -> list[Any]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> Any:
            return visit_inputs(name, visit, args[:3], args[3])

        def after(_: nn.Module, __: tuple[Any, ...], context: Tensor) -> Tensor:
            return visit(f"{name}#context", context)

        return [kernel.register_forward_pre_hook(before), kernel.register_forward_hook(after)]

    def points_of(self, name: str) -> bool:
        return name.endswith(KERNEL)

    def table_modules(self) -> Mapping[str, nn.Module]:
        return {n: m for n, m in self._modules.items() if isinstance(m, RotaryEmbedding)}

    @contextmanager
    def watch_tables(self, visit: Visit) -> Iterator[None]:
        with ExitStack() as stack:
            for path, module in self.table_modules().items():
                prefix, _, kind = path.partition("rotary_emb")
                after = _table_hook(f"{prefix.rstrip('.')}#", kind, visit)
                stack.callback(module.register_forward_hook(after).remove)
            yield

    def kernels(self) -> Mapping[str, Callable[..., Any]]:
        return {}

    def other_kernel(self) -> Any:
        return nullcontext()


def _table_hook(prefix: str, suffix: str, visit: Visit) -> Callable[..., Any]:
    def after(_: nn.Module, __: tuple[Any, ...], tables: tuple[Tensor, Tensor]) -> Any:
        return visit_tables(tables, lambda role, table: visit(f"{prefix}{role}{suffix}", table))

    return after
