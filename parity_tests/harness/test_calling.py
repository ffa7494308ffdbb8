"""How a stranger's callable is called: by which names, and what is made of what it returns."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from parity_tests.conftest import CheckpointMaker
from portkit.cli import main
from portkit.errors import PortError
from portkit.parity.sides.calling import answer, calling, said
from portkit.parity.sides.keeping import KeptState

GIVEN = {"input_ids": 1, "positions": 2, "attention_mask": 3, "cache": 4, "past": 5}


def ours(input_ids, positions, attention_mask, cache=None): ...  # type: ignore[no-untyped-def]
def masked(tokens, mask=None): ...  # type: ignore[no-untyped-def]
def hugging(  # type: ignore[no-untyped-def]
    input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, labels=None,
    use_cache=None, **kwargs,
): ...  # fmt: skip
def mamba(input_ids=None, cache_params=None, use_cache=None): ...  # type: ignore[no-untyped-def]
def any_names(idx, **rest): ...  # type: ignore[no-untyped-def]
def by_place(*given): ...  # type: ignore[no-untyped-def]
def placed(ids, positions, /, cache=None): ...  # type: ignore[no-untyped-def]
def llama(tokens, start_pos): ...  # type: ignore[no-untyped-def]
def nameless(x=None): ...  # type: ignore[no-untyped-def]


def called(function: Any, takes: str | None = None) -> tuple[Any, ...]:
    """The arguments that a function is really given."""
    seen: list[Any] = []

    @functools.wraps(function)
    def port(*args: Any, **kwargs: Any) -> int:
        seen.extend((args, kwargs))
        return 0

    calling(port, "mine:load", takes)(port, GIVEN)
    return tuple(seen)


@pytest.mark.parametrize(
    ("function", "takes", "args", "kwargs"),
    [
        (ours, None, (), {"input_ids": 1, "positions": 2, "attention_mask": 3, "cache": 4}),
        (masked, None, (), {"tokens": 1}),
        (masked, "input_ids as tokens, attention_mask as mask", (), {"tokens": 1, "mask": 3}),
        (
            hugging,
            None,
            (),
            {
                "input_ids": 1,
                "position_ids": 2,
                "attention_mask": 3,
                "past_key_values": 4,
                "use_cache": True,
            },
        ),
        (mamba, None, (), {"input_ids": 1, "cache_params": 4, "use_cache": True}),
        (any_names, None, (), {"idx": 1, "positions": 2, "attention_mask": 3, "cache": 4}),
        (by_place, None, (1, 2, 3, 4), {}),
        (by_place, "input_ids, past", (1, 5), {}),
        (placed, None, (1, 2), {"cache": 4}),
        (llama, "input_ids as tokens, past as start_pos", (), {"tokens": 1, "start_pos": 5}),
    ],
)
def test_arguments_go_by_name(
    function: Any, takes: str | None, args: tuple[int, ...], kwargs: dict[str, Any]
) -> None:
    assert called(function, takes) == (args, kwargs)


def test_what_is_left_as_it_is_is_known_and_a_past_is_kept_within() -> None:
    assert calling(masked, "it").left == ("mask",)
    assert calling(hugging, "it").left == ()
    assert calling(llama, "it", "input_ids as tokens, past as start_pos").keeps_within
    assert calling(masked, "it", "input_ids as tokens, cache within").keeps_within
    assert not calling(ours, "it").keeps_within


@pytest.mark.parametrize(
    ("function", "takes", "told"),
    [
        (llama, None, "start_pos may be anything: say it in a line of the table"),
        (llama, None, "takes = input_ids as tokens, positions as start_pos"),
        (nameless, None, "takes (x), and where tokens go may be anything"),
        (
            llama,
            "input_ids as tokens, past as start",
            "it has no start: (tokens, start_pos)",
        ),
        (
            llama,
            "input_ids as tokens, pas",
            "'pas' is none of input_ids, positions",
        ),
        (llama, "past as start_pos", "input_ids is not among it"),
        (llama, "input_ids, input_ids", "each once"),
    ],
)
def test_what_nobody_can_know_is_asked_for(function: Any, takes: str | None, told: str) -> None:
    with pytest.raises(PortError) as error:
        calling(function, "it", takes)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("output", "logits", "cache"),
    [
        (7, 7, None),
        ((7, 8), 7, 8),
        (SimpleNamespace(logits=7, past_key_values=8), 7, 8),
        (SimpleNamespace(logits=7, cache_params=8), 7, 8),
        (SimpleNamespace(logits=7), 7, None),
        ({"logits": 7, "past_key_values": None, "cache": 8}, 7, 8),
        ((7, 8, 9), (7, 8, 9), None),
    ],
)
def test_what_is_returned(output: Any, logits: Any, cache: Any) -> None:
    found = answer(output)
    assert (found.logits, found.cache) == (logits, cache)


def test_an_error_of_others_is_told_by_its_last_line_and_its_own_place() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict({"weihgt": torch.ones(1)})
    told = said(error.value)
    assert told.startswith("RuntimeError: Error(s) in loading state_dict for Linear: … Unexpected")
    assert f"({__file__}, line " in told
    assert told.endswith(': model.load_state_dict({"weihgt": torch.ones(1)}))')


class Keeping(nn.Module):
    """Keeps what it has seen in a buffer, a list, an object and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(4))
        self.table = torch.arange(4)
        self.count, self.past, self.memory = 0, list[torch.Tensor](), SimpleNamespace(last=None)

    def forward(self, x: float) -> tuple[float, ...]:
        keys = self.get_buffer("keys")
        keys[self.count] = x
        self.count += 1
        self.past.append(torch.tensor(x))
        before, self.memory.last = self.memory.last, x
        return (*keys[: self.count].tolist(), len(self.past), before or 0.0)


def test_what_modules_keep_is_carried_from_pass_to_pass() -> None:
    model = Keeping()
    alias, kept, left = model.get_buffer("keys"), KeptState(model), dict[str, Any]()

    def run(name: str, x: float, after: str | None = None) -> tuple[float, ...]:
        kept.restore(left[after] if after else None)
        seen: tuple[float, ...] = model(x)
        left[name] = kept.save()
        return seen

    assert run("free", 1.0) == (1.0, 1, 0.0)
    assert run("taught", 5.0) == (5.0, 1, 0.0)
    assert run("free.1", 2.0, "free") == (1.0, 2.0, 2, 1.0)
    assert run("taught.1", 6.0, "taught") == (5.0, 6.0, 2, 5.0)
    assert run("free.2", 3.0, "free.1") == (1.0, 2.0, 3.0, 3, 2.0)
    assert alias is model.get_buffer("keys")
    assert "table" not in {name for _, name in left["free.2"].values}


PRINTING = """
import os
print("while it is imported")
from parity_tests.harness.foreign_ports import bare
def load(*given):
    print("while it is made")
    port = bare(*given)
    def run(input_ids, positions, attention_mask, cache=None):
        print("while it runs")
        os.write(1, b"and past Python\\n")
        return port(input_ids, positions, attention_mask, cache)
    return run
"""


def test_what_a_port_prints_stays_off_stdout(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint("qwen3 yarn tempered", torch.bfloat16)
    (tmp_path / "printing.py").write_text(PRINTING)
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main(["parity", str(folder), "--quick", "--port", f"{tmp_path}/printing.py:load", "--json"])
    printed = capfd.readouterr()
    assert json.loads(printed.out)["verdict"] == "exact"
    for line in ("while it is imported", "while it is made", "while it runs", "and past Python"):
        assert f"{line}\n" in printed.err
