"""The decode-equivalence matrix: every way of computing a token's logits, held against the others.

Cells that take the same operations in the same order are equal in every bit. The others cannot be,
for one of three reasons, and are held to the floor instead, the readable path's own distance from
float64:

- a *ring* that has wrapped holds its keys in another order than the tokens', and sums in it;
- *packed heads*: the readable path mirrors the reference, which lets torch's kernel group heads
  where nothing is masked; the fast path packs a group into one call, many times faster;
- *a single row* in bfloat16 is projected by a kernel for vectors, which sums in another order.

The readable path's own cells (prefill, chunks, token by token, padded rows) are held against the
reference in `families/test_logits.py`.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parity_tests.checkpoints import TINY, VOCABULARY
from parity_tests.conftest import CheckpointMaker
from portkit.architecture import CausalLM
from portkit.decoding.device_session import DeviceSession
from portkit.decoding.fast import FastModel
from portkit.decoding.session import Session
from portkit.generation.loop import ReadableBatch
from portkit.loading import load

WINDOW = 24
NUM_DECODED = 30
SLOWER = {"llama3", "llama linear", "qwen3", "gemma3 shallow"}
"""Left out: nothing in them that the others do not have."""
NAMES = [name for name in TINY if name not in SLOWER and "moe" not in name and "llama4" not in name]
WRAPPING = {
    "qwen3 yarn sliding",
    "gemma3",
    "gemma3 scaled",
    "cohere2",
    "cohere2 with biases",
    "gemma3n",
    "gemma3n plain",
    "smollm3 sliding",
}
SAME_HEADS = {"llama plain heads", "llama wide heads"}
"""Heads that torch's kernel does not group: as many keys as queries, or too wide."""


def prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def forced(rows: int) -> Tensor:
    """The tokens that every engine is fed, (rows, NUM_DECODED), whatever it would have chosen."""
    generator = torch.Generator().manual_seed(8)
    return torch.randint(VOCABULARY, (rows, NUM_DECODED), generator=generator)


@torch.inference_mode()
def logits_of(
    engine: ReadableBatch | Session | DeviceSession,
    rows: int,
    chunk: int | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """(rows, 1 + NUM_DECODED, vocab); `compiled` waits for the compiler."""
    found = [engine.prefill(chunk)]
    if compiled:
        engine.prepare(wait=True)
        assert engine.is_compiled
    found += [engine.decode(tokens) for tokens in forced(rows).unbind(1)]
    return torch.stack(found, 1)


@torch.inference_mode()
def true_logits(model: CausalLM, given: list[list[int]]) -> Tensor:
    """The same in float64, each row alone and in one pass."""
    exact = copy.deepcopy(model).double()
    rows = []
    for prompt, tokens in zip(given, forced(len(given)), strict=True):
        ids = torch.tensor([prompt + tokens.tolist()])
        rows.append(exact(ids)[0, len(prompt) - 1 :])
    return torch.stack(rows)


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).pow(2).mean().sqrt())


LENGTHS = {"one row": [15], "equal rows": [9, 9], "padded rows": [15, 4, 11]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_the_fast_path_is_the_readable_one(
    name: str, rows: str, dtype: str, tiny_checkpoint: CheckpointMaker
) -> None:
    given = prompts(LENGTHS[rows])
    model = load(tiny_checkpoint(name), dtype=dtype).model
    room = NUM_DECODED + 1
    readable = logits_of(ReadableBatch(model, given, room), len(given))
    fast = logits_of(FastModel(model).start(given, room), len(given))
    truth = true_logits(model, given)
    masked = rows == "padded rows"
    same_projections = rows != "one row" or dtype == "float32"
    if same_projections and (masked or name in SAME_HEADS):
        wraps_at = WINDOW - max(LENGTHS[rows]) if name in WRAPPING else None
        assert torch.equal(fast[:, :wraps_at], readable[:, :wraps_at])
    assert torch.equal(fast[:, 0], readable[:, 0]), "the prefill is the readable path's own"
    assert distance(fast, truth) <= 1.25 * distance(readable, truth)
    if dtype == "float32":
        assert torch.equal(fast.argmax(-1), readable.argmax(-1))


@pytest.mark.parametrize("name", ["qwen3 moe", "llama4 crowded"])
def test_a_model_that_chooses_experts_stays_on_the_readable_path(
    name: str, tiny_checkpoint: CheckpointMaker
) -> None:
    """Which expert runs is told by a value, and a graph cannot follow; nor a ring, a chunk."""
    model = load(tiny_checkpoint(name)).model
    given, said = prompts([15, 4]), list[str]()
    fast = logits_of(FastModel(model, say=said.append).start(given, NUM_DECODED + 1), 2)
    assert torch.equal(fast, logits_of(ReadableBatch(model, given, NUM_DECODED + 1), 2))
    assert len(said) == 1
    assert "cannot follow" in said[0]


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_a_prefill_in_chunks_changes_last_bits_only(
    name: str, tiny_checkpoint: CheckpointMaker
) -> None:
    given = prompts([31])
    fast = FastModel(load(tiny_checkpoint(name)).model)
    whole = logits_of(fast.start(given, NUM_DECODED + 1), 1)
    for chunk in (1, 7, 24):
        chunks = logits_of(fast.start(given, NUM_DECODED + 1), 1, chunk)
        torch.testing.assert_close(chunks, whole, rtol=0, atol=2e-5 * float(whole.abs().max()))
        assert torch.equal(chunks.argmax(-1), whole.argmax(-1))


@pytest.mark.parametrize("name", ["gemma3", "llama3"])
def test_a_row_does_not_depend_on_its_neighbours(
    name: str, tiny_checkpoint: CheckpointMaker
) -> None:
    given = prompts([15, 4, 11])
    fast = FastModel(load(tiny_checkpoint(name)).model)
    together = logits_of(fast.start(given, NUM_DECODED + 1), 3)
    for row, prompt in enumerate(given):
        session = fast.start([prompt], NUM_DECODED + 1)
        with torch.inference_mode():
            alone = [session.prefill()]
            alone += [session.decode(tokens[None]) for tokens in forced(3)[row]]
        found = torch.cat(alone)
        scale = float(found.abs().max())
        torch.testing.assert_close(together[row], found, rtol=0, atol=2e-5 * scale)
        assert torch.equal(together[row].argmax(-1), found.argmax(-1))


def test_a_ring_forgets_what_left_the_window(tiny_checkpoint: CheckpointMaker) -> None:
    """Two prompts that differ only before the window of all layers that slide."""
    model = load(tiny_checkpoint("gemma3 shallow")).model
    config = replace(model.config, layer_types=("sliding_attention",) * 4)
    sliding = type(model)(config)
    sliding.load_state_dict(model.state_dict())
    fast = FastModel(sliding.eval())
    (one,) = prompts([4 * WINDOW])
    other = [(token + 1) % VOCABULARY for token in one[:3]] + one[3:]
    room = NUM_DECODED + 1
    found, same = (logits_of(fast.start([given], room), 1) for given in (one, other))
    # Four layers see four windows back: with the last token of the prompt that includes the
    # beginning no more.
    assert torch.equal(found, same)
    nearer = [*one[:-1], (one[-1] + 1) % VOCABULARY]
    assert not torch.equal(found, logits_of(fast.start([nearer], room), 1))


def test_placing_the_weights_leaves_the_model_as_it_was(tiny_checkpoint: CheckpointMaker) -> None:
    folder = tiny_checkpoint("gemma3", torch.bfloat16)
    model, untouched = load(folder).model, load(folder).model
    given = prompts([15])
    logits_of(FastModel(model).start(given, NUM_DECODED + 1), 1)
    for (name, ours), theirs in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.requires_grad
        assert not ours.is_inference(), name
    ids = torch.tensor(given)
    with torch.no_grad():
        assert torch.equal(model(ids), untouched(ids))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    model(ids).sum().backward()
    assert model.lm_head.weight.grad is not None
    attention = model.model.layers[0].self_attn
    end = attention.q_proj.weight.data_ptr() + attention.q_proj.weight.nbytes
    assert attention.k_proj.weight.data_ptr() == end, "queries, keys and values are one matrix"
