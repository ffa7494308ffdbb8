"""Why a way of the fast path cannot equal the readable path in every bit: asked of its operations.

The way is run once more, and beside each operation that the fast path has in place of another, the
readable path's own runs on the same input, with the same weights, on the machine at hand. What
gives equal bits there is no reason; what differs is one, from its first token on. Knows the fast
path's operations and what they stand for; knows no dtype, no family and no processor by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from portkit.architecture import CausalLM
from portkit.decoding.bound import Bound
from portkit.decoding.device_session import DeviceSession
from portkit.decoding.fast import FastModel
from portkit.decoding.lowering import Kept, Region, Weight
from portkit.decoding.operations import attend, project
from portkit.decoding.session import Session
from portkit.nn.attention import SdpaAttention
from portkit.nn.cache import SlidingCache
from portkit.parity.probes.feeding import Text, decoded_tokens, logits_by_engine, prompts_of
from portkit.readable import ReadableBatch

WRAPPED = "a ring that has wrapped sums over its keys in another order"
PACKED = "the heads of a group are one call of the kernel"
SLOTS_FIRST = "keys lie in memory by slots and not by heads"
SINGLE_ROW = "a single row's products are summed by a kernel for vectors"
STACKED = "the matrices that read one tensor are one product"
PLACED = "matrices begin elsewhere in memory"
KERNELS = "the device's kernels sum in another order"
COMPILER = "the compiler's sums run in another order"


class AskedModel(FastModel):
    """A fast path that can be asked what the readable path's operations give in place of its."""

    def __init__(self, model: CausalLM, say: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(model, say=say)
        layers = model.new_cache(1, 1).layers
        self._windows = [one.window if isinstance(one, SlidingCache) else None for one in layers]
        self._asked: _Found | None = None

    @torch.no_grad()
    def why(self, text: Text, way: str, fast: Tensor, readable: Tensor) -> tuple[str, ...]:
        """Why `fast`, its logits of a way, differ from `readable`, the model's before its weights
        were placed here; both (num_compared, vocab_size). Nothing, where what they differ in comes
        before all that was found.
        """
        found = _Found()
        placed = ReadableBatch(self.model, prompts_of(text, way), text.num_compared)
        found.ask(PLACED, readable, lambda: logits_by_engine(placed, text, way, self.device))
        self._asked = found
        try:
            session = self.start(prompts_of(text, way), text.num_compared)
            plain = [session.prefill()[-1]]
            for tokens in decoded_tokens(text, way, self.device):
                found.token += 1
                plain.append(session.decode(tokens)[-1])
        finally:
            self._asked = None
        if self.device.type != "cpu":
            found.token = 1
            found.ask(KERNELS, fast, lambda: torch.stack(plain))
        first = min(found.reasons.values(), default=0)
        return tuple(found.reasons) if torch.equal(fast[:first], readable[:first]) else ()

    def start(
        self, prompts: Sequence[Sequence[int]], room: int, largest: int | None = None
    ) -> Session | DeviceSession:
        """As a fast path does; where it is asked, step by step on any device."""
        start = super().start if self._asked is None else self._start_step_by_step
        return start(prompts, room, largest)

    def _start_step_by_step(
        self, prompts: Sequence[Sequence[int]], room: int, largest: int | None
    ) -> Session:
        return Session(self, prompts, room, largest)

    def bind(self, region: Region, batch: int) -> Bound:
        """As a fast path does; where it is asked, with the questions."""
        bound = super().bind(region, batch)
        if self._asked is not None:
            sizes = {name: len(one) for name, one in self._held().items() if one.dim()}
            asking = _Asking(region, self._windows, sizes, self._asked)
            bound.function = lambda arguments: asking.run(*arguments)
        return bound

    def _held(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters(remove_duplicate=False))


class _Found:
    """Reasons, each with the first of the compared tokens that it bears upon."""

    def __init__(self) -> None:
        self.reasons: dict[str, int] = {}
        self.token = 0

    def ask(self, reason: str, ours: Tensor, theirs: Callable[[], Tensor]) -> None:
        """A reason once more, where what is had with it differs from what is had without it."""
        if reason not in self.reasons and not torch.equal(ours, theirs()):
            self.reasons[reason] = self.token


class _Asking(fx.Interpreter):
    """A region, run call by call; of what stands for something else it is asked for that too."""

    def __init__(
        self,
        region: Region,
        windows: Sequence[int | None],
        sizes: dict[str, int],
        found: _Found,
    ) -> None:
        super().__init__(fx.GraphModule({}, region.graph))
        self._windows, self._sizes, self._found = windows, sizes, found
        inputs = [node for node in region.graph.nodes if node.op == "placeholder"]
        self._arguments = dict(zip(inputs, region.arguments, strict=True))

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        given, _ = self.fetch_args_kwargs_from_env(n)
        if n.target is project:
            weight = self._argument(n.args[1])
            assert isinstance(weight, Weight)
            self._ask_product(result, given, [self._sizes[name] for name in weight.names])
        elif n.target is attend:
            keys = self._argument(n.args[2][0])  # type: ignore[index]
            assert isinstance(keys, Kept)
            self._ask_attention(result, given, self._windows[keys.index])
        return result

    def _argument(self, node: Any) -> Any:
        return self._arguments[node]

    def _ask_product(self, result: Tensor, given: Sequence[Any], sizes: list[int]) -> None:
        x, weight, bias = given
        whole = F.linear(x, weight, bias)
        self._found.ask(SINGLE_ROW, result, lambda: whole)
        biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
        parts = zip(torch.split(weight, sizes), biases, strict=True)
        self._found.ask(STACKED, whole, lambda: torch.cat([F.linear(x, *one) for one in parts], -1))

    def _ask_attention(self, result: Tensor, given: Sequence[Any], window: int | None) -> None:
        query, _, kept, slot, mask, scale = given
        batch, _, _, head_dim = query.shape
        num_slots, _, num_groups, _ = kept[0].shape
        newest = int(slot) + 1
        # In the tokens' order, as the readable path keeps them.
        order = torch.arange(num_slots, device=slot.device).roll(-newest)
        mask = None if mask is None else mask[..., order]
        keys, values = (one[order].permute(1, 2, 0, 3) for one in kept)
        packed = query.reshape(batch, num_groups, -1, head_dim)
        context = F.scaled_dot_product_attention(packed, keys, values, mask, scale=scale)
        context = context.reshape(result.shape)
        if newest < num_slots:
            self._found.ask(WRAPPED, result, lambda: context)
        if mask is None and num_slots == window:  # a full window has a mask, which hides nothing
            mask = torch.ones(1, 1, 1, num_slots, dtype=torch.bool, device=query.device)
        readable = SdpaAttention(scale)
        by_group = readable(query, keys, values, mask)
        self._found.ask(PACKED, context, lambda: by_group)
        apart = keys.contiguous(), values.contiguous()
        self._found.ask(SLOTS_FIRST, by_group, lambda: readable(query, *apart, mask))
