"""The ceiling: how fast this machine reads, and how many bytes a token has to read.

Decoding one row reads every weight once a token; nothing that is right is faster than that. Knows
models and caches, and no engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.decoding.memory import Arena

_READ_BYTES = 512 * 1024 * 1024
_REPEATS = 12
_ROW = 4096


def bandwidth() -> float:
    """Bytes per second of the best of several reads of 512 MB, with torch's current threads.

    Of memory that streams as well as what weights are placed in, by different kernels: none is the
    fastest everywhere.
    """
    memory = Arena(_READ_BYTES).empty((_READ_BYTES // 4 // _ROW, _ROW), torch.float32).fill_(1)
    vector, (front, back) = torch.ones(_ROW), memory.view(2, -1)
    reads: tuple[Callable[[], object], ...] = (
        lambda: torch.amax(memory),
        lambda: torch.mv(memory, vector),
        lambda: torch.dot(front, back),
    )
    best = float("inf")
    for _ in range(_REPEATS):
        for read in reads:
            started = time.perf_counter()
            read()
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
    # A quantised matrix is a buffer, and so is an embedding's scale.
    count = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    if head is not embedding:
        count -= embedding.nbytes
    count += batch * embedding.shape[1] * itemsize
    if int8_head:
        count -= head.nbytes - head.numel()
    return count + model.new_cache(batch, context + 1).num_bytes(context, itemsize)
