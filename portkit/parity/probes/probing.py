"""Choosing a probe for a model, and saying what a probe leaves out.

What a model turns on are its traits: the windows of its caches, the scaling of its rotary tables,
the end of its context. The default probe exercises all of it in as few tokens as that takes; the
thorough one in more rows, more lengths, and with the head read at every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.errors import ProbeError
from portkit.parity.probes.probe import Pass, Probe, chain
from portkit.parity.result import NotVerified
from portkit.parity.subject.traits import Traits, traits_of

Subject = Traits | CausalLM

_PLAIN_LENGTH = 64
"""Stands for the window where there is none: from here on the large matrix kernels run."""

_MOST_TOKENS = 1024
"""Of a prompt that is run for nothing but to come to the end of the context."""
_FEW = 4

_TRAINED_LENGTH = 136
"""A batch's logits are held with their graph: of a large vocabulary they are gigabytes."""


class _Tokens:
    """Token ids drawn from a seed, one call after the other."""

    def __init__(self, model: Traits, seed: int) -> None:
        self._vocab_size = model.vocab_size
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: int, count: int) -> Tensor:
        return torch.randint(self._vocab_size, (batch, count), generator=self._generator)


def default_probe(subject: Subject, seed: int = 0) -> Probe:
    """Prompts around the window, decoding across it, chunks, padding, far positions."""
    model = traits_of(subject)
    draw, window = _Tokens(model, seed), _length(model)
    short, long = _within(model, max(2, min(20, window // 2))), _within(model, window + 19)
    passes = [
        *chain("short", draw(2, short), [short]),
        *chain("long", draw(1, long), [long], num_logits=4),
        # Three tokens short of the window, so that decoding crosses it in the middle.
        *_decoding(draw(1, _within(model, window + 3)), 6, num_logits=2),
        *_chunks(draw(1, _within(model, window + 8)), [window // 2, window + 3], num_logits=2),
        *_padded(draw(2, _within(model, window + 7)), num_logits=2),
        *_far(model, draw, _within(model, 24), num_logits=4),
    ]
    return Probe("default", tuple(passes), is_complete=True)


def quick_probe(subject: Subject, seed: int = 0) -> Probe:
    """A prompt of twelve tokens in two rows, and two decode steps."""
    model = traits_of(subject)
    input_ids = _Tokens(model, seed)(2, _within(model, 14))
    return Probe("quick", tuple(_decoding(input_ids, 2)))


def thorough_probe(subject: Subject, seed: int = 0) -> Probe:
    """The default probe's kinds in more rows and at more lengths, with the logits of every token.

    Costs several times as much: of a large vocabulary the head is most of the work.
    """
    model = traits_of(subject)
    draw, window = _Tokens(model, seed), _length(model)
    half, short = window // 2, _within(model, max(2, window // 2))
    long = _within(model, window + window // 2 + 3)
    passes = [
        *chain("short", draw(2, short), [short]),
        *chain("window", draw(1, window), [window]),
        *chain("long", draw(2, long), [long]),
        *_decoding(draw(2, _within(model, window + 5)), 8),
        *_chunks(draw(1, _within(model, half + window + 5)), [half, half + window]),
        *_padded(draw(3, _within(model, long + 2))),
        *_far(model, draw, long),
    ]
    return Probe("thorough", tuple(passes), is_complete=True)


def training_batch(subject: Subject, seed: int = 0) -> Tensor:
    """Token ids (2, tokens) to differentiate a loss of: beyond the window where that is short.

    Raises ProbeError where no token has a successor.
    """
    model = traits_of(subject)
    if model.max_positions == 1:
        raise ProbeError("a context of 1 token has no next one to predict: leave --backward out")
    return _Tokens(model, seed)(2, _within(model, min(_length(model) + 9, _TRAINED_LENGTH)))


def probe_of_tokens(name: str, tokens: Sequence[int]) -> Probe:
    """A prompt of one's own: prefilled as a whole, and once more with its last tokens decoded."""
    if not tokens:
        raise ProbeError("an empty prompt cannot be compared: give at least one token")
    input_ids = torch.tensor([tokens])
    whole = chain("whole", input_ids, [len(tokens)])
    return Probe(name, (*whole, *(_decoding(input_ids, 3) if len(tokens) > 1 else ())))


def _decoding(input_ids: Tensor, num_steps: int, num_logits: int | None = None) -> list[Pass]:
    """All but the last tokens at once, those one by one."""
    count = input_ids.shape[1]
    cuts = range(max(1, count - num_steps), count + 1)
    return chain("prompt", input_ids, cuts, num_logits, "decode")


def _chunks(input_ids: Tensor, cuts: Sequence[int], num_logits: int | None = None) -> list[Pass]:
    count = input_ids.shape[1]
    return chain("chunk", input_ids, [*(c for c in cuts if 0 < c < count), count], num_logits)


def _padded(input_ids: Tensor, num_logits: int | None = None) -> list[Pass]:
    """A left-padded batch: rows a third short, one token short, then full; and two decode steps.

    Fewer steps where there is room for fewer; a row of one token cannot be padded.
    """
    count, mask = input_ids.shape[1], torch.ones_like(input_ids)
    if count == 1:
        return []
    prompt = max(2, count - 2)
    mask[0, : prompt // 3], mask[1, :1] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return [
        replace(
            one, positions=positions[:, end - one.num_tokens : end], attention_mask=mask[:, :end]
        )
        for one, end in zip(
            chain("padded", input_ids, range(prompt, count + 1), num_logits),
            range(prompt, count + 1),
            strict=True,
        )
    ]


def _far(model: Traits, draw: _Tokens, count: int, num_logits: int | None = None) -> Iterator[Pass]:
    """Positions that jump: strides, then the very end of what the model was made for, if known.

    Where positions cannot be given, tokens up to that end, if they are not too many.
    """
    context = model.max_positions
    if context is None:
        return
    if not model.takes_positions:
        if context <= _MOST_TOKENS:
            yield from chain("far", draw(1, context), [context], num_logits or _FEW)
        return
    input_ids = draw(1, count)
    positions = torch.arange(count) * max(1, context // (4 * count))
    tail = min(3, count)
    positions[-tail:] = context - torch.arange(tail, 0, -1)
    # With the mask given, the reference cannot take the jumps for several packed sequences.
    mask = torch.ones_like(input_ids)
    yield Pass("far", input_ids, positions[None], mask, None, num_logits)


def _length(model: Traits) -> int:
    return _within(model, max(model.windows, default=_PLAIN_LENGTH))


def _within(model: Traits, count: int) -> int:
    return count if model.max_positions is None else min(count, model.max_positions)


@dataclass(frozen=True)
class _Feature:
    """Something that only certain passes exercise."""

    name: str
    needs: str
    """What a probe needs to have, in words."""
    seen: Callable[[Pass, int], bool]
    """Whether a pass, with so many tokens before it, exercises it."""
    least: int = 1
    """A shorter context has no room for such a pass, and nothing to exercise."""


def unexercised(subject: Subject, probe: Probe) -> tuple[NotVerified, ...]:
    """What the model turns on and no pass of the probe exercises, each with what would."""
    return tuple(
        NotVerified(name, f"the {probe.name} probe has no {needs}", probe.is_complete)
        for name, needs in lacking(subject, probe)
    )


def lacking(subject: Subject, probe: Probe) -> Iterator[tuple[str, str]]:
    """The same as names, and what the probe would need for each."""
    model = traits_of(subject)
    for one in _features(model):
        if model.max_positions is not None and one.least > model.max_positions:
            continue
        if not any(one.seen(each, probe.past(each)) for each in probe):
            yield one.name, one.needs


def _features(model: Traits) -> Iterable[_Feature]:
    yield _Feature("several rows", "pass of several rows", lambda one, _: len(one.input_ids) > 1)
    yield _Feature("left padding", "left-padded row", lambda one, _: not bool(one.real.all()), 2)
    yield _Feature(
        "decoding", "step of one token", lambda one, past: past > 0 and one.num_tokens == 1, 2
    )
    yield _Feature(
        "prefill in chunks",
        "second chunk of a prompt",
        lambda one, past: past > 0 and one.num_tokens > 1,
        3,
    )
    for window in model.windows:
        yield from _window_features(window)
    for chunk in model.chunks:
        first = f"first token of an attention chunk of {chunk}, decoded"
        needs = f"step of one token after a multiple of {chunk}"
        yield _Feature(first, needs, _opening(chunk), chunk + 1)
    for name, original in model.scaled.items():
        scaled = f"{name} beyond {original} positions, where its scaling sets in"
        needs = f"position from {original} on"
        yield _Feature(scaled, needs, _reaching(original), original + 1)
    if model.max_positions is not None:
        end = model.max_positions - 1
        at_end = "position at the end of the context"
        yield _Feature(f"positions up to {end}", at_end, _reaching(end))


def _reaching(position: int) -> Callable[[Pass, int], bool]:
    return lambda one, _: int(one.positions.max()) >= position


def _opening(chunk: int) -> Callable[[Pass, int], bool]:
    return lambda one, past: one.num_tokens == 1 and past > 0 and past % chunk == 0


def _window_features(window: int) -> Iterable[_Feature]:
    yield _Feature(
        f"sliding window of {window}",
        f"prompt of more than {window} tokens",
        lambda one, past: past == 0 and one.num_tokens > window,
        window + 1,
    )
    yield _Feature(
        f"decoding past the window of {window}",
        f"step of one token after {window} others",
        lambda one, past: past >= window and one.num_tokens == 1,
        window + 1,
    )
