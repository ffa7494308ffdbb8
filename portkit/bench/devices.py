"""What is measured on: a device's name, how fast it reads, and the most memory that was taken."""

from __future__ import annotations

import os
import platform

import torch

from portkit.bench import roofline

_READ_BYTES = 2**30
_REPEATS = 12


def hardware(device: torch.device) -> str:
    """For people: the GPU's name, or the processor's kind and how many cores may be used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}, {cores} cores"


def bandwidth(device: torch.device) -> float:
    """Bytes per second of the device's best read; of a GPU of 1 GB, more than its caches hold."""
    if device.type != "cuda":
        return roofline.bandwidth()
    memory = torch.ones(_READ_BYTES // 4, device=device)
    best_ms = float("inf")
    for _ in range(_REPEATS):
        for read in (torch.sum, torch.amax):
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            started.record()
            read(memory)
            ended.record()
            ended.synchronize()
            best_ms = min(best_ms, started.elapsed_time(ended))
    return _READ_BYTES / (best_ms / 1000)


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that tensors took on a GPU; None elsewhere, where the process counts."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
