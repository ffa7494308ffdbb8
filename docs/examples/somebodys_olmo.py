"""OLMo 2, of which portkit has no port, as somebody writes it from a config and a header."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.scale * y).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n, self.kv = c["num_attention_heads"], c["num_key_value_heads"]
        self.dim = c["hidden_size"] // self.n
        self.wqkv = nn.Linear(c["hidden_size"], (self.n + 2 * self.kv) * self.dim, bias=False)
        self.wo = nn.Linear(self.n * self.dim, c["hidden_size"], bias=False)
        self.norm_q = Norm(self.n * self.dim, c["rms_norm_eps"])
        self.norm_k = Norm(self.kv * self.dim, c["rms_norm_eps"])

    def forward(self, x, cos, sin, past):
        wide, narrow = self.n * self.dim, self.kv * self.dim
        q, k, v = self.wqkv(x).split((wide, narrow, narrow), -1)
        q, k = self.norm_q(q), self.norm_k(k)
        q, k, v = (t.unflatten(-1, (-1, self.dim)).transpose(1, 2) for t in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        n, m = q.shape[2], k.shape[2]
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return self.wo(y.transpose(1, 2).flatten(2)), (k, v)


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.w13 = nn.Linear(c["hidden_size"], 2 * c["intermediate_size"], bias=False)
        self.w2 = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x):
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn, self.mlp = Attention(c), Mlp(c)
        self.norm1, self.norm2 = (Norm(c["hidden_size"], c["rms_norm_eps"]) for _ in range(2))

    def forward(self, x, cos, sin, past):
        y, kept = self.attn(x, cos, sin, past)
        x = x + self.norm1(y)
        return x + self.norm2(self.mlp(x)), kept


class Olmo(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.emb = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.norm = Norm(c["hidden_size"], c["rms_norm_eps"])
        self.head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    def forward(self, tokens, cache=None):
        start = 0 if cache is None else cache[0][0].shape[2]
        x = self.emb(tokens)
        cos, sin = tables(start, tokens.shape[1], self.c)
        kept = []
        for i, block in enumerate(self.blocks):
            x, one = block(x, cos, sin, None if cache is None else cache[i])
            kept.append(one)
        return self.head(self.norm(x)), kept


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


def tables(start, n, c):
    dim = c["hidden_size"] // c["num_attention_heads"]
    freqs = 1 / c["rope_parameters"]["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
    angles = torch.arange(start, start + n).float()[:, None] * freqs
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def load(directory, dtype, device):
    c = json.loads((Path(directory) / "config.json").read_text())
    w = load_file(Path(directory) / "model.safetensors")
    model = Olmo(c)
    own = {"emb.weight": w["model.embed_tokens.weight"], "norm.scale": w["model.norm.weight"]}
    own["head.weight"] = w["lm_head.weight"]
    for i in range(c["num_hidden_layers"]):
        t, h = f"model.layers.{i}.", f"blocks.{i}."
        own[h + "attn.wqkv.weight"] = torch.cat([w[f"{t}self_attn.{p}_proj.weight"] for p in "qkv"])
        own[h + "attn.wo.weight"] = w[t + "self_attn.o_proj.weight"]
        own[h + "attn.norm_q.scale"] = w[t + "self_attn.q_norm.weight"]
        own[h + "attn.norm_k.scale"] = w[t + "self_attn.k_norm.weight"]
        own[h + "mlp.w13.weight"] = torch.cat(
            [w[f"{t}mlp.{p}_proj.weight"] for p in ("gate", "up")]
        )
        own[h + "mlp.w2.weight"] = w[t + "mlp.down_proj.weight"]
        own[h + "norm1.scale"] = w[t + "post_attention_layernorm.weight"]
        own[h + "norm2.scale"] = w[t + "post_feedforward_layernorm.weight"]
    model.load_state_dict(own)
    return model.to(device, dtype).eval()
