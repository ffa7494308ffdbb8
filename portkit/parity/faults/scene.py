"""What a fault can see: one pass of the reference as it was recorded, and what is public of it.

A scene gives the recorded tensor of a site, a parameter, the pass itself. In float64 it gives the
same upcast, so that one recipe answers both questions, of bits and of functions. Knows no fault.
"""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from portkit.parity.judging.local import Trace
from portkit.parity.probes.probe import Pass, Probe
from portkit.parity.reference import Reference, by_name
from portkit.parity.sides.sites import SiteTable
from portkit.parity.subject.traits import traits_of

_LAYER = re.compile(r"(?:(?<=\blayers)|(?<=\blayer)|(?<=\bblocks)|(?<=\bh))\.(\d+)(?=\.|$|:|#)")
ATTENTION = ".self_attn"
_QUERY = "#query"


class Facts:
    """What is public of the reference: modules, parameters, config, declared sites."""

    def __init__(self, reference: Reference, table: SiteTable) -> None:
        self.reference, self.table = reference, table
        self.modules: Mapping[str, nn.Module] = reference.module_sites()
        whole: Any = reference.model
        self.config: Any = whole.config.get_text_config()
        self.parameters: dict[str, Tensor] = {
            f"{name}.{own}": parameter.detach()
            for name, module in self.modules.items()
            for own, parameter in module.named_parameters(recurse=False)
        }
        self.dtype = next(reference.model.parameters()).dtype
        self.attentions = [
            name
            for name in self.modules
            if name.endswith(ATTENTION) or table.dims(f"{name}{_QUERY}") is not None
        ]
        lists = [v for v in vars(self.config).values() if isinstance(v, list | tuple)]
        by_layer = [one for one in lists if len(one) == self.num_layers]
        self._traits = [tuple(str(one[i]) for one in by_layer) for i in range(self.num_layers)]
        self._frequencies: dict[Any, tuple[Tensor, float]] = {}

    def parameter(self, name: str) -> Tensor | None:
        """A parameter by the reference's name or, of experts that it stacks, by the port's."""
        return by_name(self.parameters, [name]).get(name)

    def traits(self, layer: int | None) -> tuple[str, ...]:
        """What the config's lists with an entry a layer say of one."""
        return () if layer is None or layer >= self.num_layers else self._traits[layer]

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def context(self) -> float:
        """How many tokens the model was made for; infinity where no end is known."""
        found = traits_of(self.reference.model).max_positions
        return math.inf if found is None else found

    def attention(self, site: str) -> str:
        """`model.layers.3.self_attn` of any site within it."""
        if ATTENTION in site:
            return site[: site.index(ATTENTION) + len(ATTENTION)]
        within = (one for one in self.attentions if re.match(rf"{re.escape(one)}(?=[.#:]|$)", site))
        found = next(within, None)
        if found is None:
            raise LookupError(f"{site} is within no attention")
        return found

    def window(self, attention: str) -> int | None:
        """How many keys a layer's query sees, itself included; None: all."""
        module: Any = self.modules[attention]
        if hasattr(module, "sliding_window"):
            found = module.sliding_window
        elif not hasattr(self.config, "layer_types"):  # one window, of all layers
            found = getattr(self.config, "sliding_window", None)
        else:
            found = None
        return found if isinstance(found, int) else self.chunk(attention)

    def chunk(self, attention: str) -> int | None:
        """The length of the chunks that a layer attends within; None: it does not."""
        kinds, layer = getattr(self.config, "layer_types", None), layer_of(attention)
        if kinds is None or layer is None or kinds[layer] != "chunked_attention":
            return None
        found = self.config.attention_chunk_size
        return found if isinstance(found, int) else None

    def windows(self) -> list[int]:
        """The windows that there are."""
        return sorted({one for each in self.attentions if (one := self.window(each)) is not None})

    def rope_parameters(self, kind: str) -> dict[str, Any] | None:
        """A layer type's rotary parameters, in the config's words; `kind` is "" where all share."""
        found = getattr(self.config, "rope_parameters", None)
        if not isinstance(found, dict):
            return None
        return dict(found.get(kind, found))

    def rope_kinds(self) -> list[str]:
        """The layer types whose tables differ, or [""]."""
        found = getattr(self.config, "rope_parameters", None) or {}
        return [k for k, v in found.items() if isinstance(v, dict)] or [""]

    def frequencies(self, kind: str, parameters: Mapping[str, Any]) -> tuple[Tensor, float]:
        """The reference's own inverse frequencies under these parameters, and its scaling.

        Its rotary module is built once more from a config of which only they are changed.
        """
        key = kind, tuple(sorted((k, str(v)) for k, v in parameters.items()))
        if key not in self._frequencies:
            with _disable_current_modes():  # or casts would be lifted in what is kept
                self._frequencies[key] = self._made(kind, parameters)
        return self._frequencies[key]

    def _made(self, kind: str, parameters: Mapping[str, Any]) -> tuple[Tensor, float]:
        ((_, module),) = self.reference.table_modules().items()
        config = copy.deepcopy(self.config)
        given = dict(parameters)
        config.rope_parameters = {**config.rope_parameters, kind: given} if kind else given
        if "truncate" in given:  # which is read there alone
            config.rope_parameters["truncate"] = given["truncate"]
        made: Any = type(module)(config)
        prefix = f"{kind}_" if kind else ""
        frequencies = getattr(made, f"{prefix}inv_freq").to(next(module.buffers()).device)
        return frequencies, float(getattr(made, f"{prefix}attention_scaling"))

    def rounded(self, constant: Tensor) -> Tensor:
        """A constant that was cast with the model; it is held so, in float64 too."""
        with _disable_current_modes():
            return constant.to(self.dtype).to(constant.dtype)


@dataclass
class Past:
    """What earlier passes of a chain left, of the tokens that came before."""

    shown: dict[str, Tensor] = field(default_factory=dict)
    """`#key` and `#value` as the last pass saw them."""
    unrotated: dict[str, Tensor] = field(default_factory=dict)
    """Keys before their rotation, of all tokens, by attention."""


@dataclass
class Scene:
    """One pass of the reference; `exact`: everything upcast to float64."""

    facts: Facts
    one: Pass
    past: int
    """Tokens before the pass."""
    trace: Trace
    before: Past = field(default_factory=Past)
    exact: bool = False
    memory: dict[Any, Any] = field(default_factory=dict)
    """What is computed once a scene."""

    def at(self, site: str) -> Tensor | None:
        """What the reference had there."""
        found = self.trace.get(site)
        return None if found is None else self.upcast(found)

    def given(self, site: str) -> Tensor:
        """The same where it is known to be there."""
        found = self.at(site)
        assert found is not None, f"{site} was recorded"
        return found

    def parameter(self, name: str) -> Tensor | None:
        found = self.facts.parameter(name)
        return None if found is None else self.upcast(found)

    def upcast(self, tensor: Tensor) -> Tensor:
        return tensor.double() if self.exact and tensor.is_floating_point() else tensor

    def in_float64(self) -> Scene:
        """The same scene, in which everything is upcast."""
        return Scene(self.facts, self.one, self.past, self.trace, self.before, exact=True)

    def heads_first(self, site: str, heads: int) -> Tensor | None:
        """What a projection or a norm of heads made, as (batch, heads, tokens, head_dim)."""
        found = self.at(site)
        if found is None:
            return None
        batch, num_tokens = len(self.one.input_ids), self.one.num_tokens
        if found.dim() == 3:
            return found.view(batch, num_tokens, heads, -1).transpose(1, 2)
        return found if found.shape[1:3] == (heads, num_tokens) else found.transpose(1, 2)


class Scenes:
    """Scenes of a probe's passes, in their order; of a chain's past what a cache would hold."""

    def __init__(self, facts: Facts, probe: Probe) -> None:
        self._facts, self._probe = facts, probe
        self._past: dict[str, Past] = {}
        self._continued = {one.continues for one in probe}

    def of(self, one: Pass, trace: Trace) -> Scene:
        """The scene of the next pass."""
        before = self._past.pop(one.continues or "", Past())
        if one.name in self._continued:
            self._past[one.name] = self._kept(before, trace)
        return Scene(self._facts, one, self._probe.past(one), trace, before)

    def _kept(self, before: Past, trace: Trace) -> Past:
        kept = Past()
        for name in self._facts.attentions:
            for role in ("key", "value"):
                if (shown := trace.get(f"{name}#{role}")) is not None:
                    kept.shown[f"{name}#{role}"] = shown
            new = trace.get(f"{name}.k_norm", trace.get(f"{name}.k_proj"))
            key = trace.get(f"{name}#key")
            if new is None or key is None:
                continue
            heads, tokens = key.shape[1], new.shape[1]
            if new.dim() == 3:
                new = new.view(len(new), tokens, heads, -1).transpose(1, 2)
            elif new.shape[1] != heads:
                new = new.transpose(1, 2)
            earlier = before.unrotated.get(name)
            kept.unrotated[name] = new if earlier is None else torch.cat((earlier, new), 2)
        return kept


def layer_of(site: str) -> int | None:
    """3 of `model.layers.3.mlp`."""
    found = _LAYER.search(site)
    return None if found is None else int(found[1])


def in_layer(site: str, layer: int) -> str:
    """The same site of another layer."""
    return _LAYER.sub(f".{layer}", site, count=1)


def template(site: str) -> str:
    """The site with its layer's number left out."""
    return _LAYER.sub(".{layer}", site, count=1)


def representatives(facts: Facts, sites: Iterable[str]) -> Iterator[str]:
    """Of sites that differ in the layer alone, one for each kind of layer.

    Layers are of a kind that have the same sites, whose queries see as many keys, and of which the
    config's lists say the same.
    """
    sites, alike = [*sites], defaultdict[int | None, set[str]](set)
    for site in sites:
        alike[layer_of(site)].add(template(site))
    windows = {layer_of(one): facts.window(one) for one in facts.attentions}
    seen = set()
    for site in sites:
        layer = layer_of(site)
        kind = frozenset(() if layer is None else alike[layer])
        key = template(site), windows.get(layer), facts.traits(layer), kind
        if key not in seen:
            seen.add(key)
            yield site
