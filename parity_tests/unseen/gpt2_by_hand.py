"""GPT-2 by hand, from its papers and the names and shapes in its file, as a porter writes it.

Its matrices are stored as (in, out) and transposed here; q, k and v are one; positions are learned,
and counted from the mask, so that there is no argument for them; the cache is a list of tensors.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, size: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(size, eps), nn.LayerNorm(size, eps)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor, visible: Tensor, past: Any) -> tuple[Tensor, Any]:
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, kv = parts[0], parts[1:] if past is None else torch.cat((past, parts[1:]), -2)
        seen = F.scaled_dot_product_attention(q, kv[0], kv[1], visible)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")), kv


class GPT2(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        size, heads, eps = c["n_embd"], c["n_head"], c["layer_norm_epsilon"]
        self.tokens = nn.Embedding(c["vocab_size"], size)
        self.places = nn.Embedding(c["n_positions"], size)
        self.blocks = nn.ModuleList(Block(size, heads, eps) for _ in range(c["n_layer"]))
        self.norm = nn.LayerNorm(size, eps)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None
    ) -> tuple[Tensor, Any]:
        cache = cache or [None] * len(self.blocks)
        num_past = 0 if cache[0] is None else cache[0].shape[-2]
        length = num_past + input_ids.shape[1]
        real = input_ids.new_ones(1, length) if attention_mask is None else attention_mask
        own = torch.eye(length, dtype=torch.bool, device=input_ids.device)
        visible = (real.bool()[:, None] | own).tril()[:, None, num_past:]
        x = self.tokens(input_ids) + self.places((real.cumsum(1) - 1).clamp(0)[:, num_past:])
        left = []
        for block, past in zip(self.blocks, cache, strict=True):
            x, kv = block(x, visible, past)
            left.append(kv)
        return F.linear(self.norm(x), self.tokens.weight), left


NAMES = {"tokens": "wte", "places": "wpe", "norm": "ln_f"}
IN_BLOCK = {"norm1": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj", "norm2": "ln_2"} | {
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}


def load(directory: Path, dtype: torch.dtype, device: torch.device) -> GPT2:
    model = GPT2(json.loads((directory / "config.json").read_text()))
    stored = load_file(directory / "model.safetensors")
    for name, parameter in model.named_parameters():
        *path, kind = name.split(".")
        theirs = NAMES[path[0]] if path[0] in NAMES else f"h.{path[1]}.{IN_BLOCK[path[2]]}"
        value = stored[f"transformer.{theirs}.{kind}"]
        is_matrix = isinstance(model.get_submodule(".".join(path)), nn.Linear) and value.dim() == 2
        parameter.data = value.T.contiguous() if is_matrix else value
    return model.to(device, dtype).eval()


load.sites = "\n".join(  # type: ignore[attr-defined]
    [f"{ours} = transformer.{theirs}" for ours, theirs in NAMES.items()]
    + [
        f"blocks.{{layer}}.{ours} = transformer.h.{{layer}}.{theirs}"
        for ours, theirs in IN_BLOCK.items()
    ]
    + ["blocks.{layer} = transformer.h.{layer}"]
)
