"""The fast path of a model: its decode step as regions over static caches and streaming weights.

    fast = FastModel(model)
    session = fast.start([[2, 9, 7]], room=100)
    token = session.prefill().argmax(-1)
    logits = session.decode(token)                    # (batch, vocab_size)

Prefill is the readable model's own. A row's tokens agree with the readable path's but where two
logits are equal within rounding: sums run in another order. Knows what all sessions of a model
share: its traced step, its weights, its compiled regions, its exact head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Thread

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.decoding.bound import Bound
from portkit.decoding.caches import StaticCache
from portkit.decoding.compiler import Recipe
from portkit.decoding.device_session import DeviceSession
from portkit.decoding.head import ExactHead
from portkit.decoding.lowering import Program, Region, Step, Weight
from portkit.decoding.memory import Arena, check_memory, padded_bytes
from portkit.decoding.operations import project
from portkit.decoding.packages import Function, Packages
from portkit.decoding.runners import Runner, default_runner
from portkit.decoding.session import Session
from portkit.decoding.tracing import trace_step


class FastModel:
    """A model made ready to decode fast; its parameters become views of the memory made here.

    `packages` is where regions compiled for the CPU are found and made; without it everything runs
    by `runner`, which is the device's own if None is given. `say` gets a line for people where
    something is slower than it could be. What can wait is made after a session's prefill: the first
    token waits for nothing.
    """

    def __init__(
        self,
        model: CausalLM,
        packages: Packages | None = None,
        say: Callable[[str], None] = lambda _: None,
        runner: Runner | None = None,
    ) -> None:
        self.model = model
        self.say = say
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.packages = packages
        self.runner = runner or default_runner(self.device)
        self._steps: dict[int, Step] = {}
        self._placed: dict[Weight, Tensor] = {}
        self._functions: dict[str, Function] = {}
        self._exact_head: ExactHead | None = None
        self._making: Thread | None = None

    def start(
        self, prompts: Sequence[Sequence[int]], room: int, largest: int | None = None
    ) -> Session | DeviceSession:
        """Rows of prompts (token ids), padded on the left, each with up to `room` tokens to come.

        `largest`: how many of the largest logits matter, 1 for greedy decoding; None is all. Of
        fewer, with a single row, they are found by the exact head once it is ready.
        Raises GenerationError where the caches do not fit into memory.
        """
        if self.device.type == "cuda":
            return DeviceSession(self, prompts, room)
        return Session(self, prompts, room, largest)

    def program(self, cache: StaticCache, *, masked: bool) -> Program:
        """The step for caches of these kinds; traced, and its weights placed, at the first one."""
        return self._step(cache.batch).cut(cache.kind_of_layer, masked=masked)

    def bind(self, region: Region, batch: int) -> Bound:
        """A region of `program` with its weights and what runs it."""
        constants = self._step(batch).constants
        weights = {
            one: self._placed[one] if one in self._placed else constants[one.names[0]]
            for one in region.arguments
            if isinstance(one, Weight)
        }
        if region.code not in self._functions:
            self._functions[region.code] = self.runner.function(region.graph)
        return Bound(region, weights, self._functions[region.code])

    def compiled(self, recipes: Sequence[Recipe], *, wait: bool) -> list[Function] | None:
        """The recipes' functions; None where they are not to be had, or not yet."""
        if self.packages is None:
            return None
        return self.packages.wait(recipes) if wait else self.packages.find(recipes)

    def exact_head(self, program: Program, *, wait: bool) -> ExactHead | None:
        """The copy of a plain head; made in a thread, None until it is there."""
        if self._making is None:
            (weight,) = [one for one in program.head.arguments if isinstance(one, Weight)]
            self._making = Thread(target=self._make_head, args=(weight,))
            self._making.start()
        if wait:
            self._making.join()
        return self._exact_head

    def has_plain_head(self, program: Program) -> bool:
        """Whether the head is one product in bfloat16, without a bias, with nothing behind it."""
        calls = [node for node in program.head.graph.nodes if node.op.startswith("call")]
        plain = len(calls) == 1 and calls[0].target is project and calls[0].args[2] is None
        return plain and self.dtype is torch.bfloat16

    def _make_head(self, weight: Weight) -> None:
        self._exact_head = ExactHead(self._placed[weight])

    def _step(self, batch: int) -> Step:
        if batch not in self._steps:
            held: dict[str, Tensor] = {}
            held.update(self.model.named_parameters(remove_duplicate=False))
            held.update(self.model.named_buffers(remove_duplicate=False))
            self._steps[batch] = Step(trace_step(self.model, batch), held)
            if not self._placed:
                self._place(self._steps[batch].weights, held)
        return self._steps[batch]

    # Also in the middle of inference: of a parameter that is an inference tensor torch would copy
    # the whole head at each prefill, and no gradient could ever be taken.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _place(self, weights: Sequence[Weight], held: dict[str, Tensor]) -> None:
        """Copy the weights to where they stream well, and let the model's parameters be views."""
        parts = {one: [held[name].data for name in one.names] for one in weights}
        stack: Callable[[Sequence[Tensor]], Tensor] = _concatenate
        if self.device.type == "cpu":
            sizes = [padded_bytes(sum(part.nbytes for part in group)) for group in parts.values()]
            check_memory(sum(sizes), "the weights")
            stack = Arena(sum(sizes)).stack
        for one in weights:
            # One after the other: on a device what has been stacked makes room for the next.
            self._placed[one] = stack(parts.pop(one))
            views = torch.split(self._placed[one], [len(held[name]) for name in one.names])
            for name, view in zip(one.names, views, strict=True):
                held[name].data = view


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
