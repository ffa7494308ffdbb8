"""The likeliest token: torch's own argmax, faster."""

from __future__ import annotations

import pytest
import torch

from portkit.nn.likeliest import likeliest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 509, 512, 513, 5000])
def test_it_is_the_first_of_the_largest(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    for scale in (0.0, 1.0, 30.0):  # all equal, many ties in bfloat16, few
        logits = (torch.randn(7, width, generator=generator) * scale).round(decimals=1).to(dtype)
        assert torch.equal(likeliest(logits), logits.float().argmax(1))
    logits[3] = -torch.inf
    logits[4, width // 2] = torch.inf
    assert likeliest(logits)[3] == 0
    assert likeliest(logits)[4] == width // 2
    logits[2, width - 1] = torch.nan
    logits[5, 0] = torch.nan
    damaged = likeliest(logits) == -1
    assert damaged.tolist() == [False, False, True, False, False, True, False]
