"""Steps that a device does by itself: the control flow, by value, on the CPU.

What records steps there replays the same calls, warm-up included: whatever is carried from step to
step in the wrong way changes tokens here as it would in a graph. `test_gpu.py` has the graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parity_tests.checkpoints import VOCABULARY
from parity_tests.conftest import CheckpointMaker
from parity_tests.decoding.test_equivalence import (
    LENGTHS,
    NAMES,
    NUM_DECODED,
    distance,
    logits_of,
    prompts,
    true_logits,
)
from parity_tests.generation.specimens import write_checkpoint
from portkit.architecture import CausalLM
from portkit.bench.agreement import compare_tokens
from portkit.decoding import device_session
from portkit.decoding.device_session import DeviceSession, Greedy
from portkit.decoding.fast import FastModel
from portkit.decoding.replay import Outbox, Replay
from portkit.errors import GenerationError
from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.loading import load
from portkit.readable import ReadableBatch


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that the caches outgrow them twice: 16, 32, all."""
    monkeypatch.setattr(device_session, "_SMALLEST_BUCKET", 16)


class OnDevice:
    """What `FastModel.start` does on a CUDA device."""

    def __init__(self, model: CausalLM) -> None:
        self._fast = FastModel(model)
        self.session: DeviceSession | None = None

    def start(
        self, prompts: Sequence[Sequence[int]], room: int, largest: int | None = None
    ) -> DeviceSession:
        self.session = DeviceSession(self._fast, prompts, room)
        return self.session


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", ["one row", "padded rows"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_step_is_the_readable_one(
    name: str, rows: str, dtype: str, tiny_checkpoint: CheckpointMaker
) -> None:
    given = prompts(LENGTHS[rows])
    model = load(tiny_checkpoint(name), dtype=dtype).model
    room = NUM_DECODED + 1
    readable = logits_of(ReadableBatch(model, given, room), len(given))
    found = logits_of(OnDevice(model).start(given, room), len(given))
    truth = true_logits(model, given)
    assert distance(found, truth) <= 1.25 * distance(readable, truth)
    if dtype == "float32":
        assert torch.equal(found.argmax(-1), readable.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma3", "llama3", "qwen3"])
def test_a_device_goes_on_with_its_own_tokens(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Over 90 tokens: the window of gemma3's layers passes three times, every bucket once."""
    model = load(write_checkpoint(tmp_path, name, dtype)).model
    given = prompts([9, 14])
    settings = GenerationSettings(max_new_tokens=90)
    told = {}
    for engine, one in (("readable", model), ("fast, not compiled", OnDevice(model))):
        steps = list(generate(one, given, settings, context_length=400))
        told[engine] = [[s.token_id for s in steps if s.row == row] for row in range(2)]
    assert all(len(set(ids)) > 5 for ids in told["readable"]), "the model repeats itself"
    if dtype is torch.float32:
        assert told["fast, not compiled"] == told["readable"]
    assert compare_tokens(model, given, told, {})["fast, not compiled"].same


def test_what_is_drawn_is_drawn_on_the_device(tmp_path: Path) -> None:
    """Generators and the tokens seen are as they were, however often a step was warmed up."""
    model = load(write_checkpoint(tmp_path, "gemma3")).model
    given = prompts([6, 2, 1])
    for options in (
        {"do_sample": True, "top_k": 7, "top_p": 0.9, "seed": 3},
        {"do_sample": True, "top_k": 0, "min_p": 0.01, "temperature": 1.7, "repetition_penalty": 2},
        {"repetition_penalty": 1.3},
    ):
        settings = GenerationSettings(max_new_tokens=60, **options)
        readable = list(generate(model, given, settings, context_length=400))
        assert list(generate(OnDevice(model), given, settings, context_length=400)) == readable


@pytest.mark.parametrize("room", [1, 2, 5, device_session.STEPS_AHEAD + 1, 40])
def test_a_device_runs_ahead_but_not_beyond_the_room(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(write_checkpoint(tmp_path, "qwen3")).model
    given = prompts([5])
    settings = GenerationSettings(max_new_tokens=room)
    readable = list(generate(model, given, settings, context_length=400))
    engine, sent = OnDevice(model), []
    send = Outbox.send
    monkeypatch.setattr(Outbox, "send", lambda box, t: (sent.append(len(box)), send(box, t)))
    assert list(generate(engine, given, settings, context_length=400)) == readable
    assert len(sent) == room - 1, "what is asked for at the end is needed"
    assert max(sent, default=0) == min(room - 1, device_session.STEPS_AHEAD) - (room > 1)


def test_other_tokens_than_those_it_gave_are_refused(tmp_path: Path) -> None:
    session = OnDevice(load(write_checkpoint(tmp_path, "qwen3")).model).start(prompts([5]), 30)
    tokens = session.greedy(session.prefill().argmax(-1))[:, -1]
    with pytest.raises(AssertionError, match="other tokens"):
        session.greedy((tokens + 1) % VOCABULARY)
    with pytest.raises(AssertionError, match="of its own choice"):
        session.decode(tokens)


def test_damage_is_told_and_does_not_feed_on(tmp_path: Path) -> None:
    """The token of a row with NaN is -1, which no embedding has: a device would stop for good."""
    model = load(write_checkpoint(tmp_path, "llama3")).model
    settings = GenerationSettings(max_new_tokens=30)
    steps = generate(OnDevice(model), prompts([7]), settings, context_length=99)
    next(steps)
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(GenerationError, match="NaN"):
        list(steps)


def test_a_family_that_cannot_be_followed_is_read_on(tiny_checkpoint: CheckpointMaker) -> None:
    model = load(tiny_checkpoint("qwen3 moe")).model
    given = prompts([15, 4])
    for options in ({}, {"do_sample": True, "seed": 5}):
        settings = GenerationSettings(max_new_tokens=NUM_DECODED, **options)
        readable = list(generate(model, given, settings, context_length=400))
        assert list(generate(OnDevice(model), given, settings, context_length=400)) == readable


def test_recording_leaves_no_trace() -> None:
    state, noise = torch.zeros(3, dtype=torch.int64), torch.Generator().manual_seed(4)

    def run() -> Tensor:
        state.add_(torch.randint(100, (3,), generator=noise))
        return state

    replay = Replay(run, [state], [noise])
    assert state.tolist() == [0, 0, 0]
    replay()
    expected = torch.randint(100, (3,), generator=torch.Generator().manual_seed(4))
    assert torch.equal(replay._state[0], expected)


def test_tokens_arrive_in_order() -> None:
    box, arrived = Outbox(3, 2, torch.device("cpu")), []
    tokens = torch.zeros(2, dtype=torch.int64)
    for number in range(10):
        box.send(tokens.fill_(number))  # what is sent is the value now
        if len(box) == 3:
            arrived.append(box.receive().tolist())
    assert arrived == [[number] * 2 for number in range(8)]
    assert len(box) == 2


def test_of_equal_logits_the_first_is_chosen() -> None:
    logits = torch.zeros(3, 11, dtype=torch.bfloat16)
    logits[1, 4:7] = 2.0
    logits[2, 9] = torch.nan
    assert Greedy()(logits).tolist() == [[0], [4], [-1]]
