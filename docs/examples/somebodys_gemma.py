"""Gemma 3 in somebody else's hand, as an example of a port that portkit did not write.

Its own names, q, k and v in one matrix, gate and up in another, norms that are functions, a cache
of its own, one attention call for everything. What it owes portkit are the calls of `record`, which
cost nothing outside of a comparison, and `load`, which `--port` is given.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from portkit.parity import record

NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], 1 + weight.float(), 1e-6).to(x.dtype)


def weight(size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size))


class Memory:
    """Keys and values of each layer in order; a sliding layer forgets what nobody sees again."""

    def __init__(self, windows: list[int | None]) -> None:
        self.windows, self.past, self.num_tokens = windows, [None] * len(windows), 0

    def extend(self, i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.past[i] is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(self.past[i], (k, v), strict=True))
        keep = (self.windows[i] or k.shape[2] + 1) - 1
        self.past[i] = k[:, :, -keep:], v[:, :, -keep:]
        return k, v


class Attn(nn.Module):
    def __init__(self, c: dict, i: int) -> None:
        super().__init__()
        self.i, self.dim, self.kv = i, c["head_dim"], c["num_key_value_heads"]
        self.q = c["num_attention_heads"]
        self.scale = c["query_pre_attn_scalar"] ** -0.5
        self.wqkv = nn.Linear(c["hidden_size"], (self.q + 2 * self.kv) * self.dim, bias=False)
        self.wo = nn.Linear(self.q * self.dim, c["hidden_size"], bias=False)
        self.q_scale, self.k_scale = weight(self.dim), weight(self.dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, memory: Memory) -> Tensor:
        heads = self.wqkv(x).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        q, k, v = heads.split((self.q, self.kv, self.kv), dim=1)  # (batch, heads, tokens, dim)
        q = record(".q_norm", norm(q, self.q_scale))
        k = record(".k_norm", norm(k, self.k_scale))
        q, k = q * cos + turned(q) * sin, k * cos + turned(k) * sin
        k, v = memory.extend(self.i, k, v)
        mask = record("#mask", mask[..., -k.shape[2] :])
        q, k, v = record("#query", q), record("#key", k), record("#value", v)
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, enable_gqa=True)
        return self.wo(record("#context", y.transpose(1, 2)).flatten(2))


class Ffn(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        self.w_in = nn.Linear(c["hidden_size"], 2 * c["intermediate_size"], bias=False)
        self.w_out = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_in(x).chunk(2, -1)
        return self.w_out(F.gelu(gate, approximate="tanh") * up)


class Block(nn.Module):
    def __init__(self, c: dict, i: int) -> None:
        super().__init__()
        self.attn, self.ffn = Attn(c, i), Ffn(c)
        self.scales = nn.ParameterList(weight(c["hidden_size"]) for _ in range(4))

    def forward(self, x: Tensor, *args: object) -> Tensor:
        before, after, before_ffn, after_ffn = self.scales
        y = self.attn(record(".input_layernorm", norm(x, before)), *args)
        x = x + record(".post_attention_layernorm", norm(y, after))
        y = self.ffn(record(".pre_feedforward_layernorm", norm(x, before_ffn)))
        return x + record(".post_feedforward_layernorm", norm(y, after_ffn))


class Gemma(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        self.c, size = c, c["hidden_size"]
        self.sliding = [kind == "sliding_attention" for kind in c["layer_types"]]
        self.wte = nn.Embedding(c["vocab_size"], size)
        self.register_buffer("wte_scale", torch.tensor(size**0.5))
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c["num_hidden_layers"]))
        self.last_scale = weight(size)

    def forward(
        self, input_ids: Tensor, positions: Tensor, attention_mask: Tensor | None, cache=None
    ) -> tuple[Tensor, Memory]:
        window = self.c["sliding_window"]
        memory = cache or Memory([window if one else None for one in self.sliding])
        x = record("model.embed_tokens", self.wte(input_ids) * self.wte_scale)
        given = {}
        for name, theta in (("sliding", "rope_local_base_freq"), ("full", "rope_theta")):
            cos, sin = rotary(positions, self.c["head_dim"], self.c[theta])
            cos = record(f"model#cos.{name}_attention", cos.to(x.dtype))
            sin = record(f"model#sin.{name}_attention", sin.to(x.dtype))
            seen = window if name == "sliding" else None
            mask = visible(input_ids.shape[1], memory.num_tokens, attention_mask, seen)
            given[name == "sliding"] = cos[:, None], sin[:, None], mask, memory
        for block, slides in zip(self.blocks, self.sliding, strict=True):
            x = block(x, *given[slides])
        memory.num_tokens += input_ids.shape[1]
        x = record("model.norm", norm(x, self.last_scale))
        return record("lm_head", F.linear(x, self.wte.weight)), memory


def turned(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


def rotary(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].float() * (1 / theta ** (torch.arange(0, dim, 2).float() / dim))
    return angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)


def visible(num_new: int, past: int, padding: Tensor | None, window: int | None) -> Tensor:
    query, key = torch.arange(past, past + num_new)[:, None], torch.arange(past + num_new)
    mask = (key <= query) & (key > query - (window or past + num_new))
    return mask[None, None] if padding is None else mask & padding.bool()[:, None, None]


def load(directory: Path, dtype: torch.dtype, device: torch.device) -> Gemma:
    """What `--port docs/examples/somebodys_gemma.py:load` calls."""
    model = Gemma(json.loads((directory / "config.json").read_text()))
    stored = load_file(directory / "model.safetensors")
    own = {"wte.weight": stored["model.embed_tokens.weight"]}
    own |= {"wte_scale": model.wte_scale, "last_scale": stored["model.norm.weight"]}
    for i in range(len(model.blocks)):
        there, here = f"model.layers.{i}", f"blocks.{i}"
        read = {name: stored[f"{there}.self_attn.{name}_proj.weight"] for name in "qkvo"}
        own[f"{here}.attn.wqkv.weight"] = torch.cat((read["q"], read["k"], read["v"]))
        own[f"{here}.attn.wo.weight"] = read["o"]
        for name in "qk":
            own[f"{here}.attn.{name}_scale"] = stored[f"{there}.self_attn.{name}_norm.weight"]
        gate, up = (stored[f"{there}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
        own[f"{here}.ffn.w_in.weight"] = torch.cat((gate, up))
        own[f"{here}.ffn.w_out.weight"] = stored[f"{there}.mlp.down_proj.weight"]
        for n, place in enumerate(NORMS):
            own[f"{here}.scales.{n}"] = stored[f"{there}.{place}_layernorm.weight"]
    model.load_state_dict(own)
    return model.to(device, dtype).eval()
