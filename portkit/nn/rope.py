"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): frequencies, tables, rotation.

The inverse frequencies are float32 and are neither parameter nor buffer: `module.to(bfloat16)`,
which rounds buffers and moves the angle at position 9,000 by whole turns, cannot reach them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class RopeParameters:
    """One layer type's rotation, in `config.json`'s own words. Unused fields stay None."""

    rope_type: str
    rope_theta: float
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None


class RotaryEmbedding(nn.Module):
    """Positions to tables: int64 (batch, tokens) to cos and sin, each (batch, tokens, head_dim).

    Angles, cosine and sine are float32; the tables are rounded to `dtype` last, as the reference
    does. (Angles from float64 frequencies are more accurate, and wrong by 4e-3 at position 131k.)
    """

    def __init__(self, head_dim: int, rope: RopeParameters) -> None:
        super().__init__()
        self.rope = rope
        self.inv_freq, self.scaling = inverse_frequencies(head_dim, rope)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        inv_freq = self.inv_freq.to(positions.device)
        angles = self.spread(positions[..., None].float() * inv_freq)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)

    def spread(self, angles: Tensor) -> Tensor:
        """(…, head_dim/2) to (…, head_dim): the angle of each channel, for `rotate`."""
        return torch.cat((angles, angles), dim=-1)


class InterleavedRotaryEmbedding(RotaryEmbedding):
    """The same tables for `rotate_interleaved`: channels 2i and 2i + 1 have an angle in common."""

    def spread(self, angles: Tensor) -> Tensor:
        return angles.repeat_interleave(2, dim=-1)


class PolarRotaryEmbedding(RotaryEmbedding):
    """Tables for `rotate_polar`: one angle a pair of channels, each (batch, tokens, head_dim/2).

    They stay float32 whatever the model's dtype; and torch's `polar` differs from its `cos` and
    `sin` in the last bit of one in twenty.
    """

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.inv_freq.to(positions.device)
        turned = torch.polar(torch.ones_like(angles), angles) * self.scaling
        return turned.real.contiguous(), turned.imag.contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (batch, heads, tokens, head_dim), pairing channel i with i + head_dim/2.

    `cos` and `sin` are (batch, tokens, head_dim), the same for all heads.
    Two rounded products and a rounded sum in x's dtype: a fused multiply-add differs in bfloat16.
    """
    return _rotate(x, cos[:, None], sin[:, None])


def rotate_by_token(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for (batch, tokens, heads, head_dim): equal values, a gradient laid out otherwise.

    Where a norm stands before the rotation, that decides the last bit of the norm's gradient.
    """
    return _rotate(x, cos[:, :, None], sin[:, :, None])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    # The second half is taken first, as the reference does: the order decides how x's gradient is
    # laid out in memory, and so the order of the sum behind it, a norm's gradient.
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (batch, heads, tokens, head_dim), pairing channel 2i with 2i + 1; in float32.

    `cos` and `sin`, (batch, tokens, head_dim), come rounded to x's dtype; products and sum are of
    float32 and the cast back is the only rounding, unlike in `rotate`.
    """
    cos, sin = cos[:, None], sin[:, None]
    wide = x.float()
    turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
    return (wide * cos + turned * sin).to(x.dtype)


def rotate_polar(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (batch, tokens, heads, head_dim), pairing channel 2i with 2i + 1, as complex numbers.

    `cos` and `sin`, (batch, tokens, head_dim/2), are float32, as are the products: the cast back is
    the only rounding to x's dtype.
    """
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    turned = pairs * torch.complex(cos, sin)[:, :, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def inverse_frequencies(head_dim: int, rope: RopeParameters) -> tuple[Tensor, float]:
    """float32 (head_dim/2,) on CPU, and the factor on cos and sin; by `rope.rope_type`."""
    exponents = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
    # `theta ** t` then the reciprocal: `theta ** -t` differs by an ulp in most entries.
    periods = rope.rope_theta**exponents
    match rope.rope_type:
        case "default":
            return 1.0 / periods, 1.0
        case "linear":
            return (1.0 / periods) / _given(rope.factor), 1.0
        case "llama3":
            return _llama3(1.0 / periods, rope), 1.0
        case "yarn":
            return _yarn(periods, head_dim, rope), _yarn_attention_scaling(rope)
    raise AssertionError(f"rope type {rope.rope_type!r} was let through by the config")


def _llama3(inv_freq: Tensor, rope: RopeParameters) -> Tensor:
    """Llama 3.1's rule: long waves are stretched by `factor`, short ones kept, a ramp between."""
    factor, original = _given(rope.factor), _given(rope.original_max_position_embeddings)
    low, high = _given(rope.low_freq_factor), _given(rope.high_freq_factor)
    wavelengths = 2 * math.pi / inv_freq
    stretched = torch.where(wavelengths > original / low, inv_freq / factor, inv_freq)
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * stretched / factor + smooth * stretched
    between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(between, blended, stretched)


def _yarn(periods: Tensor, head_dim: int, rope: RopeParameters) -> Tensor:
    """YaRN's interpolation by parts (Peng et al. 2023, arXiv:2309.00071, section 3.2)."""
    factor, original = _given(rope.factor), _given(rope.original_max_position_embeddings)

    def dimension_of(rotations: float) -> float:
        turns = math.log(original / (rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(rope.rope_theta))

    low = dimension_of(rope.beta_fast or 32.0)
    high = dimension_of(rope.beta_slow or 1.0)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the paper's ramp would divide by zero
    ramp = (torch.arange(head_dim // 2, device="cpu", dtype=torch.float32) - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept


def _yarn_attention_scaling(rope: RopeParameters) -> float:
    """YaRN's temperature, folded into cos and sin: `0.1 ln(factor) + 1` unless the config says."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = _given(rope.factor)

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def _given(value: float | None) -> float:
    assert value is not None, "the config reader checks what each rope type needs"
    return value


def of_another_type(rope: RopeParameters) -> RopeParameters:
    """The nearest rotation of another type: without its scaling, or else stretched by two."""
    if rope.rope_type == "default":
        return replace(rope, rope_type="linear", factor=2.0)
    return replace(rope, rope_type="default")
