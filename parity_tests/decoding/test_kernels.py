"""Triton's kernels, each by value against the operations that it stands for.

They run where Triton is: on a CUDA device as they are, on the CPU by Triton's interpreter, which
`TRITON_INTERPRET=1` in the environment asks for.
"""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from torch import Tensor

from parity_tests.conftest import CheckpointMaker
from parity_tests.decoding.test_equivalence import distance, prompts
from portkit.decoding import fusing, operations
from portkit.decoding.device_session import DeviceSession, Greedy
from portkit.decoding.fast import FastModel
from portkit.decoding.runners import by_kernels
from portkit.loading import load
from portkit.readable import ReadableBatch

pytest.importorskip("triton", reason="needs Triton, which torch's CUDA builds bring")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from portkit.decoding import kernel_operations  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def bfloat16_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts float32 off where a device rounds to the nearest."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
            return rounded.view(torch.uint16).numpy().reshape(data.shape)
        return convert(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_as_near(found: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Of the truth, as torch's operations are: within 1.25 times their distance, and a last bit of
    float32, in which a few values can differ by luck.
    """
    assert found.dtype == plain.dtype
    assert found.shape == plain.shape
    size = float(truth.pow(2).mean().sqrt())
    assert distance(found, truth) <= 1.25 * distance(plain, truth) + 2.0**-23 * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 320), (3, 1, 72), (2, 5, 1, 40), (1, 1, 1)])
@pytest.mark.parametrize("name", ["norm_cast_last", "norm_cast_first"])
def test_norms_and_sums_before_them(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y = drawn(*shape, dtype=dtype) * 3, drawn(*shape, dtype=dtype, seed=1)
    weight = drawn(shape[-1], dtype=torch.float32 if name == "norm_cast_last" else dtype, seed=2)
    plain, ours = getattr(fusing, name), getattr(kernel_operations, name)
    truth = plain(x.double(), weight.double(), 1e-6, torch.float64)
    assert_as_near(ours(x, weight, 1e-6, dtype), plain(x, weight, 1e-6, dtype), truth)
    plain, ours = (getattr(one, f"add_{name}") for one in (fusing, kernel_operations))
    total, found = ours(x, y, weight, 1e-6, dtype)
    assert torch.equal(total, x + y)
    assert total.data_ptr() not in (x.data_ptr(), y.data_ptr())
    truth = getattr(fusing, name)(total.double(), weight.double(), 1e-6, torch.float64)
    assert_as_near(found, plain(x, y, weight, 1e-6, dtype)[1], truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_rotation_is_the_same_in_every_bit(rows: int, dtype: torch.dtype) -> None:
    x = drawn(rows, 1, 6, 40, dtype=dtype).transpose(1, 2)
    cos, sin = (drawn(rows, 1, 40, dtype=dtype, seed=seed) for seed in (1, 2))
    assert torch.equal(kernel_operations.rotate(x, cos, sin, 20), fusing.rotate(x, cos, sin, 20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "size"), [(509, 320), (4099, 72), (3, 1100)])
def test_a_product_with_a_vector(num_rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight = drawn(1, 1, size, dtype=dtype), drawn(num_rows, size, dtype=dtype, seed=1)
    plain = operations.project(x, weight, None)
    truth = operations.project(x.double(), weight.double(), None)
    assert_as_near(kernel_operations.project(x, weight, None), plain, truth)
    bias = drawn(num_rows, dtype=dtype)
    found = kernel_operations.project(x, weight, bias)
    assert torch.equal(found, operations.project(x, weight, bias)), "not for the kernel"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("visible", ["all", "some", "a single one", "the new one alone"])
@pytest.mark.parametrize(
    "sizes", [(1, 4, 1, 40, 24), (1, 6, 2, 40, 200), (3, 4, 4, 24, 65), (1, 10, 2, 64, 1100)]
)
def test_attention_over_shared_out_slots(
    sizes: tuple[int, ...], visible: str, dtype: torch.dtype
) -> None:
    batch, heads, groups, head_dim, slots = sizes
    shape = (batch, 1, heads + 2 * groups, head_dim)
    query, key, value = (
        drawn(*shape, dtype=dtype).transpose(1, 2).split([heads, groups, groups], dim=1)
    )
    kept = [drawn(slots, batch, groups, head_dim, dtype=dtype, seed=seed) for seed in (1, 2)]
    slot = torch.tensor([slots - 3], device=DEVICE)
    mask = torch.ones(batch, 1, 1, slots, dtype=torch.bool, device=DEVICE)
    if visible == "some":
        mask = drawn(batch, 1, 1, slots, seed=3) > 0
    elif visible != "all":
        mask = torch.zeros_like(mask)
        mask[..., 2 if visible == "a single one" else int(slot)] = True
    ours, plain, exact = ([one.clone() for one in kept] for _ in range(3))
    found = kernel_operations.attend(query, (key, value), (ours[0], ours[1]), slot, mask, 0.3)
    torchs = operations.attend(query, (key, value), (plain[0], plain[1]), slot, mask, 0.3)
    truth = operations.attend(
        query.double(),
        (key.double(), value.double()),
        (exact[0].double(), exact[1].double()),
        slot,
        mask,
        0.3,
    )
    assert_as_near(found, torchs, truth)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b), "what is kept is the new key and value, at their slot"


def choices(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """By the kernel, and from all logits as the kernel for products gives them."""
    found = kernel_operations.likeliest(x, weight)
    return found, Greedy()(kernel_operations.project(x, weight, None)[:, -1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 16, 509, 4099])
def test_a_choice_from_a_head(num_rows: int, dtype: torch.dtype) -> None:
    weight = drawn(num_rows, 72, dtype=dtype, seed=1)
    for seed in range(5):
        found, full = choices(drawn(1, 1, 72, dtype=dtype, seed=seed), weight)
        assert torch.equal(found, full)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_logits_the_first_is_chosen(dtype: torch.dtype) -> None:
    """Ties within a block of rows and between blocks, all equal, infinite, and damaged ones."""
    x, weight = drawn(1, 1, 40, dtype=dtype), drawn(509, 40, dtype=dtype, seed=1)
    largest = int(choices(x, weight)[1])
    for places in ([3, 5], [3, 200], [largest, 508], [0, 508], list(range(509))):
        tied = weight.clone()
        tied[places] = 2 * weight[largest]
        found, full = choices(x, tied)
        assert torch.equal(found, full)
        assert int(found) == min(places)
    one = torch.ones_like(x)
    for value, places, expected in (
        (-torch.inf, range(509), 0),
        (torch.inf, [77, 300], 77),
        (torch.nan, [508], -1),
        (torch.nan, [0], -1),
    ):
        odd = torch.zeros_like(weight)
        odd[list(places), 0] = value
        assert int(kernel_operations.likeliest(one, odd)) == expected
        odd[3, 0] = torch.inf if value != -torch.inf else -torch.inf
        if value is torch.nan:
            assert int(kernel_operations.likeliest(one, odd)) == -1, "before an infinite one too"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gemma3 shallow", "qwen3", "llama tied with biases"])
def test_a_step_by_kernels_is_the_readable_one(
    name: str, dtype: str, tiny_checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused chains, kernels and what is left to torch, behind a prompt that fills the window."""
    if INTERPRETED:
        monkeypatch.setattr("portkit.decoding.replay._WARM_UPS", 0)  # there is nothing to warm up
    model = load(tiny_checkpoint(name), dtype=dtype, device=str(DEVICE)).model
    exact = copy.deepcopy(model).double()
    fast = FastModel(model, runner=by_kernels())
    prompt, forced = prompts([26, 2])
    engines = ReadableBatch(model, [prompt], 3), DeviceSession(fast, [prompt], 3)
    with torch.inference_mode():
        plain, found = (
            torch.cat([engine.prefill(), *(engine.decode(token) for token in fed)])
            for engine in engines
            for fed in [torch.tensor(forced, device=DEVICE)[:, None]]
        )
        truth = exact(torch.tensor([prompt + forced], device=DEVICE))[0, len(prompt) - 1 :]
    assert distance(found, truth) <= 1.25 * distance(plain, truth)
    by_head, by_logits = (DeviceSession(fast, [prompt], 2) for _ in range(2))
    chosen = by_head.greedy(by_head.prefill().argmax(-1)).to(DEVICE)
    assert torch.equal(chosen, Greedy()(by_logits.decode(by_logits.prefill().argmax(-1))))
