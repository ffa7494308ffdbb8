"""Ports and references that strangers might bring, as factories: some limited, some broken."""

# ruff: noqa: ARG001  # a factory and a port take what the contract gives them

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portkit.loading import load
from portkit.parity import record

Port = Callable[..., Any]
NO_FACTORY = 3


def _model(directory: Path, dtype: torch.dtype) -> Any:
    return load(directory, dtype=str(dtype).removeprefix("torch."), device="cpu").model


def bare(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    """A function: no modules, nothing recorded."""
    model = _model(directory, dtype)

    def port(input_ids: Tensor, positions: Tensor, attention_mask: Any, cache: Any = None) -> Any:
        cache = cache or model.new_cache(len(input_ids), 256)
        logits = model(input_ids, positions, cache, attention_mask)
        cache.advance(input_ids.shape[1])
        return logits, cache

    return port


def scaled(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    right = bare(directory, dtype, device)

    def port(input_ids: Tensor, positions: Tensor, attention_mask: Any, cache: Any = None) -> Any:
        logits, cache = right(input_ids, positions, attention_mask, cache)
        return logits * 1.02, cache

    return port


def recording(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    """A function that shows its logits and one point."""
    right = bare(directory, dtype, device)

    def port(input_ids: Tensor, positions: Tensor, attention_mask: Any, cache: Any = None) -> Any:
        logits, cache = right(input_ids, positions, attention_mask, cache)
        return record("lm_head", logits), cache

    return port


def misspelling(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    right = bare(directory, dtype, device)

    def port(input_ids: Tensor, positions: Tensor, attention_mask: Any, cache: Any = None) -> Any:
        return record("#qurey", right(input_ids, positions, attention_mask, cache)[0])

    return port


def limited(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    """Takes neither mask nor cache, and no positions that jump."""
    model = _model(directory, dtype)

    def port(input_ids: Tensor, positions: Tensor) -> Tensor:
        if bool((positions.diff(dim=1) != 1).any()):
            raise NotImplementedError("positions count from zero here")
        logits: Tensor = model(input_ids, positions)
        return logits

    return port


def wide(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    """Gives its logits in float32, as many do."""
    right = bare(directory, dtype, device)

    def port(*given: Any) -> Any:
        logits, cache = right(*given)
        return logits.float(), cache

    return port


class _FusedNorm(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class _FusedMLP(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
        self.down_proj = mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up).chunk(2, -1)
        down: Tensor = self.down_proj(F.silu(gate) * up)
        return down


def fused(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    """Ours, with torch's own norm and one matrix for gate and up."""
    model = _model(directory, dtype)
    for layer in model.model.layers:
        layer.input_layernorm = _FusedNorm(layer.input_layernorm)
        layer.post_attention_layernorm = _FusedNorm(layer.post_attention_layernorm)
        layer.mlp = _FusedMLP(layer.mlp)
    return model  # type: ignore[no-any-return]


def compiled(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    """Ours, with the feed-forward of each layer compiled."""
    model = _model(directory, dtype)
    for layer in model.model.layers:
        layer.mlp = torch.compile(layer.mlp, dynamic=True)
    return model  # type: ignore[no-any-return]


def raises(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    raise KeyError("wq.weight")


def leaves(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    raise SystemExit(0)


def always_leaves(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    def port(input_ids: Tensor) -> Tensor:
        raise SystemExit(0)

    return port


def no_callable(directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
    return {"weights": 3}


def other_dtype(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    return nn.Linear(2, 2, dtype=torch.float16)


def other_arguments(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    return lambda input_ids, attention_mask, sin: (input_ids, attention_mask, sin)


def _returning(change: Callable[[Tensor], Any]) -> Callable[..., Port]:
    def factory(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
        right = bare(directory, dtype, device)
        return lambda *given: change(right(*given)[0])

    return factory


wrong_shape = _returning(lambda logits: logits[:, -1])
wrong_type = _returning(lambda logits: [logits])
whole_numbers = _returning(lambda logits: logits.argmax(-1, keepdim=True).expand_as(logits))


def always_raises(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    def port(input_ids: Tensor, positions: Tensor, attention_mask: Any, cache: Any = None) -> Any:
        raise IndexError("index 7 is out of range\nin some detail")

    return port


def in_place(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    right = bare(directory, dtype, device)

    def port(input_ids: Tensor, positions: Tensor, attention_mask: Any, cache: Any = None) -> Any:
        result = right(input_ids, positions, attention_mask, cache)
        positions += 1
        return result

    return port


def forgetful(directory: Path, dtype: torch.dtype, device: torch.device) -> Port:
    right = bare(directory, dtype, device)

    def port(input_ids: Tensor, positions: Tensor, attention_mask: Any, cache: Any = None) -> Any:
        logits, left = right(input_ids, positions, attention_mask, cache)
        return (logits, left) if cache is None else logits

    return port
