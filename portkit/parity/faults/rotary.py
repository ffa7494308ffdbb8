"""Recipes of positions: the rotary tables, and queries and keys that are rotated by them.

RoPE is Su et al. 2021, arXiv:2104.09864. The frequencies are the reference's own, made by its
rotary module under the config's parameters or under others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from portkit.parity.faults.modules import Norm
from portkit.parity.faults.scene import Scene
from portkit.parity.sides.sites import AGAIN
from portkit.parity.subject.dims import token_dim

Parameters = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Tables:
    """cos and sin of positions x frequencies, (batch, tokens, head_dim)."""

    kind: str
    """The layer type, "" where all share the tables."""
    parameters: Parameters
    times: int = 1
    """How often the scaling of frequencies is applied."""
    amplified: int = 1
    """How often the scaling of the tables themselves is."""
    offset: int = 0
    """Added to every position."""
    step_offset: int = 0
    """Added to the positions of passes that go on from others."""
    restarts: bool = False
    """Positions count from 0 in every pass."""
    counts_padding: bool = False
    """Positions are places in the row, padding included."""
    low_angles: str = ""
    """`product`: positions and frequencies multiplied in the model's dtype; `angle`: rounded."""
    low_frequencies: bool = False
    rounded: bool = True
    """Rounded to the model's dtype."""
    sign: float = 1.0
    still: bool = False
    """No rotation at all: cos 1, sin 0."""
    paired: bool = False
    """Laid out for adjacent channels."""
    polar: bool = False
    """One angle a pair of channels, as a complex number; not rounded but where a fault says so."""

    def run(self, scene: Scene, site: str) -> Tensor | None:
        name = site.replace(":in.", "#")  # a module is given a table under its role
        cos, sin = self.both(scene)
        return cos if "#cos" in name else sin

    def both(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """cos and sin of the pass's new tokens."""
        key = "tables", self
        if key not in scene.memory:
            scene.memory[key] = self._both(scene)
        found: tuple[Tensor, Tensor] = scene.memory[key]
        return found

    def _both(self, scene: Scene) -> tuple[Tensor, Tensor]:
        low = scene.facts.dtype
        frequencies, scaling = self._frequencies(scene)
        positions = self._positions(scene)[..., None]
        frequencies = scene.upcast(frequencies)
        if self.low_angles == "product":
            angles = positions.to(low) * frequencies.to(low)
        else:
            angles = positions.to(frequencies.dtype) * frequencies
            angles = angles.to(low) if self.low_angles else angles
        if self.polar:
            angles = angles.float()
            turned = torch.polar(torch.ones_like(angles), angles) * scaling
            cos, sin = turned.real.contiguous(), turned.imag.contiguous() * self.sign
            if self.still:
                cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
            wide = cos.dtype
            return (cos.to(low).to(wide), sin.to(low).to(wide)) if self.rounded else (cos, sin)
        pairs = angles.repeat_interleave(2, -1)
        doubled = pairs if self.paired else torch.cat((angles, angles), -1)
        cos, sin = doubled.cos() * scaling, doubled.sin() * scaling * self.sign
        if self.still:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        return (cos.to(low), sin.to(low)) if self.rounded else (cos, sin)

    def _frequencies(self, scene: Scene) -> tuple[Tensor, float]:
        parameters = dict(self.parameters)
        frequencies, scaling = scene.facts.frequencies(self.kind, parameters)
        if self.times != 1:
            plain, _ = scene.facts.frequencies(self.kind, unscaled(parameters))
            frequencies = frequencies * (frequencies / plain) ** (self.times - 1)
        scaling = scaling**self.amplified
        if self.low_frequencies:
            frequencies = scene.facts.rounded(frequencies)
        return frequencies, scaling

    def _positions(self, scene: Scene) -> Tensor:
        one = scene.one
        positions = one.positions
        if self.counts_padding:
            positions = torch.arange(one.num_tokens, device=positions.device)[None] + scene.past
            positions = positions.expand_as(one.positions)
        if self.restarts:
            positions = torch.arange(one.num_tokens, device=positions.device).expand_as(positions)
        return positions + self.offset + (self.step_offset if scene.past else 0)


def unscaled(parameters: dict[str, object]) -> dict[str, object]:
    """The same base without any scaling."""
    return {"rope_type": "default", "rope_theta": parameters["rope_theta"]}


@dataclass(frozen=True)
class Rotation:
    """The queries or keys that attention sees: new ones rotated, behind those that are held."""

    source: str
    """What is rotated: the norm of heads where there is one, else the projection."""
    heads: int
    style: str = "half"
    """half: channel i with i + d/2; halved: so, by tables laid out for neighbours; pairs: with its
    neighbour, kept in place; neighbours: so, by tables laid out for it; parted: its neighbour, the
    two halves then side by side; polar: its neighbour, as a complex number; none; done: the source
    is rotated already."""
    upcast: bool = False
    sign: float = 1.0
    tables: Tables | None = None
    """Others than the recorded ones."""
    norm_after: Norm | None = None
    """Normalise what was rotated."""
    other_norm: Norm | None = None
    """Normalise the source first, by this."""
    temperature: tuple[int, float] | None = None
    """Multiplied by 1 + scale * log(1 + floor(tokens / floor)): floor and scale."""
    scale: float = 1.0
    """Multiplied after the rotation."""
    past: str = "held"
    """held, unrotated, stale, shifted, early, late: what a cache gives back of the past."""

    @property
    def turns(self) -> bool:
        """Whether it is here that something is rotated."""
        return self.style not in {"none", "done"}

    def run(self, scene: Scene, site: str) -> Tensor | None:
        x = scene.heads_first(self.source, self.heads)
        if x is not None and self.other_norm is not None:
            x = self.other_norm.of(scene, x)
        tables = self._tables(scene, site)
        if x is None or (tables is None and self.turns):
            return None
        new = x if tables is None or not self.turns else self.rotated(x, *tables)
        if self.norm_after is not None:
            normed = self.norm_after.of(scene, new)
            if normed is None:
                return None
            new = normed
        if self.temperature is not None:
            new = tempered(scene, new, *self.temperature)
        if self.scale != 1.0:
            new = new * self.scale
        if site.endswith(":in"):  # of a norm of heads behind it
            dims = scene.facts.table.dims(site)
            return new.transpose(1, 2) if dims is not None and token_dim(dims) == 1 else new
        if site.endswith("#query"):
            return new
        return with_past(scene, site, new, self)

    def _tables(self, scene: Scene, site: str) -> tuple[Tensor, Tensor] | None:
        if self.tables is not None:
            return self.tables.both(scene)
        return recorded_tables(scene, site)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, heads, tokens, head_dim), by this recipe's form."""
        dtype, half = x.dtype, x.shape[-1] // 2
        cos, sin = cos[:, None], sin[:, None] * self.sign
        if self.style == "polar":
            if cos.shape[-1] != half:
                return x  # not made for it
            # Laid out by token, as the reference has it: that decides the products' last bits.
            by_token = x.transpose(1, 2).float().contiguous()
            numbers = torch.view_as_complex(by_token.view(*by_token.shape[:-1], half, 2))
            turns = torch.complex(cos.float(), sin.float()).transpose(1, 2)
            turned = torch.view_as_real(numbers * turns).transpose(1, 2)
            return turned.flatten(-2).to(dtype)
        if cos.shape[-1] == half:  # of one angle a pair
            cos, sin = (torch.cat((one, one), -1) for one in (cos, sin))
            cos, sin = (cos, sin) if self.upcast else (cos.to(dtype), sin.to(dtype))
        if self.upcast:
            x, cos, sin = x.float(), cos.float(), sin.float()
        if self.style == "halved":
            cos, sin = (torch.cat((one[..., ::2], one[..., ::2]), -1) for one in (cos, sin))
        if self.style in {"half", "halved"}:
            turned = torch.cat((-x[..., half:], x[..., :half]), -1)
            return (x * cos + turned * sin).to(dtype)
        if self.style in {"pairs", "neighbours"}:
            turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            if self.style == "pairs":
                cos, sin = (one[..., :half].repeat_interleave(2, -1) for one in (cos, sin))
            return (x * cos + turned * sin).to(dtype)
        parted = torch.cat((x[..., ::2], x[..., 1::2]), -1)
        turned = torch.cat((-parted[..., half:], parted[..., :half]), -1)
        return (parted * cos + turned * sin).to(dtype)


def tempered(scene: Scene, x: Tensor, floor: int, scale: float) -> Tensor:
    """Queries (batch, heads, tokens, head_dim) by how many tokens stand before them."""
    end = scene.past + scene.one.num_tokens
    count = torch.arange(scene.past, end, device=x.device).float() + 1.0
    factors = torch.log1p(torch.floor(count / floor)) * scale + 1.0
    return (x * factors[:, None]).to(x.dtype)


def recorded_tables(scene: Scene, site: str) -> tuple[Tensor, Tensor] | None:
    """The tables that the layer of a site was given."""
    attention = scene.facts.attention(site)
    for place in (attention, attention.rpartition(".")[0]):
        cos, sin = scene.at(f"{place}:in.cos"), scene.at(f"{place}:in.sin")
        if cos is not None and sin is not None:
            return cos, sin
    return None


def with_past(scene: Scene, site: str, new: Tensor, recipe: Rotation | Heads) -> Tensor | None:
    """New keys or values behind what the recipe's cache gives back; None: it cannot be told."""
    shown = scene.given(site)
    past = shown[:, :, : shown.shape[2] - scene.one.num_tokens]
    if recipe.past == "held" or not past.shape[2]:
        return torch.cat((past, new), 2)
    if recipe.past == "early":
        full = scene.facts.window(scene.facts.attention(site)) == past.shape[2] + 1
        return torch.cat((past[:, :, 1:] if full else past, new), 2)
    if recipe.past == "late":
        return _late(scene, site, past, new)
    if recipe.past == "unrotated":
        return _unrotated(scene, site, past, new, recipe)
    if recipe.past == "shifted":
        return torch.cat((past[:, :, :-1], new), 2)
    stale = past.clone()
    stale[:, :, -1] = past[:, :, -2] if recipe.past == "stale" and past.shape[2] > 1 else 0
    return torch.cat((stale, new), 2)


def _late(scene: Scene, site: str, past: Tensor, new: Tensor) -> Tensor | None:
    """One more than a window holds: what the pass before saw last of it."""
    before = scene.before.shown.get(site)
    window = scene.facts.window(scene.facts.attention(site))
    if before is None or window is None or past.shape[2] != window - 1:
        return torch.cat((past, new), 2)
    held = scene.upcast(before)
    if held.shape[2] <= past.shape[2]:
        return torch.cat((past, new), 2)
    return torch.cat((held[:, :, -past.shape[2] - 1 :], new), 2)


def _unrotated(
    scene: Scene, site: str, past: Tensor, new: Tensor, recipe: Rotation | Heads
) -> Tensor | None:
    attention = scene.facts.attention(site)
    held, tables = scene.before.unrotated.get(attention), recorded_tables(scene, site)
    if held is None or tables is None or not isinstance(recipe, Rotation):
        return None
    if scene.one.num_tokens != 1:  # only one token's tables fit all the keys that are read
        return torch.cat((past, new), 2)
    keys = scene.upcast(held)[:, :, -past.shape[2] :]
    return torch.cat((recipe.rotated(keys, *tables), new), 2)


@dataclass(frozen=True)
class Heads:
    """The values that attention sees: of new tokens, behind those that are held."""

    source: str
    heads: int
    rotation: Rotation | None = None
    """Rotated as well, where they should not be."""
    past: str = "held"

    def run(self, scene: Scene, site: str) -> Tensor | None:
        new = scene.heads_first(self.source, self.heads)
        if new is None:
            return None
        if self.rotation is not None:
            tables = recorded_tables(scene, site)
            if tables is None:
                return None
            new = self.rotation.rotated(new, *tables)
        return with_past(scene, site, new, self)


def rotations(scene: Scene, site: str) -> Iterator[Rotation]:
    """The forms that a rotation may have."""
    attention = scene.facts.attention(site)
    behind = site.endswith(":in")
    letter = "q" if site.endswith(("#query", ".qk_norm:in")) else "k"
    heads = scene.given(site).shape[2 if behind else 1]
    normed = f"{attention}.{letter}_norm"
    source = normed if normed in scene.trace else f"{attention}.{letter}_proj"
    norm_behind = f"{attention}.qk_norm" if letter == "q" else f"{attention}.qk_norm{AGAIN}2"
    if norm_behind in scene.trace and not behind:
        yield Rotation(norm_behind, heads, "done")
        return
    for style in ("half", "pairs", "neighbours", "parted"):
        for upcast in (False, True):
            yield Rotation(source, heads, style, upcast)
    yield Rotation(source, heads, "none")
    yield Rotation(source, heads, "polar")
    config = scene.facts.config
    floor, scale = (getattr(config, key, None) for key in ("floor_scale", "attn_scale"))
    if isinstance(floor, int) and isinstance(scale, float):
        yield Rotation(source, heads, "none", temperature=(floor, scale))


def tables(scene: Scene, kind: str) -> Iterator[Tables]:
    """The tables of a layer type."""
    parameters = scene.facts.rope_parameters(kind)
    if parameters is not None:
        held = tuple(sorted(parameters.items()))
        yield Tables(kind, held)
        yield Tables(kind, held, paired=True)
        yield Tables(kind, held, polar=True, rounded=False)
