"""Forty families that portkit has never seen: the same class under other names is proven exact.

At every module that runs, in float32 and bfloat16, by each attention kernel that the family has;
and a bit, an epsilon and a skipped module are each found in the one place where they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import pytest
import torch
import transformers
from torch import Tensor

from parity_tests.unseen import planted
from parity_tests.unseen.conftest import UnseenMaker
from parity_tests.unseen.families import UNSEEN, VOCABULARY
from parity_tests.unseen.renamed import renamed, renamed_eager
from portkit.parity import compare

CPU = torch.device("cpu")
CAUSAL = [name for name, unseen in UNSEEN.items() if not unseen.own_class]
FAST = ("gpt2", "falcon", "phi3", "gemma2", "qwen2_moe", "deepseek_v2", "mamba", "falcon_h1")
FAST_PLANTED = ("gpt2", "gemma2", "deepseek_v2", "mamba")
KERNELS = {"sdpa": renamed, "eager": renamed_eager}
ONLY_EAGER = ("gptj", "bloom", "mpt", "gemma2", "gpt_oss", "mamba", "mamba2")
"""In Transformers."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PLANTED = {"bit": planted.a_bit, "epsilon": planted.an_epsilon, "skip": planted.a_skip}
NEVER_CALLED = {
    "mamba": "backbone.layers.1.mixer.conv1d",
    "mamba2": "backbone.layers.1.mixer.conv1d",
    "jamba": "model.layers.2.mamba.conv1d",
    "nemotron_h": "model.layers.4.mixer.conv1d",
    "falcon_h1": "model.layers.1.mamba.conv1d",
    "qwen3_next": "model.layers.1.linear_attn.conv1d",
    "lfm2": "model.layers.2.conv.conv",
}
WITH_EXPERTS = {
    "deepseek_v3": (),
    **dict.fromkeys(
        ("granitemoe", "mixtral", "qwen2_moe", "qwen3_next", "glm4_moe"), pytest.mark.slow
    ),
}
NO_EPSILON = {"olmo": "its norms are functions, with a constant"}


def fast_and_slow(names: Iterable[str]) -> list[object]:
    slow = pytest.mark.slow
    return [one if one in FAST_PLANTED else pytest.param(one, marks=slow) for one in names]


def _ways() -> Iterator[object]:
    for name in CAUSAL:
        for dtype in DTYPES:
            for kernel in ["eager"] if name in ONLY_EAGER else KERNELS:
                is_first = kernel == "sdpa" or name in ONLY_EAGER
                is_fast = name in FAST and dtype == "float32" and is_first
                marks = () if is_fast else (pytest.mark.slow,)
                yield pytest.param(name, dtype, kernel, marks=marks, id=f"{name}-{dtype}-{kernel}")


@pytest.mark.parametrize(("name", "dtype", "kernel"), [*_ways()])
def test_exact_at_every_module_that_runs(
    name: str, dtype: str, kernel: str, unseen_checkpoint: UnseenMaker
) -> None:
    folder = unseen_checkpoint(name)
    port = KERNELS[kernel](folder, DTYPES[dtype], CPU)
    found = compare(port, folder, dtype=dtype, attention=kernel)
    assert found.verdict == "exact", str(found)
    (in_dtype,) = found.comparisons
    judged = {re.split("[:#@]", one.site)[0] for one in in_dtype.judgements}
    ran = modules_that_run(folder, DTYPES[dtype], kernel)
    assert ran - judged == set()
    assert len(judged & ran) == len(ran) > 20


@pytest.mark.parametrize("mistake", PLANTED)
@pytest.mark.parametrize("name", fast_and_slow(CAUSAL))
def test_what_is_planted_is_found_in_its_place(
    name: str, mistake: str, unseen_checkpoint: UnseenMaker
) -> None:
    folder = unseen_checkpoint(name)
    kernel = "eager" if name in ONLY_EAGER else "sdpa"
    port = KERNELS[kernel](folder, torch.float32, CPU)
    place = PLANTED[mistake](port, token_ids())
    if place is None:
        assert name in NO_EPSILON
        return
    found = compare(port, folder, dtype="float32", attention=kernel, probe="quick")
    assert found.verdict == "diverged", place
    sites = [one.site for one in found.culprits]
    assert {module_of(one) for one in sites} == {place}
    assert any(one.endswith(" (parameter)") for one in sites) is (mistake == "bit")


@pytest.mark.parametrize("name", fast_and_slow(NEVER_CALLED))
def test_a_bit_is_found_in_a_module_that_is_never_called(
    name: str, unseen_checkpoint: UnseenMaker
) -> None:
    """By itself, and where what a function makes of it arrives."""
    folder, place = unseen_checkpoint(name), NEVER_CALLED[name]
    kernel = "eager" if name in ONLY_EAGER else "sdpa"
    port = KERNELS[kernel](folder, torch.float32, CPU)
    planted.flip(port.named(place).weight)
    found = compare(port, folder, dtype="float32", attention=kernel, probe="quick")
    assert found.verdict == "diverged"
    assert found.culprits[0].site == f"{place}.weight (parameter)"
    assert all(one.site.startswith(place.rpartition(".")[0]) for one in found.culprits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [pytest.param(one, marks=m) for one, m in WITH_EXPERTS.items()])
def test_what_experts_are_allowed_is_rounding(
    name: str, dtype: str, unseen_checkpoint: UnseenMaker
) -> None:
    """A choice that comes in another order is no other choice: no floor is made of exchanged rows.

    By that floor a mistake of a thousandth within the experts would pass.
    """
    folder, step = unseen_checkpoint(name), torch.finfo(DTYPES[dtype]).eps
    port = renamed_eager(folder, DTYPES[dtype], CPU)
    (experts,) = re.findall(r"= (\S*layers\.1\.\S+\.experts)$", port.sites, re.MULTILINE)
    wrong = 1 + max(1e-3, 16 * step)
    port.named(experts).register_forward_hook(lambda _, __, output: output * wrong)
    found = compare(port, folder, dtype=dtype, attention="sdpa", probe="quick")
    (in_dtype,) = found.comparisons
    floors = {one.site: one.floor for one in in_dtype.judgements if one.floor is not None}
    assert len(floors) > 20
    assert max(floors.values()) < 8 * step, floors
    assert [one.site for one in in_dtype.culprits] == [experts]


def module_of(site: str) -> str:
    return re.sub(r"\.\w+ \(parameter\)$", "", re.split("[:#@]", site)[0])


def token_ids() -> Tensor:
    return torch.randint(4, VOCABULARY, (2, 31), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def modules_that_run(folder: object, dtype: torch.dtype, kernel: str) -> set[str]:
    """Names of the reference's modules that are called and return a tensor, tables left out."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=kernel
    )
    ran: set[str] = set()

    def hook(name: str) -> object:
        return lambda _, __, output: ran.add(name) if has_tensor(output) else None

    for name, module in model.eval().named_modules():
        if name and not name.endswith("rotary_emb"):
            module.register_forward_hook(hook(name))
    model(token_ids())
    return ran


def has_tensor(output: object) -> bool:
    if isinstance(output, dict):
        return any(map(has_tensor, output.values()))
    if isinstance(output, tuple | list):
        return any(map(has_tensor, output))
    return isinstance(output, Tensor)


def test_it_is_said_that_a_family_has_one_attention_alone(unseen_checkpoint: UnseenMaker) -> None:
    folder = unseen_checkpoint("gptj")
    port = renamed(folder, torch.float32, CPU)
    found = compare(port, folder, dtype="float32", attention="sdpa", probe="quick")
    assert found.verdict == "exact"
    assert "the reference has no sdpa attention: it runs its own" in found.notes


def test_two_attentions_that_are_two_functions_are_no_floor(unseen_checkpoint: UnseenMaker) -> None:
    """Falcon's with ALiBi: in Transformers they are a hundredth apart."""
    folder = unseen_checkpoint("falcon alibi")
    reference, other = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel)
        for kernel in KERNELS
    )
    with torch.no_grad():
        apart = (reference(token_ids()).logits - other(token_ids()).logits).abs().max()
    assert apart > 1e-3
    found = compare(renamed(folder, torch.float32, CPU), folder, dtype="float32", probe="quick")
    assert found.verdict == "exact"
    (in_dtype,) = found.comparisons
    floors = [one.floor for one in in_dtype.judgements if one.floor is not None]
    assert 0 < max(floors) < 1e-6
