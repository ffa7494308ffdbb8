"""A port by hand of a family that portkit does not know: proven, and five mistakes placed."""

# ruff: noqa: ARG001  # what plants a mistake shares an interface

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from parity_tests.unseen import gpt2_by_hand
from parity_tests.unseen.conftest import UnseenMaker
from portkit.cli import main
from portkit.parity import compare

FILE = Path(gpt2_by_hand.__file__)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_port_is_proven(
    dtype: str, unseen_checkpoint: UnseenMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    """By other products than the reference's, so that some last bits differ."""
    folder = str(unseen_checkpoint("gpt2"))
    with pytest.raises(SystemExit) as exit_:
        main(["parity", folder, "--port", f"{FILE}:load", "--dtype", dtype, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert exit_.value.code == 0, printed
    assert printed["verdict"] in {"exact", "rounding"}
    assert printed["culprits"] == []
    assert printed["generation"]["equal"]
    in_dtype = printed["comparisons"][0]
    # 28 parameters as they are stored, two embeddings, what goes into and comes out of three blocks
    # with six modules each and the last norm, and the logits.
    assert in_dtype["sites"] == 28 + 2 + 2 * (3 * (1 + 6) + 1) + 1
    assert in_dtype["exact"] + len(in_dtype["rounding"]) == in_dtype["sites"]


def _exact_gelu(model: Any, patch: pytest.MonkeyPatch) -> None:
    functions = {**vars(F), "gelu": lambda x, **_: F.gelu(x)}
    patch.setattr(gpt2_by_hand, "F", SimpleNamespace(**functions))


def _not_transposed(model: Any, patch: pytest.MonkeyPatch) -> None:
    weight = model.blocks[1].out.weight
    weight.data = weight.data.T.contiguous()


def _key_for_query(model: Any, patch: pytest.MonkeyPatch) -> None:
    qkv = model.blocks[2].qkv
    for held in (qkv.weight, qkv.bias):
        q, k, v = held.data.chunk(3)
        held.data = torch.cat((k, q, v))


def _anew(model: Any, patch: pytest.MonkeyPatch) -> None:
    """Positions count from zero in each call, also in decoding."""

    def before(_: Any, args: tuple[torch.Tensor]) -> torch.Tensor:
        return torch.arange(args[0].shape[1]).expand_as(args[0])

    model.places.register_forward_pre_hook(before)


def _epsilon(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.norm.eps = 1e-6


MISTAKES: dict[str, tuple[Callable[[Any, pytest.MonkeyPatch], None], set[str]]] = {
    "the exact gelu": (_exact_gelu, {f"transformer.h.{layer}.mlp.c_proj:in" for layer in range(3)}),
    "a square matrix as it is stored": (_not_transposed, {"transformer.h.1.attn.c_proj"}),
    "key for query": (_key_for_query, {"transformer.h.2.attn.c_attn"}),
    "positions anew": (_anew, {"transformer.wpe"}),
    "an epsilon": (_epsilon, {"transformer.ln_f"}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_placed(
    name: str, unseen_checkpoint: UnseenMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unseen_checkpoint("gpt2")
    model = gpt2_by_hand.load(folder, torch.float32, torch.device("cpu"))
    plant, places = MISTAKES[name]
    plant(model, monkeypatch)
    found = compare(model, folder, dtype="float32", sites=gpt2_by_hand.load.sites)
    assert found.verdict == "diverged"
    assert {one.site for one in found.culprits} == places, str(found)
