"""Files as llama2.c writes them, of random weights, beside what they should become.

Written from the format and not from the importer: q and k are drawn in the interleaved layout, and
their rows are sorted for Hugging Face by a list of row numbers. Knows nothing of tokens.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB, POSITIONS = 30, 32, 11, 3, 1, 101, 37
HEAD_DIM = HIDDEN // HEADS
GROUP = 15  # odd, so that scales of q8_0 stand at addresses that are no multiple of four
SIZES = (HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB, POSITIONS)

MATRICES = {  # llama2.c's name: Hugging Face's name, rows, columns
    "wq": ("self_attn.q_proj", HIDDEN, HIDDEN),
    "wk": ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
    "wv": ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
    "wo": ("self_attn.o_proj", HIDDEN, HIDDEN),
    "w1": ("mlp.gate_proj", INTERMEDIATE, HIDDEN),
    "w2": ("mlp.down_proj", HIDDEN, INTERMEDIATE),
    "w3": ("mlp.up_proj", INTERMEDIATE, HIDDEN),
}


@dataclass
class Written:
    """The bytes of a file, and the tensors that an import of it must give."""

    data: bytes = b""
    expected: dict[str, Tensor] = field(default_factory=dict)


class Writer:
    """Draws tensors and appends them to a file, remembering their value."""

    def __init__(self, source_format: str, seed: int = 0) -> None:
        self.quantised = source_format == "q8_0"
        self.generator = torch.Generator().manual_seed(seed)
        self.written = Written()

    def norm(self, name: str) -> None:
        self._float(name, torch.randn(HIDDEN, generator=self.generator))

    def matrix(self, name: str, rows: int, columns: int) -> None:
        if not self.quantised:
            self._float(name, torch.randn(rows, columns, generator=self.generator))
            return
        size = rows * columns
        values = torch.randint(-127, 128, (size,), generator=self.generator, dtype=torch.int8)
        scales = torch.rand(size // GROUP, generator=self.generator)
        self.written.data += bytes(values.numpy()) + scales.numpy().tobytes()
        scale_of_each = scales[torch.arange(size) // GROUP]
        self._expect(name, (values.float() * scale_of_each).view(rows, columns))

    def layers(self, name: str) -> None:
        theirs, rows, columns = MATRICES[name]
        for layer in range(LAYERS):
            self.matrix(f"model.layers.{layer}.{theirs}.weight", rows, columns)

    def layer_norms(self, name: str) -> None:
        for layer in range(LAYERS):
            self.norm(f"model.layers.{layer}.{name}.weight")

    def _float(self, name: str, tensor: Tensor) -> None:
        self.written.data += tensor.numpy().tobytes()
        self._expect(name, tensor)

    def _expect(self, name: str, tensor: Tensor) -> None:
        if "q_proj" in name or "k_proj" in name:
            order = [
                head * HEAD_DIM + channel
                for head in range(len(tensor) // HEAD_DIM)
                for channel in (*range(0, HEAD_DIM, 2), *range(1, HEAD_DIM, 2))
            ]
            tensor = tensor[order]
        self.written.expected[name] = tensor


def legacy(*, tied: bool, rotary_base: float = 10000.0) -> Written:
    writer = Writer("legacy")
    writer.written.data = struct.pack("<7i", *SIZES[:5], VOCAB if tied else -VOCAB, POSITIONS)
    writer.matrix("model.embed_tokens.weight", VOCAB, HIDDEN)
    writer.layer_norms("input_layernorm")
    for name in ("wq", "wk", "wv", "wo"):
        writer.layers(name)
    writer.layer_norms("post_attention_layernorm")
    for name in ("w1", "w2", "w3"):
        writer.layers(name)
    writer.norm("model.norm.weight")
    frequencies = rotary_base ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(POSITIONS)[:, None] * frequencies
    writer.written.data += angles.cos().numpy().tobytes() + angles.sin().numpy().tobytes()
    if not tied:
        writer.matrix("lm_head.weight", VOCAB, HIDDEN)
    return writer.written


def versioned(source_format: str, *, tied: bool) -> Written:
    """v1 or q8_0."""
    writer = Writer(source_format)
    quantised = source_format == "q8_0"
    header = struct.pack("<4sI7iB", b"24ka", 2 if quantised else 1, *SIZES, tied)
    header += struct.pack("<i", GROUP) if quantised else b""
    writer.written.data = header.ljust(256, b"\0")
    writer.layer_norms("input_layernorm")
    writer.layer_norms("post_attention_layernorm")
    writer.norm("model.norm.weight")
    writer.matrix("model.embed_tokens.weight", VOCAB, HIDDEN)
    for name in MATRICES:
        writer.layers(name)
    if not tied:
        writer.matrix("lm_head.weight", VOCAB, HIDDEN)
    return writer.written


def write(source_format: str, *, tied: bool) -> Written:
    if source_format == "legacy":
        return legacy(tied=tied)
    return versioned(source_format, tied=tied)
