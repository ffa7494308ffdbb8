"""A model in NumPy alone, from its paper: what a stranger without torch would hold against us.

Run as a program beside the lines of docs/traces.md, in a file called `tracing.py`:
`python numpy_llama.py CHECKPOINT OUT FAULT`. Attention sees everything; heads are not grouped.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from tracing import record, save, tensors

folder, out, fault = sys.argv[1:]
config = json.loads((Path(folder) / "config.json").read_text())
weights = load_file(f"{folder}/model.safetensors")
heads, size, epsilon = config["num_attention_heads"], config["head_dim"], config["rms_norm_eps"]
CHANNELS, HEADS = "batch position channel", "batch head position channel"


def norm(name, x):
    scaled = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(epsilon))
    value = weights[f"{name}.weight"] * scaled
    record("short", name, CHANNELS, value)
    return value


def linear(name, x):
    value = x @ weights[f"{name}.weight"].T
    record("short", name, CHANNELS, value)
    return value


def rotated(x):
    left, right = np.split(x, 2, -1)
    return x * cos + np.concatenate((-right, left), -1) * sin


def softmax(x):
    grown = np.exp(x - x.max(-1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


def attention(name, x):
    batch, tokens, _ = x.shape
    q, k, v = (
        linear(f"{name}.{one}_proj", x).reshape(batch, tokens, heads, size).transpose(0, 2, 1, 3)
        for one in "qkv"
    )
    q, k = rotated(q), rotated(k)
    if fault == "query scaled":
        q = q * np.float32(1.01)
    for role, value in (("query", q), ("key", k), ("value", v)):
        record("short", f"{name}#{role}", HEADS, value)
    mask = np.tril(np.ones((tokens, tokens), dtype=bool))[None, None]
    record("short", f"{name}#mask", "batch one query key", mask)
    scores = q @ k.transpose(0, 1, 3, 2) * np.float32(size**-0.5)
    context = (softmax(np.where(mask, scores, -np.inf)) @ v).transpose(0, 2, 1, 3)
    record("short", f"{name}#context", "batch position head channel", context)
    value = linear(f"{name}.o_proj", context.reshape(batch, tokens, -1))
    record("short", name, CHANNELS, value)
    return value


def mlp(name, x):
    gate, up = (linear(f"{name}.{one}_proj", x) for one in ("gate", "up"))
    value = linear(f"{name}.down_proj", gate / (1 + np.exp(-gate)) * up)
    record("short", name, CHANNELS, value)
    return value


input_ids = np.array([[5, 17, 301, 44, 8, 90, 7], [1, 2, 3, 5, 8, 13, 21]])
positions = np.arange(input_ids.shape[1])[None].repeat(len(input_ids), 0)
base = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
frequencies = base ** -(np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
angles = (positions[:1, :, None] * np.tile(frequencies, 2)).astype(np.float32)
cos, sin = np.cos(angles), np.sin(angles)
h = weights["model.embed_tokens.weight"][input_ids]
record("short", "model.embed_tokens", CHANNELS, h)
record("short", "model#cos", CHANNELS, cos)
record("short", "model#sin", CHANNELS, sin)
for number in range(config["num_hidden_layers"]):
    layer = f"model.layers.{number}"
    h = h + attention(f"{layer}.self_attn", norm(f"{layer}.input_layernorm", h))
    h = h + mlp(f"{layer}.mlp", norm(f"{layer}.post_attention_layernorm", h))
    record("short", layer, CHANNELS, h)
h = norm("model.norm", h)
record("short", "lm_head", "batch position vocabulary", h @ weights["lm_head.weight"].T)
record("short", "#logits", "batch position vocabulary", tensors["short/lm_head"])
passes = [{"name": "short", "input_ids": input_ids.tolist(), "positions": positions.tolist()}]
save(out, "a llama in NumPy", passes)
