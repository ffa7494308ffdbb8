"""Tensors of a foreign side fitted to the other side's, and what is put in place fitted back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from portkit.parity.sides.fitting import Fitting

NORM, KEY, MASK = "model.layers.3.self_attn.q_norm", "a.self_attn#key", "a.self_attn#mask"


def fit(name: str, own: Tensor, theirs: Tensor, fitting: Fitting | None = None) -> Any:
    """What the visitor is shown, and what goes on where it puts `theirs` in place."""
    shown: list[Tensor] = []

    def visit(_: str, tensor: Tensor) -> Tensor:
        shown.append(tensor)
        return theirs.clone()

    visitor = (fitting or Fitting()).visitor("pass", {name: theirs}, visit, lambda *_: None)
    went_on = visitor(name, own)
    return (shown[0] if shown else None), went_on


THEIRS = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        (THEIRS, THEIRS),
        (THEIRS.transpose(1, 2).contiguous(), THEIRS),
        (THEIRS.transpose(0, 1), THEIRS),
        (THEIRS.flatten(2), THEIRS),
        (THEIRS.transpose(1, 2), THEIRS.flatten(2)),
        (THEIRS.flatten(0, 1), THEIRS),
        (THEIRS[0, :, 0][None, None], THEIRS[0, :, 0][None]),
    ],
    ids=["same", "heads first", "tokens first", "heads in one", "both", "rows in one", "tables"],
)
def test_there_and_back(own: Tensor, theirs: Tensor) -> None:
    name = NORM if own.dim() < 4 or own.shape[1] != 1 else "model#cos"
    noisy = own + 1e-3
    shown, went_on = fit(name, noisy, theirs)
    assert torch.equal(shown, theirs + 1e-3)
    assert torch.equal(went_on, own)
    assert went_on.stride() == torch.empty_like(own).stride()


def test_equal_sizes_are_told_apart_by_what_was_seen_and_by_values() -> None:
    square = torch.randn(2, 4, 4, 6)
    own = square.transpose(1, 2)
    assert torch.equal(fit(NORM, own + 1e-3, square)[0], square + 1e-3)
    fitting = Fitting()
    fit(NORM, THEIRS.transpose(1, 2), THEIRS, fitting)
    other = torch.randn(2, 4, 4, 6)  # nothing like it, and in the order that was seen before
    assert torch.equal(fit(NORM, other, square, fitting)[0], other.transpose(1, 2))
    assert torch.equal(fit("model.norm", own + 1e-3, own)[0], own + 1e-3)


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        (torch.ones(2, 3, 5, 4), torch.ones(2, 3, 4, 4)),
        (torch.ones(2, 3, 5, 4), torch.ones(2, 60)),
        (torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool)),
        (torch.ones(1, 1, 4, 4, dtype=torch.long), torch.ones(1, 1, 4, 4, dtype=torch.bool)),
    ],
)
def test_what_fits_in_no_way_is_left_alone(own: Tensor, theirs: Tensor) -> None:
    for name in (NORM, MASK):
        shown, went_on = fit(name, own, theirs)
        assert shown is None
        assert went_on is own


def test_cached_keys_kept_otherwise() -> None:
    keys = torch.randn(2, 2, 5, 4)  # as many heads as rows
    repeated = keys.repeat_interleave(3, 1)
    buffer = torch.cat((keys, torch.zeros(2, 2, 4, 4)), 2)
    history = torch.cat((torch.randn(2, 2, 4, 4), keys), 2)
    for own in (repeated, buffer, history, keys.roll(2, 2)):
        shown, went_on = fit(KEY, own, keys + 1e-3)
        assert torch.equal(shown, keys)
        assert went_on.shape == own.shape
        assert float((went_on - own).abs().max()) < 2e-3
    assert torch.equal(fit(KEY, history, keys + 1)[1][:, :, :4], history[:, :, :4])


def test_a_mask_turns_with_its_ring_and_never_by_itself() -> None:
    keys, mask = torch.randn(1, 2, 5, 4), torch.tensor([0, 1, 1, 1, 1]).bool()[None, None, None]
    fitting = Fitting()
    fit(KEY, keys.roll(2, 2), keys, fitting)
    shown, went_on = fit(MASK, mask.roll(2, -1), mask, fitting)
    assert torch.equal(shown, mask)
    assert torch.equal(went_on, mask.roll(2, -1))
    assert torch.equal(fit(MASK, mask.roll(2, -1), mask)[0], mask.roll(2, -1))
    wrong = torch.randn(1, 2, 5, 4)
    assert torch.equal(fit(KEY, wrong, keys)[0], wrong)  # other keys are no ring


def test_masks_of_one_row_for_all() -> None:
    theirs = torch.ones(3, 1, 4, 4).tril().bool()
    shown, went_on = fit(MASK, ~theirs[:1], theirs)
    assert shown.shape == (1, 1, 4, 4)
    assert torch.equal(went_on, theirs[:1])
    theirs[0] = True
    own = ~theirs[:1]
    assert fit(MASK, own, theirs)[1] is own  # rows differ: one cannot stand for all
