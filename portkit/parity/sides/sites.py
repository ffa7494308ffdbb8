"""Sites: the named tensors of a forward pass, and a way to stand at each of them.

`watching(side, visit)` runs a model with a visitor at every site, in order of execution. A visitor
is given a site's name and tensor and returns the tensor to go on with: the same one to look on,
another one to put it in its place. Recording, comparing, and "compare, then replace by the
reference's" are three visitors of one mechanism, on either side.

A site is a module's output (`model.layers.3.mlp`), a module's input (`…:in`, `…:in.cos`), or a
functional point (`model.layers.3.self_attn#query`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from portkit.architecture import CausalLM, Site
from portkit.nn.moe import ByChoice, Routing
from portkit.nn.rope import RotaryEmbedding
from portkit.parity.probes.probe import Pass
from portkit.parity.sides.compiled import reachable
from portkit.parity.sides.roles import (
    Roles,
    Visit,
    method_watched,
    public_methods,
    visit_choices,
    visit_tables,
)
from portkit.weights import Template

QKV = ("query", "key", "value")
AGAIN = "@"
"""`…router_norm@2` is the second call of a module in one pass, in order of execution."""
EXPERTS = "#experts"


class CannotRun(Exception):
    """A side does not run a pass; says why. That pass is not verified."""


class Watched(Protocol):
    """What can be watched while it runs."""

    def module_sites(self) -> Mapping[str, nn.Module]:
        """Modules by the text-only reference's names."""
        ...

    def visit_output(self, name: str, output: Any, visit: Visit) -> Any:
        """Visit what a module returns: its first tensor, or a router's logits and choice."""
        ...

    def watch_attention(self, visit: Visit) -> Any:
        """A context in which `#query`, `#key`, `#value`, `#mask` and `#context` are visited."""
        ...

    def watch_tables(self, visit: Visit) -> Any:
        """A context in which the rotary tables are visited."""
        ...


class Side(Watched, Protocol):
    """A model that can be run and watched, as the port or as the reference."""

    @property
    def attention(self) -> str:
        """The name of the attention kernel that runs."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What its activations are in."""
        ...

    @property
    def is_partial(self) -> bool:
        """It may do without modules and points of the reference; what it lacks is not verified."""
        ...

    @property
    def model(self) -> nn.Module | None:
        """What holds all its parameters, if one module does."""
        ...

    def run(self, one: Pass, caches: dict[str, Any]) -> Tensor:
        """One pass's logits (batch, tokens, vocab_size), of the last tokens where it says so.

        `caches` holds what earlier passes left, by their names, and takes what this one leaves.
        Raises `CannotRun` where the side is partial and does not run such a pass.
        """
        ...

    def parameters(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Parameters by the other side's names, those that there are."""
        ...

    def plain_experts(self) -> Any:
        """A context in which experts run in the form that takes float64."""
        ...

    def table_modules(self) -> Mapping[str, nn.Module]:
        """The modules that make the rotary tables, which depend on positions alone."""
        ...

    def kernels(self) -> Mapping[str, Callable[..., Any]]:
        """Its own attention kernels: (module, query, key, value, mask, …) each."""
        ...

    def other_kernel(self) -> Any:
        """A context in which it runs with the attention kernel that was not asked for, if any."""
        ...


def parameters_of(side: Watched) -> dict[str, nn.Parameter]:
    """A side's parameters by its sites' names, a tied one under each of its names."""
    return {
        f"{name}.{own}": parameter
        for name, module in side.module_sites().items()
        for own, parameter in module.named_parameters(recurse=False)
    }


class SiteTable:
    """The sites that a family declares: which names are observed, and what their dimensions are.

    `layers` keeps to the sites of some layers.
    """

    def __init__(self, sites: Iterable[Site], layers: range | None = None) -> None:
        self._templates = [(Template(site.name), site) for site in sites]
        points = {template.text.partition("#")[2] for template, _ in self._templates}
        self._points = [Template(point) for point in points if point]
        self._words: dict[str, bool] = {}
        self._layers = layers
        self._known: dict[str, str | None] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The templates that are declared."""
        return tuple(template.text for template, _ in self._templates)

    def dims(self, name: str) -> str | None:
        """The dimensions of a site, None where it is not declared or not among the layers.

        A module called again in a pass has those of its first call.
        """
        if name not in self._known:
            base, _, role = name.partition(":")
            base = base.partition(AGAIN)[0]
            site = next(filter(None, (self._match(*one, base) for one in self._templates)), None)
            dims = None if site is None else site.dims
            if site is not None and role == "in":
                dims = site.inputs or (site.dims if "norm" in base else "batch position channel")
            elif site is not None and role:
                dims = self._dims_of_role(site, role.removeprefix("in."))
            self._known[name] = dims
        return self._known[name]

    def is_point(self, word: str) -> bool:
        """Whether some functional point is called so."""
        if word not in self._words:
            self._words[word] = any(one.match(word) is not None for one in self._points)
        return self._words[word]

    def _dims_of_role(self, site: Site, role: str) -> str | None:
        is_table = role in {"cos", "sin"}
        return "batch position channel" if is_table or role in site.given else None

    def _match(self, template: Template, site: Site, name: str) -> Site | None:
        places = template.match(name)
        if places is None:
            return None
        if self._layers is not None and int(places.get("layer", -1)) not in self._layers:
            return None
        return site


@contextmanager
def watching(side: Watched, table: SiteTable, visit: Visit) -> Iterator[None]:
    """Have `visit` called at every declared site while a model of `side` runs."""

    def declared(name: str, tensor: Tensor) -> Tensor:
        return visit(name, tensor) if table.dims(name) is not None else tensor

    with ExitStack() as stack:
        for name, module in side.module_sites().items():
            if table.dims(name) is not None:
                for handle in _hooks(side, name, module, declared):
                    stack.callback(handle.remove)
            for word in filter(table.is_point, public_methods(module)):
                if table.dims(f"{name}#{word}") is not None:
                    stack.enter_context(method_watched(name, module, word, declared))
        stack.enter_context(side.watch_attention(declared))
        stack.enter_context(side.watch_tables(declared))
        yield


def _hooks(side: Watched, name: str, module: nn.Module, visit: Visit) -> list[Any]:
    roles, called = Roles(module), count(1)
    this = name

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal this
        number = next(called)
        this = name if number == 1 else f"{name}{AGAIN}{number}"
        return roles.visit(args, kwargs, lambda role, tensor: visit(f"{this}:in{role}", tensor))

    def after(_: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], output: Any) -> Any:
        return side.visit_output(this, output, visit)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


def visible(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """The effective boolean mask (batch or 1, 1, queries, keys), whatever form a kernel was given.

    None is causal. A floating mask is added to the scores: zero is visible.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask is None:
        ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        return ones.tril(num_keys - num_queries)[None, None]
    if mask.dtype != torch.bool:
        mask = mask == 0
    return mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the eager kernel wants it: zero where visible, else the dtype's lowest."""
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest)


def visit_inputs(
    name: str, visit: Visit, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Visit a kernel's inputs. A mask that the visitor leaves as it is keeps its form."""
    effective = visible(mask, query, key)
    seen = visit(f"{name}#mask", effective)
    query, key, value = (
        visit(f"{name}#{role}", one) for role, one in zip(QKV, (query, key, value), strict=True)
    )
    if seen is not effective and not (
        seen.shape[2:] == effective.shape[2:] and bool((seen == effective).all())
    ):
        mask = seen
    return query, key, value, mask


def visit_routing(router: str, visit: Visit, routing: Routing) -> Routing:
    """Visit a router's logits, under its own name, and then its choice, under its block's.

    The choice is always the weights of all experts, zero where not chosen, whatever form a router
    gives it in. One that the visitor leaves as it is keeps its form.
    """
    logits = visit(router, routing.logits)
    weights, experts = routing.weights, routing.experts
    effective = routing.scores
    seen = visit(choice_of(router), effective)
    if seen is not effective:
        most = int((seen != 0).sum(-1).max())
        weights, experts = seen.topk(max(1, most))
    return Routing(logits, weights, experts)


def choice_of(router: str) -> str:
    """`model.layers.0.mlp.gate` to `model.layers.0.mlp#experts`."""
    return router.rpartition(".")[0] + EXPERTS


class PortSide:
    """Our own model. `length`: how many tokens its caches are made for.

    `is_partial`: somebody has changed it, fused or compiled, and what it lacks is not amiss.
    """

    attention = "port"

    def __init__(self, model: CausalLM, length: int, is_partial: bool = False) -> None:
        self.model, self.length, self.is_partial = model, length, is_partial
        self._modules = reachable(model)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @torch.no_grad()
    def run(self, one: Pass, caches: dict[str, Any]) -> Tensor:
        batch = len(one.input_ids)
        cache = caches.pop(one.continues or "", None) or self.model.new_cache(batch, self.length)
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
        return visit(name, output)

    def parameters(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        held = parameters_of(self)
        return {name: held[name] for name in names if name in held}

    def plain_experts(self) -> Any:
        return nullcontext()

    @contextmanager
    def watch_attention(self, visit: Visit) -> Iterator[None]:
        with ExitStack() as stack:
            for path, module in self._modules.items():
                if path.endswith(".attend"):
                    name = path.removesuffix(".attend")
                    for handle in self._kernel_hooks(name, module, visit):
                        stack.callback(handle.remove)
            yield

    def _kernel_hooks(self, name: str, kernel: nn.Module, visit: Visit) -> list[Any]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> Any:
            return visit_inputs(name, visit, *args)

        def after(_: nn.Module, __: tuple[Any, ...], context: Tensor) -> Tensor:
            return visit(f"{name}#context", context)

        return [kernel.register_forward_pre_hook(before), kernel.register_forward_hook(after)]

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
