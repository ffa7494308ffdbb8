"""Experts are views of a file, which may begin at any byte; the bits are those of any others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portkit.nn.moe import GatedExperts


def displaced(matrix: Tensor, by: int) -> nn.Parameter:
    """The same values, `by` places behind where torch would have them begin."""
    room = torch.empty(matrix.numel() + by, dtype=matrix.dtype)
    room[by:] = matrix.flatten()
    return nn.Parameter(room[by:].view(matrix.shape))


@pytest.mark.parametrize("wanted", [False, True], ids=["for inference", "with gradients"])
@pytest.mark.parametrize("num_tokens", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_a_matrix_begins_decides_no_bit(
    dtype: torch.dtype, num_tokens: int, wanted: bool
) -> None:
    torch.manual_seed(0)
    experts = GatedExperts(3, 320, 96, F.silu)
    for one in experts.parameters():
        one.data.normal_(0, 0.05)
    experts.to(dtype)
    x = torch.randn(num_tokens, 320).to(dtype)
    weights, chosen = torch.rand(num_tokens, 2).to(dtype), torch.tensor([[0, 2]] * num_tokens)
    with torch.set_grad_enabled(wanted):
        expected = experts(x, weights, chosen)
        for by in (1, 2, 3, 5):
            other = GatedExperts(3, 320, 96, F.silu)
            for ours, theirs in zip(other.children(), experts.children(), strict=True):
                for number, matrix in enumerate(theirs.parameters()):
                    ours[number] = displaced(matrix.detach(), by)
            assert torch.equal(other(x, weights, chosen), expected)
