"""Work that a device does without the host: recorded once and replayed, its results sent on.

On a CUDA device a recording is a CUDA graph; elsewhere the same calls are made again, warm-up and
all, so that what must hold for a graph can be tested by value without one. Knows callables that
read and write tensors that stay where they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_WARM_UPS = 3
"""Calls before recording: kernels are chosen, compiled and given their workspaces in them."""


class Replay:
    """`run`, to be done again by each call.

    `state` is what one run leaves for the next, and `generators` what it draws from: after making a
    Replay they are as they were before. What else a run writes must not hurt when it is written
    again by the next. Graphs of one `pool` share memory: a result is read before the next replay.
    """

    def __init__(
        self,
        run: Callable[[], Tensor],
        state: Sequence[Tensor],
        generators: Sequence[torch.Generator] = (),
        pool: Any = None,
    ) -> None:
        self._run = run
        self._state, self._generators = state, generators
        self._replay: Callable[[], None] | None = None
        if state[0].is_cuda:
            self._capture(pool)
        else:
            self._warm_up()

    def __call__(self) -> Tensor:
        """What `run` returns; of a graph always the same tensor with new values."""
        if self._replay is None:
            return self._run()
        self._replay()
        return self._result

    def _warm_up(self) -> None:
        before = [one.clone() for one in self._state]
        drawn = [one.get_state() for one in self._generators]
        for _ in range(_WARM_UPS):
            self._run()
            # Each time, not at the end: in a ring a second token would overwrite what is needed.
            for one, value in zip(self._state, before, strict=True):
                one.copy_(value)
            for generator, values in zip(self._generators, drawn, strict=True):
                generator.set_state(values)

    def _capture(self, pool: Any) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._warm_up()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=pool):
            self._result = self._run()
        self._replay = graph.replay


class Outbox:
    """Token ids (batch,) on their way to the host, in order, at most `room` at a time.

    Sending waits for nothing. Receiving waits for the oldest alone: what a device was given to do
    behind it goes on meanwhile.
    """

    def __init__(self, room: int, batch: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        # Only into pinned memory is a copy not waited for.
        self._rows = torch.empty(room, batch, dtype=torch.int64, pin_memory=self._is_cuda)
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._num_sent = 0

    def __len__(self) -> int:
        return len(self._sent)

    def send(self, tokens: Tensor) -> None:
        """Start copying `tokens`, as they will be once what precedes has been done."""
        assert len(self) < len(self._rows)
        row = self._rows[self._num_sent % len(self._rows)]
        self._num_sent += 1
        row.copy_(tokens, non_blocking=True)
        arrived = None
        if self._is_cuda:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._sent.append((row, arrived))

    def receive(self) -> Tensor:
        """The oldest that was sent, (batch,) on the host."""
        row, arrived = self._sent.popleft()
        if arrived is not None:
            arrived.synchronize()
        return row.clone()
