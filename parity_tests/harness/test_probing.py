"""Probes: what the default one exercises, what a smaller one leaves out, and reading them back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from parity_tests.checkpoints import TINY
from parity_tests.conftest import CheckpointMaker
from portkit.errors import ProbeError
from portkit.loading import load
from portkit.parity.probes.feeding import text_for
from portkit.parity.probes.probe import Pass, Probe, as_json, check_fits, from_json
from portkit.parity.probes.probing import (
    default_probe,
    probe_of_tokens,
    quick_probe,
    thorough_probe,
    training_batch,
    unexercised,
)


@pytest.mark.parametrize("name", TINY)
def test_complete_probes_leave_nothing_out(name: str, tiny_checkpoint: CheckpointMaker) -> None:
    loaded = load(tiny_checkpoint(name))
    for probe in (default_probe(loaded.model), thorough_probe(loaded.model, seed=3)):
        assert unexercised(loaded.model, probe) == ()
        check_fits(probe, loaded.config.vocab_size, loaded.config.max_position_embeddings)


def test_the_default_probe_goes_around_the_window(tiny_checkpoint: CheckpointMaker) -> None:
    model = load(tiny_checkpoint("gemma3")).model
    window, context = 24, 4096
    probe = default_probe(model)
    passes = {one.name: one for one in probe}
    assert passes["short"].input_ids.shape == (2, window // 2)
    assert passes["long"].num_tokens > window
    decoded = [probe.past(one) for one in probe if one.name.startswith("decode")]
    assert decoded == [*range(window - 3, window + 3)]
    chunks = [one.num_tokens for one in probe if one.name.startswith("chunk")]
    assert chunks == [12, 15, 5]
    assert passes["padded"].real.sum(1).tolist() == [window + 5 - 9, window + 5 - 1]
    assert int(passes["far"].positions.max()) == context - 1
    assert probe.longest == window + 19
    thorough = {one.name: one for one in thorough_probe(model)}
    assert thorough["window"].num_tokens == window
    assert all(one.num_logits is None for one in thorough.values())


@pytest.mark.parametrize("context", [1, 2, 3, 4, 5, 16, 25, 26])
def test_a_complete_probe_fits_whatever_the_context_is(
    context: int, tiny_checkpoint: CheckpointMaker
) -> None:
    """Nothing is asked for that there is no room for; what there is room for is there."""
    model = load(tiny_checkpoint("mistral")).model
    model.config = replace(model.config, max_position_embeddings=context)
    for probe in (default_probe(model), thorough_probe(model), quick_probe(model)):
        check_fits(probe, model.config.vocab_size, context)
        assert all(int(one.real.sum(1).min()) >= 1 for one in probe)
        assert probe.name == "quick" or unexercised(model, probe) == ()
    passes = {one.name: one for one in default_probe(model)}
    assert passes["long"].num_tokens == context
    steps = [name for name in passes if name.startswith("padded.")]
    assert ("padded" in passes, len(steps)) == (context > 1, min(2, max(0, context - 2)))


def test_what_a_context_of_one_token_has_no_room_for_is_refused(
    tiny_checkpoint: CheckpointMaker,
) -> None:
    model = load(tiny_checkpoint("mistral")).model
    model.config = replace(model.config, max_position_embeddings=1)
    with pytest.raises(ProbeError, match="a context of 1 token has no room to decode"):
        text_for(model)
    with pytest.raises(ProbeError, match="a context of 1 token has no next one to predict"):
        training_batch(model)


def test_a_probe_is_drawn_from_its_seed(tiny_checkpoint: CheckpointMaker) -> None:
    model = load(tiny_checkpoint("qwen3")).model
    assert as_json(default_probe(model, 7)) == as_json(default_probe(model, 7))
    assert as_json(default_probe(model, 7)) != as_json(default_probe(model, 8))


def test_twelve_tokens_leave_a_window_unseen(tiny_checkpoint: CheckpointMaker) -> None:
    model = load(tiny_checkpoint("gemma3")).model
    left_out = unexercised(model, probe_of_tokens("prompt", [*range(12)]))
    assert [one.name for one in left_out] == [
        "several rows",
        "left padding",
        "prefill in chunks",
        "sliding window of 24",
        "decoding past the window of 24",
        "positions up to 4095",
    ]
    window = left_out[3]
    assert window.reason == "the prompt probe has no prompt of more than 24 tokens"
    assert not window.was_meant
    model = load(tiny_checkpoint("llama3")).model
    names = [one.name for one in unexercised(model, quick_probe(model))]
    scaled = "model.rotary_emb beyond 512 positions, where its scaling sets in"
    assert names == ["left padding", "prefill in chunks", scaled, "positions up to 4095"]


def test_a_probe_reads_back_as_it_was(tiny_checkpoint: CheckpointMaker) -> None:
    probe = default_probe(load(tiny_checkpoint("gemma3")).model)
    again = from_json(json.loads(json.dumps(as_json(probe))))
    assert (again.name, again.is_complete, len(again)) == ("default", True, len(probe))
    for ours, read in zip(probe, again, strict=True):
        assert (ours.name, ours.continues, ours.num_logits) == (
            read.name,
            read.continues,
            read.num_logits,
        )
        assert torch.equal(ours.input_ids, read.input_ids)
        assert torch.equal(ours.positions, read.positions)
        assert (ours.attention_mask is None) == (read.attention_mask is None)
        assert ours.attention_mask is None or torch.equal(ours.attention_mask, read.attention_mask)


def saved(**changed: object) -> dict[str, object]:
    one = {"name": "a", "continues": None, "input_ids": [[1, 2]], "positions": [[0, 1]]}
    two = {"name": "b", "continues": "a", "input_ids": [[3]], "positions": [[2]], **changed}
    return {"name": "own", "passes": [one, two]}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "a"}, "two passes of the probe are called 'a'"),
        ({"continues": "c"}, "continues 'c', which does not stand before it"),
        ({"input_ids": [[3], [4]]}, "do not fit 1 rows and 2 tokens before"),
        ({"positions": [[2, 3]]}, "do not fit"),
        ({"attention_mask": [[1, 1]]}, "do not fit"),
        ({"num_logits": 2}, "do not fit"),
        ({"input_ids": [[]], "positions": [[]]}, "no probe that portkit wrote"),
        ({"input_ids": [[1.5]]}, "no probe that portkit wrote"),
        ({"input_ids": [3]}, "no probe that portkit wrote"),
        ({"input_ids": "three"}, "no probe that portkit wrote"),
        ({"input_ids": [[1 << 70]]}, "no probe that portkit wrote"),
    ],
)
def test_a_broken_probe_is_refused(changed: dict[str, object], said: str) -> None:
    assert len(from_json(saved())) == 2
    with pytest.raises(ProbeError, match=said) as error:
        from_json(saved(**changed))
    assert "\n" not in str(error.value)


def test_an_empty_probe_is_refused() -> None:
    with pytest.raises(ProbeError, match="at least one pass"):
        from_json({"name": "own", "passes": []})
    with pytest.raises(ProbeError, match="no probe"):
        from_json({"passes": 3})
    with pytest.raises(ProbeError, match="at least one token"):
        probe_of_tokens("prompt", [])


def test_tokens_and_positions_must_fit_the_model() -> None:
    def asking(token: int, position: int) -> Probe:
        return Probe("own", (Pass("a", torch.tensor([[token]]), torch.tensor([[position]])),))

    check_fits(asking(508, 4095), 509, 4096)
    with pytest.raises(ProbeError, match="token 509 is outside a vocabulary of 509"):
        check_fits(asking(509, 0), 509, 4096)
    with pytest.raises(ProbeError, match="token -1 is outside"):
        check_fits(asking(-1, 0), 509, 4096)
    with pytest.raises(ProbeError, match="position 4096 is outside a context of 4096"):
        check_fits(asking(0, 4096), 509, 4096)
