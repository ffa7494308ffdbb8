"""The ceiling: how fast this machine reads, and how many bytes a token has to read.

Decoding one row reads every weight once a token; nothing that is right is faster than that. Knows
models and caches, and no engine.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from portkit.architecture import CausalLM

_READ_BYTES = 512 * 1024 * 1024
_REPEATS = 12


def bandwidth() -> float:
    """Bytes per second of the best of several reads of 512 MB, with torch's current threads."""
    memory = torch.ones(_READ_BYTES // 4)
    best = float("inf")
    for _ in range(_REPEATS):
        for read in (torch.sum, torch.amax):
            started = time.perf_counter()
            read(memory)
            best = min(best, time.perf_counter() - started)
    return _READ_BYTES / best


def bytes_per_token(model: CausalLM, context: int, batch: int, *, int8_head: bool = False) -> int:
    """What a step of `batch` rows with `context` tokens behind them has to read.

    All weights once, of an embedding that is not also the head the rows' own entries alone, keys
    and values of what each layer sees. `int8_head`: the head is read in its 8-bit copy.
    """
    itemsize = next(model.parameters()).itemsize
    embedding = model.get_parameter("model.embed_tokens.weight")
    head = model.get_submodule("lm_head").weight
    assert isinstance(head, Tensor), "a matrix, quantised or not"
    # A quantised matrix is a buffer.
    count = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    if head is not embedding:
        count -= embedding.nbytes
    count += batch * embedding.shape[1] * itemsize
    if int8_head:
        count -= head.nbytes - head.numel()
    return count + model.new_cache(batch, context + 1).num_bytes(context, itemsize)
