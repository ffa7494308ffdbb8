"""Mistakes planted in the example port of the documents, each found where it is made."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import portkit.parity
from portkit.parity.judging.judge import Verdict

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "portkit" / "demo_checkpoint"
EXAMPLE = ROOT / "docs" / "examples" / "somebodys_gemma.py"
PAIRS = EXAMPLE.with_suffix(".sites")
LONG = [3 + 7 * i % 1000 for i in range(60)]
"""More tokens than the window has."""


@dataclass(frozen=True)
class Mistake:
    """`plant` is given the example as a module, and its model."""

    plant: Callable[[Any, Any], None]
    site: str
    kind: str
    probe: Any = "quick"


def _rows_exchanged(_: Any, model: Any) -> None:
    attn = model.blocks[1].attn
    q, k, v = attn.wqkv.weight.data.split([n * attn.dim for n in (attn.q, attn.kv, attn.kv)])
    attn.wqkv.weight.data = torch.cat((q, v, k))


def _gate_for_up(_: Any, model: Any) -> None:
    weight = model.blocks[3].ffn.w_in.weight
    weight.data = torch.cat(weight.data.chunk(2)[::-1])


def _norm(eps: float, offset: float) -> Callable[[Any, Any], None]:
    def plant(example: Any, _: Any) -> None:
        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x.float(), x.shape[-1:], offset + weight.float(), eps).to(x.dtype)

        example.norm = norm

    return plant


def _norm_without_care(example: Any, _: Any) -> None:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + weight)

    example.norm = norm


def _scale_unrounded(_: Any, model: Any) -> None:
    model.wte_scale = torch.tensor(model.c["hidden_size"] ** 0.5)


def _thetas_exchanged(_: Any, model: Any) -> None:
    names = ("rope_theta", "rope_local_base_freq")
    model.c |= dict(zip(names, [model.c[name] for name in reversed(names)], strict=True))


def _turned_the_other_way(example: Any, _: Any) -> None:
    def turned(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return torch.cat((right, -left), -1)

    example.turned = turned


def _residual_lost(example: Any, model: Any) -> None:
    block, record = model.blocks[3], example.record

    def forward(x: Tensor, *args: object) -> Tensor:
        before, after, before_ffn, after_ffn = block.scales
        y = block.attn(record(".input_layernorm", example.norm(x, before)), *args)
        x = x + record(".post_attention_layernorm", example.norm(y, after))
        y = block.ffn(record(".pre_feedforward_layernorm", example.norm(x, before_ffn)))
        last: Tensor = record(".post_feedforward_layernorm", example.norm(y, after_ffn))
        return last

    block.forward = forward


def _window_of_one_more(example: Any, _: Any) -> None:
    own = example.visible
    example.visible = lambda new, past, padding, window: own(
        new, past, padding, window and window + 1
    )


def _last_key_lost(example: Any, _: Any) -> None:
    own = example.Memory.extend

    def extend(self: Any, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        seen: tuple[Tensor, Tensor] = own(self, i, k, v)
        if i == 2:
            keys, values = self.past[i]
            self.past[i] = torch.cat((keys[:, :, :-1], keys[:, :, -2:-1]), 2), values
        return seen

    example.Memory.extend = extend


def _exact_gelu(_: Any, model: Any) -> None:
    ffn = model.blocks[0].ffn

    def forward(x: Tensor) -> Tensor:
        gate, up = ffn.w_in(x).chunk(2, -1)
        y: Tensor = ffn.w_out(F.gelu(gate) * up)
        return y

    ffn.forward = forward


def _kernel_scale(_: Any, model: Any) -> None:
    model.blocks[2].attn.scale *= 1.01


def _last_norm_missing(_: Any, model: Any) -> None:
    model.last_scale.data.zero_()


MISTAKES = {
    "k and v exchanged": Mistake(_rows_exchanged, "model.layers.1.self_attn.k_proj", "function"),
    "gate and up exchanged": Mistake(_gate_for_up, "model.layers.3.mlp.gate_proj", "function"),
    "another epsilon": Mistake(_norm(1.0001e-6, 1), "model.layers.0.input_layernorm", "function"),
    "the weight for 1 + weight": Mistake(
        _norm(1e-6, 0), "model.layers.0.input_layernorm", "function"
    ),
    "norms in low precision": Mistake(_norm_without_care, "model.layers.0.input_layernorm", "care"),
    "embedding scale in float32": Mistake(_scale_unrounded, "model.embed_tokens", "function"),
    "thetas exchanged": Mistake(_thetas_exchanged, "model#cos.sliding_attention", "function"),
    "turned the other way": Mistake(
        _turned_the_other_way, "model.layers.0.self_attn#query", "glue"
    ),
    "residual lost": Mistake(_residual_lost, "model.layers.3", "glue"),
    "a window of one more": Mistake(
        _window_of_one_more, "model.layers.0.self_attn#mask", "glue", LONG
    ),
    "a key lost": Mistake(_last_key_lost, "model.layers.2.self_attn#key", "glue"),
    "exact GELU": Mistake(_exact_gelu, "model.layers.0.mlp.down_proj:in", "glue"),
    "scores scaled": Mistake(_kernel_scale, "model.layers.2.self_attn#context", "function"),
    "last norm without weight": Mistake(_last_norm_missing, "model.norm", "function"),
}


def example() -> ModuleType:
    """The example as a module of its own each time: what is planted stays in it."""
    spec = importlib.util.spec_from_file_location("somebodys_gemma_planted", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_example_is_placed(name: str) -> None:
    mistake, module = MISTAKES[name], example()
    model = module.load(DEMO, torch.bfloat16, torch.device("cpu"))
    mistake.plant(module, model)
    result = portkit.parity.compare(model, DEMO, sites=PAIRS, probe=mistake.probe)
    assert result.verdict is Verdict.diverged
    first = result.culprits[0]
    assert (first.site, first.kind) == (mistake.site, mistake.kind)


def test_without_a_mistake_the_same_probes_are_exact() -> None:
    model = example().load(DEMO, torch.bfloat16, torch.device("cpu"))
    for probe in ("quick", LONG):
        result = portkit.parity.compare(model, DEMO, sites=PAIRS, probe=probe, gate="exact")
        assert result.culprits == ()
        assert result.verdict is Verdict.exact
