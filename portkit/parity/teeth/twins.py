"""Twins: our model built of another config, holding the same tensors.

A twin tells what a field of the config does: whether the checkpoint's tensors fit it at all, which
modules come out otherwise, and what it makes of a pass. What is built alike and given what was
recorded is not run: it gives back what was recorded. Knows models of ours, and no family.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from portkit.architecture import CausalLM
from portkit.errors import Mismatch
from portkit.loading import Blueprint, place, place_constants, skeleton_of
from portkit.parity.judging.local import Trace
from portkit.parity.sides.sites import AGAIN, SiteTable

_TORCHS_OWN = frozenset(vars(nn.Module())) | {"padding_idx"}
"""Attributes that say nothing of a forward pass. The row of padding decides gradients alone."""
KERNEL = ".attend"


def twin_of(blueprint: Blueprint, config: Any, model: CausalLM) -> CausalLM:
    """The model of `config` with `model`'s parameters.

    Raises `Mismatch` where the checkpoint's tensors do not fit it.
    """
    twin = skeleton_of(blueprint.architecture, config, blueprint.attention)
    held = dict(model.named_parameters(remove_duplicate=False))
    wanted = dict(twin.named_parameters(remove_duplicate=False))
    for name, one in wanted.items():
        if name in held and held[name].shape != one.shape:
            raise Mismatch(f"{name} would be {list(one.shape)}, not {list(held[name].shape)}")
    modules, first = dict(twin.named_modules()), next(iter(held.values()))
    if wanted.keys() != held.keys() or _shared(wanted) != _shared(held):
        held |= _read(blueprint, twin, held)
    for names in _shared(wanted):
        tensor = next(held[name] for name in names if name in held)
        for name in names:
            place(modules, name, tensor)
    place_constants(twin, first.device, first.dtype)
    return twin


def _read(
    blueprint: Blueprint, twin: CausalLM, held: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """What the checkpoint has for parameters of the twin that the model does not hold."""
    infos, first = blueprint.checkpoint.tensors, next(iter(held.values()))
    try:
        plan = blueprint.architecture.weight_map.plan(
            twin, {name: info.shape for name, info in infos.items()}
        )
    except Mismatch as error:  # of which here only the names are wanted
        said = str(error).partition(";")[0]
        raise Mismatch(said.partition("config: ")[2] or said) from error
    return {
        one.parameter: nn.Parameter(
            one.assemble(blueprint.checkpoint.read, first.dtype, first.device)
        )
        for one in plan.claims
        if one.parameter not in held
    }


def _shared(parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Names by the parameter that they are of: tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, one in parameters.items():
        names.setdefault(id(one), []).append(name)
    return list(names.values())


def built_otherwise(twin: CausalLM, model: CausalLM) -> dict[str, bool]:
    """The modules of `twin` that are not as in `model`, in themselves and not in their parts.

    False where they differ in nothing but the part of the config that they hold: they may compute
    the same. The config as a whole does not count: who reads it is seen by `Noting`.
    """
    theirs, found = dict(model.named_modules()), {}
    for name, ours in twin.named_modules():
        if name not in theirs or type(ours) is not type(theirs[name]):
            found[name] = True
            continue
        pair = _own(ours, twin.config), _own(theirs[name], model.config)
        if not _same(*pair):
            computed = [{k: v for k, v in one.items() if not is_dataclass(v)} for one in pair]
            found[name] = not _same(*computed)
    return found


def _own(module: nn.Module, config: Any) -> dict[str, Any]:
    """What is known of a module without its parts."""
    attributes = {
        name: value
        for name, value in vars(module).items()
        if name not in _TORCHS_OWN and value is not config
    }
    parts = {name: part is None for name, part in vars(module)["_modules"].items()}
    return {**attributes, "": [parts, vars(module)["_parameters"], vars(module)["_buffers"]]}


def _same(ours: Any, theirs: Any) -> bool:
    """Equal values of one type; of parameters the same memory."""
    if ours is theirs or type(ours) is not type(theirs):
        return ours is theirs
    if isinstance(ours, Mapping):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, tuple | list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, nn.Parameter):
        return bool(ours.data_ptr() == theirs.data_ptr() and ours.shape == theirs.shape)
    if isinstance(ours, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return bool(ours == theirs)


class Noting:
    """Stands in for a config, and remembers which of its fields were read."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        derived = getattr(type(self._config), name, None)
        if isinstance(derived, property) and derived.fget is not None:
            return derived.fget(self)  # and so the fields that it reads
        return getattr(self._config, name)

    def taken(self) -> set[str]:
        """What was read so far; from here on it is counted anew."""
        read, self.read = self.read, set()
        return read


class Shelf:
    """What was recorded of a pass, where the stand-ins of a twin find it."""

    def __init__(self) -> None:
        self.trace: Mapping[str, Tensor] = {}
        self.input_ids: Tensor | None = None
        self._calls: Counter[str] = Counter()

    def put(self, trace: Trace, input_ids: Tensor) -> None:
        self.trace, self.input_ids = trace, input_ids
        self._calls.clear()

    def restart(self) -> None:
        """Count calls of modules anew: another model runs the pass."""
        self._calls.clear()

    def take(self, site: str) -> Tensor | None:
        """What the next call of a module gave."""
        self._calls[site] += 1
        number = self._calls[site]
        return self.trace.get(site if number == 1 else f"{site}{AGAIN}{number}")


class Recorded(nn.Module):
    """Stands in for a module that is given what was recorded: gives back what was recorded."""

    def __init__(self, original: nn.Module, site: str, shelf: Shelf) -> None:
        super().__init__()
        self._site, self._shelf = site, shelf
        self._original = (original,)  # in a tuple, so that its parts are not found as modules

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["_original"][0], name)

    def forward(self, *given: Any, **named: Any) -> Any:
        found = self._shelf.take(self._site)
        if found is None or named or not (self._is_kernel or self._is_observed(given)):
            return self._original[0](*given, **named)
        return found.clone()  # in-place operations may follow

    @property
    def _is_kernel(self) -> bool:
        return "#" in self._site  # whose query, key, value and mask are sites

    def _is_observed(self, given: Sequence[Any]) -> bool:
        """Whether all that a module is given is a site, or the pass's own."""
        if len(given) != 1 or not isinstance(given[0], Tensor):
            return False
        return given[0].is_floating_point() or given[0] is self._shelf.input_ids


def stand_in(twin: CausalLM, run: Iterable[str], table: SiteTable, shelf: Shelf) -> None:
    """Have the recording stand in for all observed modules but `run`, and those around them."""
    kept = {""}
    for name in run:
        parts = name.split(".")
        kept |= {".".join(parts[:end]) for end in range(len(parts) + 1)}
    for path, site in _outermost(twin, kept, table):
        parent, _, own = path.rpartition(".")
        module = twin.get_submodule(path)
        setattr(twin.get_submodule(parent), own, Recorded(module, site, shelf).eval())


def _outermost(twin: CausalLM, kept: set[str], table: SiteTable) -> Iterator[tuple[str, str]]:
    """Modules to stand in for, and their sites: the largest that are plain, and kernels."""
    taken = ""
    for path, module in list(twin.named_modules()):
        if path in kept or (taken and path.startswith(taken)):
            continue
        base = path.removesuffix(KERNEL)
        site = path if base == path else f"{base}#context"
        if table.dims(site) is not None and (base != path or _is_plain(module)):
            taken = f"{path}."
            yield path, site


def _is_plain(module: nn.Module) -> bool:
    """Whether a module takes one tensor and gives one: a router gives more."""
    forward = type(module).forward
    takes_one = forward.__code__.co_argcount == 2 and not forward.__code__.co_kwonlyargcount
    return takes_one and forward.__annotations__.get("return") in ("Tensor", Tensor)
