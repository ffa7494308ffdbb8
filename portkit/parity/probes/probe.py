"""Probes: what is run on both sides, and how it is fed.

A probe is a list of passes. A pass is one call of a model: token ids, their positions, which of
them are padding, and the earlier pass whose cache it goes on from. A probe can be written down and
read back, so that what was run once can be run again. Which passes are worth running `probing`
knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from portkit.errors import ProbeError


@dataclass(frozen=True)
class Pass:
    """One call. All tensors int64; 1 in the mask is a real token, and it covers past and new."""

    name: str
    input_ids: Tensor
    """(batch, tokens)"""
    positions: Tensor
    """(batch, tokens)"""
    attention_mask: Tensor | None = None
    """(batch, past + tokens), or None where every token is real."""
    continues: str | None = None
    num_logits: int | None = None
    """Of how many last tokens the head is read; None: of all."""
    inputs: Mapping[str, Tensor] | None = None
    """What a model is called with by the names of its own arguments, and nothing else: it is no
    causal language model. The ids above are those among them, or a placeholder for each row."""

    @property
    def num_tokens(self) -> int:
        """New tokens in a row."""
        return self.input_ids.shape[1]

    @property
    def real(self) -> Tensor:
        """(batch, tokens), True where the new token is real: only there are results defined."""
        return self.real_of_last(self.num_tokens)

    @property
    def real_logits(self) -> Tensor:
        """(batch, tokens whose logits are read), True where the token is real."""
        return self.real_of_last(self.num_logits or self.num_tokens)

    def real_of_last(self, num_tokens: int, num_rows: int | None = None) -> Tensor:
        """(batch, num_tokens), the same for the last tokens of past and new together.

        `num_rows`: where inputs have names, those of another one may be more.
        """
        shape = num_rows or len(self.input_ids), num_tokens
        if self.inputs is not None:
            return _real_of_named(self.inputs, shape, self.input_ids.device)
        if self.attention_mask is None:
            return torch.ones(shape, dtype=torch.bool, device=self.input_ids.device)
        return self.attention_mask[:, -num_tokens:].bool()

    @property
    def counts_on(self) -> bool:
        """Whether positions are those that a model would count that is not told of them."""
        first = self.positions[:, :1]
        steps = torch.arange(self.num_tokens, device=first.device)
        starts = self.continues is not None or not bool(first.any())
        return starts and bool((self.positions == first + steps).all())

    @property
    def counts_real(self) -> bool:
        """Whether positions count the real tokens of each row, as a mask tells them."""
        if self.attention_mask is None:
            return self.counts_on
        counted = (self.attention_mask.cumsum(1) - 1)[:, -self.num_tokens :]
        return bool((self.positions == counted)[self.real].all())

    def token_at(self, row: int, position: int, num_held: int) -> int | None:
        """The id of a token of the last `num_held`; None of an earlier pass's, or of no token."""
        if self.inputs is not None and (
            "input_ids" not in self.inputs or num_held != self.num_tokens
        ):
            return None
        new = position - num_held + self.num_tokens
        return int(self.input_ids[row, new]) if new >= 0 else None

    def to(self, device: torch.device) -> Pass:
        """The same pass, its tensors on `device`."""
        mask, named = self.attention_mask, self.inputs
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            positions=self.positions.to(device),
            attention_mask=None if mask is None else mask.to(device),
            inputs=None if named is None else {name: one.to(device) for name, one in named.items()},
        )


_MASK = "attention_mask"
_OF_TOKENS = ("input_ids", "inputs_embeds")


def _real_of_named(
    inputs: Mapping[str, Tensor], shape: tuple[int, int], device: torch.device
) -> Tensor:
    """Which tokens of this shape are real: those that a mask of this shape has.

    `decoder_attention_mask` is that of `decoder_input_ids`. Where tokens of this shape have no mask
    of their own, all are.
    """
    every = torch.ones(shape, dtype=torch.bool, device=device)
    masks = {
        name.removesuffix(_MASK): one.bool()
        for name, one in inputs.items()
        if name.endswith(_MASK) and one.shape == shape
    }
    for name, one in inputs.items():
        word = next((word for word in _OF_TOKENS if name.endswith(word)), None)
        if word and one.shape[:2] == shape and name.removesuffix(word) not in masks:
            return every
    return torch.stack([*masks.values()]).any(0) if masks else every


@dataclass(frozen=True)
class Probe:
    """Passes in the order in which they run; one that continues another comes after it."""

    name: str
    """default, quick, thorough, or where its tokens came from."""
    passes: tuple[Pass, ...]
    is_complete: bool = False
    """Meant to exercise all that a model turns on: what it leaves out makes it inconclusive."""

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def past(self, one: Pass) -> int:
        """How many tokens stand before a pass, in the cache that it continues."""
        return 0 if one.continues is None else self._ends.get(one.continues, 0)

    @cached_property
    def _ends(self) -> dict[str, int]:
        """By name, how many tokens a cache holds behind each pass.

        A selection of a probe's passes may lack the one that another continues.
        """
        ends: dict[str, int] = {}
        for one in self.passes:
            before = 0 if one.continues is None else ends.get(one.continues, 0)
            ends[one.name] = before + one.num_tokens
        return ends

    @property
    def longest(self) -> int:
        """Tokens of the longest chain of passes that continue each other."""
        return max(self.past(one) + one.num_tokens for one in self)


def as_json(probe: Probe) -> dict[str, Any]:
    """A probe in plain lists, from which `from_json` makes it again."""
    return {
        "name": probe.name,
        "is_complete": probe.is_complete,
        "passes": [
            {
                "name": one.name,
                "continues": one.continues,
                "input_ids": one.input_ids.tolist(),
                "positions": one.positions.tolist(),
                "attention_mask": None
                if one.attention_mask is None
                else one.attention_mask.int().tolist(),
                "num_logits": one.num_logits,
                **({} if one.inputs is None else {"inputs": _shapes(one.inputs)}),
            }
            for one in probe
        ],
    }


def _shapes(inputs: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(one.shape) for name, one in inputs.items()}


def from_json(saved: Mapping[str, Any]) -> Probe:
    """Read a probe that `as_json` wrote, or another program. Raises `ProbeError`."""
    try:
        passes = tuple(map(_pass_from_json, saved["passes"]))
        probe = Probe(str(saved["name"]), passes, bool(saved.get("is_complete", False)))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ProbeError(f"this is no probe that portkit wrote ({reason})") from error
    _check(probe)
    return probe


def _pass_from_json(saved: Mapping[str, Any]) -> Pass:
    def ints(name: str) -> Tensor:
        given = torch.tensor(saved[name])
        if given.is_floating_point() or given.dim() != 2:
            raise ValueError(f"{name} is a list of rows of whole numbers")
        return given.long()

    mask = None if saved.get("attention_mask") is None else ints("attention_mask")
    continues, num_logits = saved.get("continues"), saved.get("num_logits")
    if saved.get("inputs") is not None:
        raise ValueError("it was of named inputs, which a result does not hold: give --inputs")
    return Pass(
        str(saved["name"]), ints("input_ids"), ints("positions"), mask, continues, num_logits
    )


def _check(probe: Probe) -> None:
    if not probe.passes:
        raise ProbeError("a probe has at least one pass")
    held: dict[str | None, tuple[int, int]] = {}
    """Rows and tokens behind each pass that may still be continued."""
    names: set[str] = set()
    for one in probe:
        batch, num_tokens = one.input_ids.shape
        if one.name in names:
            raise ProbeError(f"two passes of the probe are called {one.name!r}")
        if one.continues is not None and one.continues not in held:
            raise ProbeError(
                f"pass {one.name!r} of the probe continues {one.continues!r}, which does not stand "
                "before it, or was continued already"
            )
        rows, past = held.pop(one.continues) if one.continues else (batch, 0)
        masks = [] if one.attention_mask is None else [tuple(one.attention_mask.shape)]
        if (
            num_tokens == 0
            or rows != batch
            or one.positions.shape != one.input_ids.shape
            or masks not in ([], [(batch, past + num_tokens)])
            or not 0 < (one.num_logits or num_tokens) <= num_tokens
        ):
            raise ProbeError(
                f"pass {one.name!r} of the probe: input_ids, positions, attention_mask and "
                f"num_logits do not fit {rows} rows and {past} tokens before"
            )
        names.add(one.name)
        held[one.name] = batch, past + num_tokens


def check_fits(probe: Probe, vocab_size: int, max_position_embeddings: int | None) -> None:
    """Raise `ProbeError` where a model has no such token, or was made for fewer positions."""
    for one in probe:
        for values, bound, what in (
            (one.input_ids, vocab_size, "token {} is outside a vocabulary of {}"),
            (one.positions, max_position_embeddings, "position {} is outside a context of {}"),
        ):
            if bound is None:
                continue
            beyond = values[(values < 0) | (values >= bound)]
            if len(beyond):
                said = what.format(int(beyond[0]), bound)
                raise ProbeError(f"pass {one.name!r} of the probe: {said}; choose other tokens")


def chain(
    name: str,
    input_ids: Tensor,
    cuts: Sequence[int],
    num_logits: int | None = None,
    steps: str | None = None,
) -> list[Pass]:
    """Rows (batch, tokens) fed in pieces that end at `cuts`, each going on from the one before.

    The first is called `name`, the others `steps.1`, `steps.2`, …
    """
    passes: list[Pass] = []
    for number, (start, end) in enumerate(pairwise([0, *cuts])):
        this = name if number == 0 else f"{steps or name}.{number}"
        positions = torch.arange(start, end).expand(len(input_ids), -1)
        before = passes[-1].name if passes else None
        kept = None if num_logits is None else min(num_logits, end - start)
        passes.append(Pass(this, input_ids[:, start:end], positions, None, before, kept))
    return passes
