"""Tokenizers of the kinds that checkpoints ship, tiny checkpoints with one, a scripted model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

from parity_tests.checkpoints import TINY, VOCABULARY, save_tiny
from portkit.architecture import CausalLM
from portkit.nn.cache import Cache

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CORPUS = ["Once upon a time there was a little girl.", "She said: don't! 日本 naïve"] * 3


def byte_level() -> Backend:
    """As GPT-2, Llama 3 and Qwen: bytes spelled as characters; a character may be several ids."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS[:1], trainer)
    return backend


def byte_fallback(*, strips: bool) -> Backend:
    """As Gemma (spaces kept) or, with `strips`, Llama 2 (one space put in front, and taken off)."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL + BYTES, show_progress=False
    )
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.train_from_iterator(CORPUS[:1], trainer)
    backend.pre_tokenizer = None
    state = json.loads(backend.to_str())
    state["added_tokens"] = [a for a in state["added_tokens"] if a["content"] in SPECIAL]
    return Backend.from_str(json.dumps(state))


def metaspace() -> Backend:
    backend = byte_fallback(strips=True)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return backend


BACKENDS = {
    "byte_level": byte_level,
    "gemma": lambda: byte_fallback(strips=False),
    "llama2": lambda: byte_fallback(strips=True),
    "metaspace": metaspace,
}

NAMED = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}


def write_tokenizer(
    directory: Path, kind: str = "byte_level", *, bos: bool = True, **config
) -> Path:
    """`tokenizer.json` and `tokenizer_config.json`; `bos` is for the post-processor."""
    backend = BACKENDS[kind]()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
        )
    backend.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


SMALL = {
    "llama3": {"num_hidden_layers": 3},
    "qwen3": {"num_hidden_layers": 3},
    "gemma3": {"num_hidden_layers": 4, "sliding_window_pattern": 2},
}


def write_checkpoint(
    directory: Path, name: str, dtype: torch.dtype = torch.float32, **generation
) -> Path:
    """A tiny checkpoint with a tokenizer, and `generation` as its generation config.

    Few layers, for speed, and lively: a plain random model repeats its last token, tied as its head
    is to its embedding, and two such texts are equal whatever the loop does. Strong projections and
    a final norm of random signs undo that.
    """
    tiny = replace(TINY[name], config={**TINY[name].config, **SMALL.get(name, {})})
    save_tiny(tiny, directory, torch.float32)
    tensors = load_file(directory / "model.safetensors")
    signs = torch.randn(tensors["model.norm.weight"].shape) * 2
    tensors["model.norm.weight"] = signs - (1 if name == "gemma3" else 0)
    lively = {key: tensor * (5 if "proj" in key else 1) for key, tensor in tensors.items()}
    stored = {key: tensor.to(dtype) for key, tensor in lively.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"dtype": str(dtype).removeprefix("torch."), "eos_token_id": None}
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


class Scripted(CausalLM):
    """Says what its script says, row by row, whatever it is given; keeps what it is given."""

    def __init__(self, *rows: list[int], prompt_length: int, vocab_size: int = VOCABULARY) -> None:
        super().__init__()
        self.rows, self.prompt_length, self.vocab_size = rows, prompt_length, vocab_size
        self.anchor = nn.Parameter(torch.zeros(1))
        self.fed: list[dict] = []

    def new_cache(self, batch: int, length: int) -> Cache:
        self.cache_size = batch, length
        return Cache(batch, ())

    def hidden_states(self, input_ids, positions=None, cache=None, attention_mask=None):
        self.fed.append({"ids": input_ids, "positions": positions, "mask": attention_mask})
        slots = torch.arange(cache.length, cache.length + input_ids.shape[1])
        return slots[None, :, None].expand(len(input_ids), -1, 1)

    def logits(self, hidden_states):
        step = int(hidden_states[0, -1, 0]) - (self.prompt_length - 1)
        logits = torch.zeros(len(hidden_states), 1, self.vocab_size)
        for row, script in enumerate(self.rows):
            logits[row, 0, script[min(step, len(script) - 1)]] = 5.0
        return logits
