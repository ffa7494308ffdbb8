"""The processes that train together: who this one is, what all agree on, how a model is shared out.

One process without `torchrun` is one rank, and nothing is initialised. Under `torchrun` each layer
and then the rest is sharded by FSDP2 (`fully_shard`); weights and optimizer stay float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from portkit.errors import PortkitError, TrainingError

T = TypeVar("T")
_PATIENCE = timedelta(hours=12)  # the others wait while the first prepares the data


@dataclass(frozen=True)
class Ranks:
    """This process among `world`; `device` is its own."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, here: bool) -> bool:
        """Whether it holds on any rank."""
        return here if self.world == 1 else bool(self.sum(torch.tensor(float(here))) > 0)

    def sum(self, here: Tensor) -> Tensor:
        """The sum over all ranks, of the same shape on each of them."""
        if self.world == 1:
            return here
        total = here.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def tell(self, here: T) -> T:
        """What the first rank has, on all of them."""
        if self.world == 1:
            return here
        held = [here]
        dist.broadcast_object_list(held, src=0, device=self.device)
        return held[0]

    @contextmanager
    def first_does(self) -> Iterator[bool]:
        """Yields whether this is the first rank, whose errors then all ranks raise."""
        error: PortkitError | None = None
        try:
            yield self.first
        except PortkitError as raised:
            error = raised
        if (told := self.tell(error)) is not None:
            raise told

    def shard(self, module: nn.Module, layers: nn.ModuleList) -> None:
        """Share out `module` among the ranks, each of its `layers` by itself; alone, do nothing."""
        if self.world == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The ranks that `torchrun` started, or this process alone; left again at the end.

    Raises TrainingError where the processes cannot share the kind of device asked for.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(0, 1, device)
        return
    if device.type == "mps":
        raise TrainingError("torchrun cannot share an mps device: run one process, or on cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if dist.is_initialized():  # the caller's, who also ends it
        yield Ranks(dist.get_rank(), world, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), world, device)
    finally:
        dist.destroy_process_group()
