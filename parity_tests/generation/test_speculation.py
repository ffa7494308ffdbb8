"""Prompt lookup says what plain greedy decoding says, in fewer passes where text repeats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import portkit
from parity_tests.conftest import CheckpointMaker
from parity_tests.generation.specimens import write_checkpoint
from portkit.architecture import CausalLM
from portkit.bench.agreement import compare_tokens
from portkit.errors import GenerationError
from portkit.generation.loop import Startable, generate
from portkit.generation.settings import GenerationSettings
from portkit.generation.speculation import LookupSession, Speculative
from portkit.loading import load
from portkit.readable import ReadableBatch

DEMO = Path(portkit.__file__).parent / "demo_checkpoint"


def said(model: CausalLM | Startable, prompt: Sequence[int], count: int, **options) -> list[int]:
    settings = GenerationSettings(max_new_tokens=count, **options)
    return [s.token_id for s in generate(model, [prompt], settings, context_length=512)]


@pytest.mark.parametrize("name", ["gemma3", "llama3", "qwen3"])
def test_random_weights_with_and_without(name: str, tmp_path: Path) -> None:
    """Across the window; a lively model, and the same prompt twice so that there is a match."""
    model = load(write_checkpoint(tmp_path, name)).model
    prompt = torch.randint(500, (20,), generator=torch.Generator().manual_seed(1)).tolist() * 2
    assert said(Speculative(model), prompt, 60) == said(model, prompt, 60)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_story_and_a_copy(dtype: str) -> None:
    model = load(DEMO, dtype=dtype).model
    story = said(model, [1, 5, 9], 120)
    assert_agree(model, [1, 5, 9], said(Speculative(model), [1, 5, 9], 120), story)
    again = [*story, *story[:40]]
    assert_agree(model, again, said(Speculative(model), again, 60), said(model, again, 60))


def assert_agree(
    model: CausalLM, prompt: Sequence[int], found: Sequence[int], plain: Sequence[int]
) -> None:
    """Equal; in bfloat16, or first apart where two logits lie within a step of each other.

    What several tokens at once leave in the cache is rounded otherwise, and decides a tie.
    """
    tokens = {"readable": [list(plain)], "speculative": [list(found)]}
    agreement = compare_tokens(model, [list(prompt)], tokens, {})["speculative"]
    assert agreement.same
    if next(model.parameters()).dtype == torch.float32:
        assert found == plain


def test_a_text_that_repeats_takes_fewer_passes(tiny_checkpoint: CheckpointMaker) -> None:
    """A plain random model whose head is tied says its last token again and again."""
    model = load(tiny_checkpoint("llama tied with biases")).model
    prompt = [7] * 12
    session = Speculative(model).start([prompt], 60, 1)
    token = session.prefill().argmax(-1)
    found = token.tolist()
    while len(found) < 60:
        new = session.greedy(token)
        found += new[0].tolist()
        token = new[:, -1]
    plain = ReadableBatch(model, [prompt], 80)
    token, expected = plain.prefill().argmax(-1), []
    while len(expected) < len(found):
        expected += token.tolist()
        token = plain.greedy(token)[:, -1]
    assert found == expected
    assert len(set(found[20:])) < 10, "the model repeats itself, or nothing is tested"
    assert session.num_passes < 30


def test_a_close_call_is_left_to_a_pass_of_its_own(tiny_checkpoint: CheckpointMaker) -> None:
    """Two equal rows of the head: their logits tie, and no pass over several tokens decides."""
    model = load(tiny_checkpoint("llama3")).model
    with torch.no_grad():
        model.lm_head.weight[:] = model.lm_head.weight[0]
    prompt = [3, 4, 5, 3, 4, 5, 3, 4]
    alone = ReadableBatch(model, [prompt], 20)
    alone.prefill()
    session = LookupSession(model, prompt, 20)
    session.prefill()
    token = torch.tensor([5])
    assert session.greedy(token).tolist() == alone.greedy(token).tolist()
    assert session.num_passes == 3


def test_stop_in_the_middle_of_what_was_found() -> None:
    model = load(DEMO).model
    story = said(model, [1, 5, 9], 80)
    prompt, ending = story, story[10]
    plain = said(model, prompt, 60, eos_token_ids=(ending,))
    assert said(Speculative(model), prompt, 60, eos_token_ids=(ending,)) == plain


def test_more_than_greedy_is_refused(tiny_checkpoint: CheckpointMaker) -> None:
    model = Speculative(load(tiny_checkpoint("llama3")).model)
    with pytest.raises(GenerationError, match="one prompt, decoded greedily"):
        said(model, [1, 2], 3, do_sample=True)
    with pytest.raises(GenerationError, match="one prompt, decoded greedily"):
        said(model, [1, 2], 3, repetition_penalty=1.1)
    with pytest.raises(GenerationError, match="one prompt, decoded greedily"):
        list(generate(model, [[1], [2]], GenerationSettings(), context_length=9))
