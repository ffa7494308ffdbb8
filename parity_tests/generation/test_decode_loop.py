"""The decode loop: token for token what Transformers generates, and what it asks of a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from parity_tests.checkpoints import VOCABULARY
from parity_tests.generation.specimens import Scripted, write_checkpoint, write_tokenizer
from portkit.checkpoint import LocalFiles
from portkit.errors import GenerationError
from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.loading import load
from portkit.tokenizer import Tokenizer

PROMPT = [2, 17, 300, 4, 91, 45, 8, 8, 203, 77, 61]
CONTEXT = 4096
FAMILIES = ["llama3", "qwen3", "gemma3"]


def tokens_of(model, prompts, settings, **options) -> list[list[int]]:
    options = {"context_length": CONTEXT, **options}
    rows: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, prompts, settings, **options):
        rows[step.row].append(step.token_id)
    return rows


def reference_tokens(folder, prompt, dtype=torch.float32, **options) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.generation_config.eos_token_id = options.pop("eos_token_id", None)
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[
        0, len(prompt) :
    ].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The folder of a tiny checkpoint, and our model of it, in float32."""
    folder = write_checkpoint(tmp_path_factory.mktemp("family"), request.param)
    return folder, load(folder).model


@pytest.mark.parametrize("penalty", [1.0, 1.15])
def test_100_greedy_tokens(family, penalty):
    folder, model = family
    settings = GenerationSettings(max_new_tokens=100, repetition_penalty=penalty)
    (ours,) = tokens_of(model, [PROMPT], settings)
    theirs = reference_tokens(
        folder, PROMPT, max_new_tokens=100, do_sample=False, repetition_penalty=penalty
    )
    assert ours == theirs
    assert len(set(ours)) > 20


@pytest.mark.parametrize("name", FAMILIES)
def test_100_greedy_tokens_in_bfloat16(name, tmp_path):
    folder = write_checkpoint(tmp_path, name, torch.bfloat16)
    (ours,) = tokens_of(load(folder).model, [PROMPT], GenerationSettings(max_new_tokens=100))
    theirs = reference_tokens(folder, PROMPT, torch.bfloat16, max_new_tokens=100, do_sample=False)
    assert ours == theirs
    assert len(set(ours)) > 20


def test_sampled_tokens_are_those_of_the_reference_with_the_same_seed(family):
    folder, model = family
    options = {"temperature": 1.4, "top_k": 60, "top_p": 0.95, "min_p": 0.01}
    options |= {"repetition_penalty": 1.1, "do_sample": True, "max_new_tokens": 60}
    (ours,) = tokens_of(model, [PROMPT], GenerationSettings(seed=11, **options))
    torch.manual_seed(11)
    assert ours == reference_tokens(folder, PROMPT, **options)
    assert len(set(ours)) > 20


def test_eos_ends_a_row_and_is_its_last_token(family):
    folder, model = family
    (free,) = tokens_of(model, [PROMPT], GenerationSettings(max_new_tokens=30))
    eos = [508, free[12]]
    settings = GenerationSettings(max_new_tokens=30, eos_token_ids=tuple(eos))
    (ours,) = tokens_of(model, [PROMPT], settings)
    theirs = reference_tokens(
        folder, PROMPT, max_new_tokens=30, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    assert ours == theirs == free[: free.index(free[12]) + 1]


PROMPTS = [PROMPT, [2, 9], [2, *range(20, 70)], [44]]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_row_of_a_padded_batch_is_the_row_alone(family, penalty):
    _, model = family
    settings = GenerationSettings(max_new_tokens=30, repetition_penalty=penalty)
    together = tokens_of(model, PROMPTS, settings)
    alone = [tokens_of(model, [prompt], settings)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(row) for row in together}) == len(PROMPTS)


def test_a_padded_batch_is_that_of_the_reference(family):
    folder, model = family
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    reference = AutoModelForCausalLM.from_pretrained(folder)
    reference.generation_config.eos_token_id = None
    theirs = reference.generate(padded, attention_mask=mask, max_new_tokens=30, do_sample=False)
    ours = tokens_of(model, PROMPTS, GenerationSettings(max_new_tokens=30))
    assert ours == theirs[:, longest:].tolist()


def test_a_sampled_row_is_the_row_alone_with_its_own_seed(family):
    _, model = family
    settings = GenerationSettings(max_new_tokens=25, do_sample=True, temperature=1.5, seed=3)
    together = tokens_of(model, [PROMPT, PROMPT, [2, 9]], settings)
    for row, prompt in enumerate([PROMPT, PROMPT, [2, 9]]):
        assert tokens_of(model, [prompt], replace(settings, seed=3 + row)) == [together[row]]
    assert together[0] != together[1]
    assert tokens_of(model, [PROMPT, PROMPT, [2, 9]], settings) == together


@pytest.mark.parametrize("chunk", [1, 7, 50, 999])
def test_a_prefill_in_chunks(family, chunk):
    _, model = family
    settings = GenerationSettings(max_new_tokens=8)
    for prompts in ([PROMPTS[2]], PROMPTS):
        whole = tokens_of(model, prompts, settings)
        assert tokens_of(model, prompts, settings, prefill_chunk=chunk) == whole


def test_what_the_model_is_fed():
    model = Scripted([30, 31, 32], [40, 41, 42], prompt_length=3)
    settings = GenerationSettings(max_new_tokens=3)
    assert tokens_of(model, [[5, 6, 7], [9]], settings) == [[30, 31, 32], [40, 41, 42]]
    prefill, first, second = model.fed  # the third token is not fed any more
    assert prefill["ids"][0].tolist() == [5, 6, 7]
    assert prefill["ids"][1, 2:].tolist() == [9]
    assert prefill["positions"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert prefill["mask"].tolist() == [[True] * 3, [False, False, True]]
    assert first["ids"].tolist() == [[30], [40]]
    assert first["positions"].tolist() == [[3], [1]]
    assert first["mask"].tolist() == [[True] * 4, [False, False, True, True]]
    assert second["positions"].tolist() == [[4], [2]]
    assert second["mask"].tolist() == [[True] * 5, [False, False, True, True, True]]
    assert model.cache_size == (2, 5)


def test_prompts_of_one_length_need_no_mask():
    model = Scripted([30], [40], prompt_length=2)
    tokens_of(model, [[5, 6], [7, 8]], GenerationSettings(max_new_tokens=2))
    assert [call["mask"] for call in model.fed] == [None, None]
    assert model.fed[0]["positions"].expand(2, -1).tolist() == [[0, 1], [0, 1]]


def test_rows_end_one_by_one():
    model = Scripted([30, 1, 99], [40, 41, 1], [50, 51, 52, 53, 54], prompt_length=2)
    settings = GenerationSettings(max_new_tokens=4, eos_token_ids=(0, 1))
    steps = list(generate(model, [[5, 6], [7], [8]], settings, context_length=9))
    assert [(step.row, step.token_id, step.finish_reason) for step in steps] == [
        (0, 30, None),
        (1, 40, None),
        (2, 50, None),
        (0, 1, "eos"),
        (1, 41, None),
        (2, 51, None),
        (1, 1, "eos"),
        (2, 52, None),
        (2, 53, "length"),
    ]
    assert [step.text for step in steps] == [""] * 9
    assert len(model.fed) == 4


@pytest.mark.parametrize(
    ("options", "context_length", "expected"),
    [
        ({"max_new_tokens": 4}, 100, [(4, "length"), (4, "length")]),
        ({"max_new_tokens": 4}, 5, [(2, "context"), (4, "length")]),
        ({"max_new_tokens": 4}, 7, [(4, "length"), (4, "length")]),
        ({"max_new_tokens": 9}, 7, [(4, "context"), (6, "context")]),
        ({"max_new_tokens": 9, "max_length": 6}, 7, [(3, "length"), (5, "length")]),
        ({"max_new_tokens": 2, "max_length": 6}, 7, [(2, "length"), (2, "length")]),
        ({"max_new_tokens": 1}, 4, [(1, "length"), (1, "length")]),
    ],
)
def test_a_row_ends_where_its_room_ends(options, context_length, expected):
    model = Scripted([30], [40], prompt_length=3)
    steps = list(
        generate(
            model, [[5, 6, 7], [9]], GenerationSettings(**options), context_length=context_length
        )
    )
    for row, (num_tokens, reason) in enumerate(expected):
        reasons = [step.finish_reason for step in steps if step.row == row]
        assert reasons == [None] * (num_tokens - 1) + [reason]


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    return Tokenizer.open(LocalFiles(write_tokenizer(tmp_path, "byte_level")))


def text_steps(tokenizer, text, settings):
    """The steps of a model that says `text` behind "Once", and then EOS."""
    prompt, both = tokenizer.encode("Once"), tokenizer.encode("Once" + text)
    assert both[: len(prompt)] == prompt
    model = Scripted([*both[len(prompt) :], 1], prompt_length=len(prompt))
    return list(generate(model, [prompt], settings, context_length=999, tokenizer=tokenizer))


def test_text_comes_with_the_steps_and_eos_has_none(tokenizer):
    text = " upon a time — 日本 😀."
    steps = text_steps(tokenizer, text, GenerationSettings(eos_token_ids=(1,)))
    assert "".join(step.text for step in steps) == text
    assert (steps[-1].token_id, steps[-1].finish_reason) == (1, "eos")
    assert tokenizer.decode([step.token_id for step in steps]) == text


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("time",), " upon a "),
        (("e — ",), " upon a tim"),
        (("日", " a"), " upon"),
        (("😀.",), None),
    ],
)
def test_a_stop_string_ends_a_row(stop, expected, tokenizer):
    text = " upon a time — 日本 😀."
    steps = text_steps(tokenizer, text, GenerationSettings(eos_token_ids=(1,), stop=stop))
    assert "".join(step.text for step in steps) == (expected or text.removesuffix("😀."))
    assert steps[-1].finish_reason == "stop"
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
    # The tokens are those up to the one that completed it.
    assert any(one in tokenizer.decode([step.token_id for step in steps]) for one in stop)
    assert not any(one in tokenizer.decode([step.token_id for step in steps[:-1]]) for one in stop)


def test_what_only_may_have_become_a_stop_string_is_shown_in_the_end(tokenizer):
    settings = GenerationSettings(eos_token_ids=(1,), stop=("time — never",))
    steps = text_steps(tokenizer, " upon a time — ", settings)
    assert "".join(step.text for step in steps) == " upon a time — "
    assert "time" not in "".join(step.text for step in steps[:-1])
    limit = settings.override(max_new_tokens=len(steps) - 1, eos_token_ids=())
    steps = text_steps(tokenizer, " upon a time — ", limit)
    assert "".join(step.text for step in steps) == " upon a time — "
    assert steps[-1].finish_reason == "length"


@pytest.mark.parametrize("kind", ["byte_level", "gemma", "llama2"])
def test_the_first_word_keeps_its_space(kind, tmp_path):
    tokenizer = Tokenizer.open(LocalFiles(write_tokenizer(tmp_path, kind)))
    steps = text_steps(tokenizer, " upon", GenerationSettings(eos_token_ids=(1,)))
    assert "".join(step.text for step in steps) == " upon"


def test_a_stop_string_completed_by_the_last_token_is_the_reason(tokenizer):
    settings = GenerationSettings(stop=("time",), eos_token_ids=(1,))
    num_tokens = len(text_steps(tokenizer, " upon a time — ", settings))
    steps = text_steps(tokenizer, " upon a time — ", settings.override(max_new_tokens=num_tokens))
    assert (len(steps), steps[-1].finish_reason) == (num_tokens, "stop")


def test_a_stop_string_that_only_eos_makes_certain_is_the_reason(tmp_path):
    tokenizer = Tokenizer.open(LocalFiles(write_tokenizer(tmp_path, "llama2")))
    settings = GenerationSettings(stop=("\n",), eos_token_ids=(1,))
    steps = text_steps(tokenizer, " upon\n", settings)  # a byte token, and another may follow it
    assert ["".join(step.text for step in steps), steps[-1].token_id] == [" upon", 1]
    assert steps[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "an empty prompt cannot be continued"),
        ([[]], {}, "an empty prompt cannot be continued"),
        ([[5], []], {}, "an empty prompt cannot be continued"),
        ([[5] * 16], {}, "16 tokens leaves no room in a context of 16"),
        ([[5], [5] * 20], {}, "20 tokens leaves no room in a context of 16"),
        ([[5] * 9], {"max_length": 9}, "9 tokens exceeds max_length 9"),
        ([[5]], {"stop": ("x",)}, "stop strings are found in text"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused_at_once(prompts, options, words):
    with pytest.raises(GenerationError, match=words):
        generate(
            Scripted([1], prompt_length=1),
            prompts,
            GenerationSettings(**options),
            context_length=16,
        )


@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_no_numbers_are_an_error(do_sample):
    class Broken(Scripted):
        def logits(self, hidden_states):
            logits = super().logits(hidden_states)
            logits[-1, 0, VOCABULARY - 1] = float("nan") if len(self.fed) == 2 else 0.0
            return logits

    model = Broken([30, 31, 32], [40, 41, 42], prompt_length=1)
    settings = GenerationSettings(do_sample=do_sample, max_new_tokens=3)
    steps = generate(model, [[5], [6]], settings, context_length=16)
    assert [next(steps).row, next(steps).row] == [0, 1]
    with pytest.raises(GenerationError, match=r"logits are NaN: .*--dtype float32"):
        next(steps)


def test_the_consumer_is_not_in_inference_mode():
    model = Scripted([30, 31], prompt_length=1)
    for _ in generate(model, [[5]], GenerationSettings(max_new_tokens=2), context_length=16):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_the_model_is():
    modes = []

    class Watched(Scripted):
        def logits(self, hidden_states):
            modes.append(torch.is_inference_mode_enabled())
            return super().logits(hidden_states)

    model = Watched([30, 31], prompt_length=1)
    list(generate(model, [[5]], GenerationSettings(max_new_tokens=2), context_length=16))
    assert modes == [True, True]
