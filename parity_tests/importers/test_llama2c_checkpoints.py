"""Trained models of llama2.c, imported, say what they said there: in Transformers and in portkit.

The facts (greedy text, logits, loss) were measured elsewhere and lie beside the weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

import portkit

PUBLISHED_TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. "
    'She said, "I want to play with your ball, but I can\'t find it."\n'
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to "
    'do."\n'
    "Lily didn't want to help her mom, so she"
)


@pytest.fixture(scope="session")
def golden(data_folder: Path):
    """(ids of BOS and 200 greedy steps, logits of the first 64 of them as sums and samples)"""
    folder = data_folder / "weights" / "stories260K"
    ids = json.loads((folder / "golden_greedy200_ids.json").read_text())["ids"]
    return ids, json.loads((folder / "golden_logits64.json").read_text())


@pytest.fixture(scope="session")
def stories(data_folder: Path) -> list[str]:
    text = (data_folder / "text" / "tinystories-v2-gpt4-sample.txt").read_text("utf-8")
    return [story.strip() for story in text.split("<|endoftext|>")[:80]]


def reference(folder: Path) -> LlamaForCausalLM:
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    return model


def test_transformers_generates_the_published_text(stories260k, golden):
    ids, _ = golden
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    prompt = tokenizer("", return_tensors="pt").input_ids
    assert prompt.tolist() == [[1]]
    output = reference(stories260k).generate(prompt, max_new_tokens=200, do_sample=False)
    assert output[0].tolist() == ids
    assert tokenizer.decode(output[0], skip_special_tokens=True) == PUBLISHED_TEXT


def test_portkit_generates_the_published_text(stories260k, golden):
    ids, _ = golden
    model = portkit.load(stories260k).model
    cache = model.new_cache(1, 201)
    greedy = [1]
    with torch.no_grad():
        for _ in range(200):
            logits = model(torch.tensor([greedy[-1:]]), cache=cache)
            cache.advance(1)
            greedy.append(int(logits[0, -1].argmax()))
    assert greedy == ids
    tokenizer = Tokenizer.from_file(str(stories260k / "tokenizer.json"))
    assert tokenizer.decode(greedy).encode() == PUBLISHED_TEXT.encode()


@pytest.mark.parametrize("engine", ["transformers", "portkit"])
def test_logits_are_the_recorded_ones(stories260k, golden, engine):
    ids, recorded = golden
    assert recorded["ids"] == ids[:64]
    logits = logits_of(engine, stories260k)(torch.tensor([ids[:64]]))[0]
    assert logits.argmax(-1).tolist() == recorded["argmax"]
    # Recorded on another machine: equal but for the last bits of a sum of 64 products.
    close = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(
        logits[-1, :16], torch.tensor(recorded["logits_last_first16"]), **close
    )
    torch.testing.assert_close(
        logits.mean(-1), torch.tensor(recorded["logits_mean_per_pos"]), **close
    )


@pytest.mark.parametrize("engine", ["transformers", "portkit"])
def test_loss_of_stories260k_is_the_recorded_one(stories260k, stories, engine):
    loss = mean_loss(logits_of(engine, stories260k), stories260k, stories, max_tokens=512)
    assert loss == pytest.approx(1.3020, abs=0.0005)


def test_loss_of_babyllama105_is_that_of_a_trained_model(babyllama105, stories):
    """Its authors report 0.7366 on a text of their own; rows in a wrong order give above 2."""
    loss = mean_loss(logits_of("portkit", babyllama105), babyllama105, stories, max_tokens=256)
    assert 0.6 < loss < 0.7366


@pytest.mark.parametrize("checkpoint", ["stories260k", "babyllama105"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_bit_equal(request, stories, checkpoint, attention):
    folder = request.getfixturevalue(checkpoint)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation=attention)
    port = portkit.load(folder, attention=attention).model
    for story in stories[:4]:
        ids = torch.tensor([tokenizer.encode(story).ids[:256]])
        with torch.no_grad():
            assert torch.equal(port(ids), model(ids).logits)


def logits_of(engine: str, folder: Path):
    """A function from ids (batch, tokens) to logits (batch, tokens, vocab_size)."""
    if engine == "portkit":
        return torch.no_grad()(portkit.load(folder).model)
    model = reference(folder)
    return torch.no_grad()(lambda ids: model(ids).logits)


def mean_loss(logits_of_ids, folder: Path, stories: list[str], max_tokens: int) -> float:
    """Nats per token; each story by itself, BOS in front, cut at `max_tokens`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    total, num_tokens = 0.0, 0
    for story in stories:
        ids = torch.tensor(tokenizer.encode(story).ids[:max_tokens])
        logits = logits_of_ids(ids[None])[0, :-1]
        total += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        num_tokens += len(ids) - 1
    return total / num_tokens
