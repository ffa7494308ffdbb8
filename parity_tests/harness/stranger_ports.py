"""Qwen3 and Mistral as strangers write them: their names and layouts, their ways of being called.

Each is right. Head norms stand behind the transposition, heads are repeated, residuals are added in
place; what differs from class to class is how it is called and where it keeps what it has seen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from portkit.parity import record

PAIRS = """
tok_emb = model.embed_tokens
final_norm = model.norm
out_head = lm_head
blocks.{layer} = model.layers.{layer}
blocks.{layer}.norm1 = model.layers.{layer}.input_layernorm
blocks.{layer}.norm2 = model.layers.{layer}.post_attention_layernorm
blocks.{layer}.att = model.layers.{layer}.self_attn
blocks.{layer}.att.W_query = model.layers.{layer}.self_attn.q_proj
blocks.{layer}.att.W_key = model.layers.{layer}.self_attn.k_proj
blocks.{layer}.att.W_value = model.layers.{layer}.self_attn.v_proj
blocks.{layer}.att.out_proj = model.layers.{layer}.self_attn.o_proj
blocks.{layer}.ff = model.layers.{layer}.mlp
blocks.{layer}.ff.fc1 = model.layers.{layer}.mlp.gate_proj
blocks.{layer}.ff.fc2 = model.layers.{layer}.mlp.up_proj
blocks.{layer}.ff.fc3 = model.layers.{layer}.mlp.down_proj
"""
HEAD_NORMS = """
blocks.{layer}.att.q_norm = model.layers.{layer}.self_attn.q_norm
blocks.{layer}.att.k_norm = model.layers.{layer}.self_attn.k_norm
"""
_NAMES = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "att.W_query": "self_attn.q_proj",
    "att.W_key": "self_attn.k_proj",
    "att.W_value": "self_attn.v_proj",
    "att.out_proj": "self_attn.o_proj",
    "att.q_norm": "self_attn.q_norm",
    "att.k_norm": "self_attn.k_norm",
    "ff.fc1": "mlp.gate_proj",
    "ff.fc2": "mlp.up_proj",
    "ff.fc3": "mlp.down_proj",
}


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


@dataclass
class Step:
    """What the layers of a pass share."""

    cos: Tensor
    sin: Tensor
    mask: Tensor
    """(batch or 1, 1, queries, keys), True where visible."""
    memory: Any = None


class Attention(nn.Module):
    def __init__(self, c: dict[str, Any], i: int) -> None:
        super().__init__()
        self.i, self.dim = i, c["head_dim"]
        self.groups = c["num_attention_heads"] // c["num_key_value_heads"]
        width, narrow = (c[f"num_{one}_heads"] * self.dim for one in ("attention", "key_value"))
        self.W_query = nn.Linear(c["hidden_size"], width, bias=False)
        self.W_key = nn.Linear(c["hidden_size"], narrow, bias=False)
        self.W_value = nn.Linear(c["hidden_size"], narrow, bias=False)
        self.out_proj = nn.Linear(width, c["hidden_size"], bias=False)
        if c["model_type"] == "qwen3":
            self.q_norm, self.k_norm = (RMSNorm(self.dim, c["rms_norm_eps"]) for _ in "qk")

    def forward(self, x: Tensor, step: Step) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            project(x).view(batch, tokens, -1, self.dim).transpose(1, 2)
            for project in (self.W_query, self.W_key, self.W_value)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (one * step.cos + turned(one) * step.sin for one in (q, k))
        k, v = self.remember(step, k, v)
        q, k, v = record("#query", q), record("#key", k), record("#value", v)
        k, v = (one.repeat_interleave(self.groups, 1) for one in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, step.mask)
        out: Tensor = self.out_proj(
            record("#context", y).transpose(1, 2).reshape(batch, tokens, -1)
        )
        return out

    def remember(self, step: Step, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all that is seen, these among them."""
        return k, v


class FeedForward(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.fc2 = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.fc3 = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc3(F.silu(self.fc1(x)) * self.fc2(x))
        return out


class Block(nn.Module):
    def __init__(self, c: dict[str, Any], att: Attention) -> None:
        super().__init__()
        self.norm1, self.norm2 = (RMSNorm(c["hidden_size"], c["rms_norm_eps"]) for _ in range(2))
        self.att, self.ff = att, FeedForward(c)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        x = x + self.att(self.norm1(x), step)
        x += self.ff(self.norm2(x))
        return x


class Decoder(nn.Module):
    """What all have; how it is called the others say."""

    attention: type[Attention] = Attention

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c = c
        self.tok_emb = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.blocks = nn.ModuleList(
            Block(c, self.attention(c, i)) for i in range(c["num_hidden_layers"])
        )
        self.final_norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.out_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        base = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
        even = torch.arange(0, c["head_dim"], 2).float() / c["head_dim"]
        angles = torch.arange(c["max_position_embeddings"]).float()[:, None] * (1 / base**even)
        self.cos, self.sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def run(self, ids: Tensor, positions: Tensor, mask: Tensor, memory: Any = None) -> Tensor:
        x = self.tok_emb(ids)
        cos, sin = (table[positions][:, None].to(x.dtype) for table in (self.cos, self.sin))
        step = Step(cos, sin, mask, memory)
        for block in self.blocks:
            x = block(x, step)
        logits: Tensor = self.out_head(self.final_norm(x))
        return logits

    def visible(self, past: int, num_new: int, padding: Tensor | None = None) -> Tensor:
        query = torch.arange(past, past + num_new)[:, None]
        key, window = torch.arange(past + num_new), self.c.get("sliding_window")
        mask = (key <= query) & (key > query - (window or past + num_new))
        return mask[None, None] if padding is None else mask & padding.bool()[:, None, None]


class Plain(Decoder):
    """No cache, no positions, no padding; and an argument that nobody asked for."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        num_tokens = tokens.shape[1]
        if mask is None:
            mask = torch.ones(num_tokens, num_tokens).tril().bool()
        return self.run(tokens, torch.arange(num_tokens)[None], mask.bool())


class OutOfReach(Plain):
    """A kernel of its own that has no float64."""

    def run(self, *given: Any) -> Tensor:
        if self.tok_emb.weight.dtype == torch.float64:
            raise NotImplementedError("my_kernel is made for float and bfloat16")
        return super().run(*given)


@dataclass
class Output:
    logits: Tensor
    past_key_values: Any = None


class HuggingAttention(Attention):
    def remember(self, step: Step, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        seen: tuple[Tensor, Tensor] = step.memory.update(k, v, self.i)
        return seen


class Hugging(Decoder):
    """Called as models of Transformers are, with its cache."""

    attention = HuggingAttention

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
    ) -> Output:
        from transformers import DynamicCache

        assert input_ids is not None
        assert position_ids is not None
        assert use_cache
        assert labels is None
        memory = DynamicCache() if past_key_values is None else past_key_values
        mask = self.visible(memory.get_seq_length(), input_ids.shape[1], attention_mask)
        return Output(self.run(input_ids, position_ids, mask, memory), memory)


class BufferedAttention(Attention):
    keys: Tensor
    values: Tensor

    def __init__(self, c: dict[str, Any], i: int) -> None:
        super().__init__(c, i)
        for name in ("keys", "values"):
            buffer = torch.zeros(2, c["num_key_value_heads"], 96, self.dim)
            self.register_buffer(name, buffer, persistent=False)

    def remember(self, step: Step, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = step.memory + k.shape[2]
        for held, new in ((self.keys, k), (self.values, v)):
            held[: len(new), :, step.memory : end] = new
        return self.keys[: len(k), :, :end], self.values[: len(v), :, :end]


class Buffered(Decoder):
    """Buffers in its modules that are written in place; it is told where to go on."""

    attention = BufferedAttention

    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        num_new = tokens.shape[1]
        positions = torch.arange(start_pos, start_pos + num_new)[None]
        return self.run(tokens, positions, self.visible(start_pos, num_new), start_pos)


class RingAttention(Attention):
    def remember(self, step: Step, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Steps of one token read the ring; longer passes what came before, and themselves."""
        ring = step.memory
        past = ring.in_order(self.i)
        ring.write(self.i, k, v)
        if k.shape[2] == 1:
            return ring.whole(self.i)
        if past is None:
            return k, v
        return torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)


class Ring:
    """The last `size` keys and values of each layer, each in the slot of its position."""

    def __init__(self, size: int) -> None:
        self.size, self.num_tokens = size, 0
        self.slots: dict[int, tuple[Tensor, Tensor]] = {}

    def in_order(self, i: int) -> tuple[Tensor, ...] | None:
        """What came before, as far as the next token sees it."""
        if i not in self.slots:
            return None
        kept = min(self.num_tokens, self.size - 1)
        places = torch.arange(self.num_tokens - kept, self.num_tokens) % self.size
        return tuple(one[:, :, places] for one in self.slots[i])

    def write(self, i: int, k: Tensor, v: Tensor) -> None:
        if i not in self.slots:
            shape = (len(k), k.shape[1], self.size, k.shape[3])
            self.slots[i] = k.new_zeros(shape), v.new_zeros(shape)
        kept = min(k.shape[2], self.size)
        end = self.num_tokens + k.shape[2]
        places = torch.arange(end - kept, end) % self.size
        for held, new in zip(self.slots[i], (k, v), strict=True):
            held[:, :, places] = new[:, :, -kept:]

    def whole(self, i: int) -> tuple[Tensor, Tensor]:
        filled = min(self.num_tokens + 1, self.size)
        keys, values = self.slots[i]
        return keys[:, :, :filled], values[:, :, :filled]


class Ringed(Decoder):
    """A window's keys in a ring, as a cache of its own."""

    attention = RingAttention

    def forward(
        self, input_ids: Tensor, positions: Tensor, attention_mask: Tensor | None, cache: Any = None
    ) -> tuple[Tensor, Any]:
        ring = cache or Ring(self.c["sliding_window"])
        past, num_new = ring.num_tokens, input_ids.shape[1]
        mask = self.visible(past, num_new, attention_mask)
        seen = min(past, ring.size - 1) + num_new
        mask = mask[..., -seen:]
        if num_new == 1 and past >= ring.size:
            mask = mask.roll((past + 1) % ring.size, -1)
        logits = self.run(input_ids, positions, mask, ring)
        ring.num_tokens += num_new
        return logits, ring


class Talkative(Ringed):
    def forward(self, *given: Any, **named: Any) -> Any:
        print("forward was called")  # noqa: T201  # as strangers do
        return super().forward(*given, **named)


def load(kind: type[Decoder], directory: Path, dtype: torch.dtype) -> Any:
    """A checkpoint in a stranger's hand."""
    config = json.loads((directory / "config.json").read_text())
    stored = load_file(directory / "model.safetensors")
    own = {"tok_emb": "model.embed_tokens", "final_norm": "model.norm", "out_head": "lm_head"}
    if "lm_head.weight" not in stored:
        own["out_head"] = "model.embed_tokens"
    for i in range(config["num_hidden_layers"]):
        own |= {f"blocks.{i}.{here}": f"model.layers.{i}.{there}" for here, there in _NAMES.items()}
    known = {f"{here}.weight": stored.get(f"{there}.weight") for here, there in own.items()}
    model = kind(config)
    model.load_state_dict({name: one for name, one in known.items() if one is not None})
    return model.to(dtype).eval()


def turned(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)
