"""The decode-equivalence matrix: every way of computing a token's logits, held against the others.

What `portkit parity --decode` shows must be so for every tiny checkpoint: what may keep a way from
being equal to the reference in every bit is said here once more, by the checkpoint's name, and
which models the fast path refuses; whether it does is the machine's. And the matrix must see what
is wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parity_tests.checkpoints import TINY, VOCABULARY, llama, save_tiny
from parity_tests.conftest import CheckpointMaker
from portkit.architecture import CausalLM
from portkit.decoding.caches import StaticCache
from portkit.decoding.device_session import DeviceSession
from portkit.decoding.fast import FastModel
from portkit.decoding.packages import Packages
from portkit.decoding.session import Session
from portkit.errors import ProbeError
from portkit.loading import COMPUTE_DTYPES, draw, load, materialize, open_checkpoint
from portkit.nn.attention import SdpaAttention
from portkit.nn.cache import Cache
from portkit.parity.decoding.fast_ways import MakePackages
from portkit.parity.decoding.matrix import COMPILED, FAST, RING, Matrix, decode_matrix
from portkit.parity.decoding.reasons import (
    PACKED,
    PLACED,
    SINGLE_ROW,
    STACKED,
    WRAPPED,
    AskedModel,
)
from portkit.parity.judging.judge import Verdict
from portkit.parity.probes.feeding import (
    CHUNKS,
    DECODED,
    ONE_BY_ONE,
    PADDED,
    STEPWISE,
    WHOLE,
    logits_by_engine,
    prompts_of,
    text_for,
)
from portkit.parity.reference import load_reference
from portkit.parity.subject.discovery import sites_of
from portkit.readable import ReadableBatch

WINDOW = 24
NUM_DECODED = 30
QUICK = [
    "llama plain heads",
    "qwen3 yarn sliding",
    "gemma3 shallow",
    "llama4 crowded",
]
SLOWER = [name for name in TINY if name not in QUICK]
NAMES = [
    name
    for name in TINY
    if name not in {"llama3", "llama linear", "qwen3", "gemma3 shallow"}
    and "moe" not in name
    and "llama4" not in name
]
"""Those that a fast path has something of their own to do for."""
LENGTHS = {"one row": [15], "equal rows": [9, 9], "padded rows": [15, 4, 11]}
REFUSED = {
    **{name: "which experts run is told by a value" for name in TINY if "moe" in name},
    **{name: "where its chunk begins" for name in TINY if "llama4" in name},
}
WRAPPING = {
    "qwen3 yarn sliding",
    "gemma3",
    "gemma3 shallow",
    "gemma3 scaled",
    "cohere2",
    "cohere2 with biases",
    "gemma3n",
    "gemma3n plain",
    "smollm3 sliding",
    "mistral",
    "qwen2 yarn sliding",
}
SAME_HEADS = {"llama plain heads", "llama wide heads", "gemma3n plain"}
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


def matrix_of(
    folder: Path, dtype: str, packages: MakePackages | None = None, prompt: list[int] | None = None
) -> Matrix:
    """As `portkit parity --decode` has it."""
    blueprint = draw(open_checkpoint(folder))
    model = materialize(blueprint, dtype, "cpu").model
    reference = load_reference(folder, COMPUTE_DTYPES[dtype])
    table = sites_of(model)
    return decode_matrix(model, reference, table, text_for(model, 0, prompt), packages)


READABLE = [WHOLE, CHUNKS, ONE_BY_ONE, *STEPWISE]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in SLOWER)]
)
def test_every_way_is_exact_or_within_the_floor(
    name: str, dtype: str, tiny_checkpoint: CheckpointMaker
) -> None:
    found = matrix_of(tiny_checkpoint(name), dtype)
    cells = {one.way: one for one in found.cells}
    for way in READABLE:
        assert cells[way].verdict is Verdict.exact, cells[way]
        assert cells[way].is_equal
        assert cells[way].reasons == ()
        assert (cells[way].num_tokens, cells[way].num_same_tokens) == (41, 41)
    assert found.holds("exact")
    assert (cells[COMPILED].verdict if COMPILED in cells else None) is None
    if name in REFUSED:
        assert [one.way for one in found.cells[len(READABLE) :]] == ["fast path"]
        assert REFUSED[name] in str(cells["fast path"].not_run)
        assert found.verdict is Verdict.exact
        return
    wraps = name in WRAPPING
    assert found.text.windows == ((24,) if wraps else ())
    assert (cells[RING].num_tokens if wraps else cells[RING].verdict) == (32 if wraps else None)
    for way, fast in FAST.items():
        cell = cells[fast]
        assert cell.function_error is not None
        assert cell.function_error < 1e-13
        assert bool(cell.reasons) == (cell.verdict is Verdict.rounding)
        may_be = {
            WRAPPED: wraps,
            PACKED: way != PADDED and name not in SAME_HEADS,
            SINGLE_ROW: way == DECODED,
            PLACED: True,
            STACKED: True,
        }
        assert all(may_be[one] for one in cell.reasons), cell
        assert cell.parting is None or cell.parting.is_rounding
        if dtype == "float32":
            assert cell.num_same_tokens == 41


@pytest.mark.parametrize("name", ["qwen3 moe", "llama4 crowded"])
def test_a_refused_model_stays_on_the_readable_path(
    name: str, tiny_checkpoint: CheckpointMaker
) -> None:
    model = load(tiny_checkpoint(name)).model
    given, said = prompts([15, 4]), list[str]()
    fast = logits_of(FastModel(model, say=said.append).start(given, NUM_DECODED + 1), 2)
    assert torch.equal(fast, logits_of(ReadableBatch(model, given, NUM_DECODED + 1), 2))
    assert len(said) == 1
    assert REFUSED[name] in said[0]


class _OneSlotMore(StaticCache):
    """A ring that keeps a token longer than the window does."""

    def __init__(self, empty: Cache, length: int) -> None:
        super().__init__(empty, length)
        self.kinds = tuple(
            replace(one, num_slots=one.num_slots + 1) if one.ring else one for one in self.kinds
        )


def test_a_ring_of_another_length_is_another_function(
    tiny_checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portkit.decoding.session.StaticCache", _OneSlotMore)
    found = matrix_of(tiny_checkpoint("gemma3 shallow"), "bfloat16")
    kinds = {one.way: one.kind for one in found.cells}
    assert not found.holds("rounding")
    wrong = dict.fromkeys((RING, *FAST.values()), "function")
    assert kinds == dict.fromkeys((*READABLE, COMPILED)) | wrong
    assert [one.function_error > 1e-4 for one in found.cells if one.kind] == [True] * 4


def test_a_readable_path_that_rounds_otherwise_has_no_excuse(
    tiny_checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every single query packs its heads: as right, and not what the reference computes."""
    monkeypatch.setattr("portkit.nn.attention.MAX_GROUPED_HEAD_DIM", 1)
    found = matrix_of(tiny_checkpoint("llama tied with biases"), "float32")
    cells = {one.way: one for one in found.cells}
    assert cells[DECODED].verdict is Verdict.rounding
    assert cells[DECODED].reasons == ()
    assert found.holds("rounding")
    assert not found.holds("exact")


def _careless(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
    context = F.scaled_dot_product_attention(query, key, value, **options)
    if context.dtype is torch.bfloat16:
        context = context.to(torch.float8_e4m3fn).to(torch.bfloat16)
    return context


def test_less_care_is_seen(
    tiny_checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context that is rounded once more, and coarsely; the same function in float64."""
    careless = SimpleNamespace(linear=F.linear, scaled_dot_product_attention=_careless)
    monkeypatch.setattr("portkit.decoding.operations.F", careless)
    found = matrix_of(tiny_checkpoint("qwen3 yarn tempered"), "bfloat16")
    fast = [one for one in found.cells if one.way in FAST.values()]
    assert [one.kind for one in fast] == ["care"] * 3


@torch.no_grad()
def test_reasons_are_what_the_operations_do(
    tiny_checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the machine does by itself: operations are made to differ, and made to be equal."""
    model = load(tiny_checkpoint("gemma3 shallow")).model
    text, cpu = text_for(model), torch.device("cpu")
    asked = AskedModel(model)

    def logits(engine: ReadableBatch | Session | DeviceSession) -> Tensor:
        return logits_by_engine(engine, text, DECODED, cpu)

    given = prompts_of(text, DECODED)
    first = logits(asked.start(given, text.num_compared))
    readable = logits(ReadableBatch(model, given, text.num_compared))
    by_itself = asked.why(text, DECODED, first, readable)
    assert PLACED not in by_itself
    assert asked.why(text, DECODED, first, _moved(readable))[:1] == (PLACED,)
    # A prompt's logits are the readable model's own: nothing explains another one there.
    other = torch.cat((_moved(readable[:1]), first[1:]))
    assert asked.why(text, DECODED, other, readable) == ()
    operations, kernel = "portkit.decoding.operations", SdpaAttention.forward
    vectors = SimpleNamespace(mv=lambda weight, x: _moved(torch.mv(weight, x)))
    alike = SimpleNamespace(mv=lambda weight, x: F.linear(x[None], weight)[0])
    rings = SimpleNamespace(
        linear=F.linear,
        scaled_dot_product_attention=lambda *args, **options: _moved(
            F.scaled_dot_product_attention(*args, **options)
        ),
    )
    for where, what, reason, is_one in (
        (f"{operations}.torch", vectors, SINGLE_ROW, True),
        (f"{operations}.torch", alike, SINGLE_ROW, False),
        (f"{operations}.F", rings, WRAPPED, True),
        ("portkit.nn.attention.SdpaAttention.forward", _moved_kernel(kernel), PACKED, True),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(where, what)
            assert (reason in asked.why(text, DECODED, first, readable)) is is_one


def _moved(x: Tensor) -> Tensor:
    """By a few of float32's last bits."""
    return x * (1 + 2**-20)


def _moved_kernel(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given: _moved(own(*given))


def test_a_prompt_of_ones_own(tiny_checkpoint: CheckpointMaker) -> None:
    found = matrix_of(tiny_checkpoint("qwen3 yarn sliding"), "bfloat16", prompt=[5, 6, 7])
    assert found.text.ids[:3] == (5, 6, 7)
    assert found.text.leaves_a_window
    model = load(tiny_checkpoint("gemma3")).model
    with pytest.raises(ProbeError, match="a prompt of 0 tokens cannot be decoded behind"):
        text_for(model, prompt=[])
    with pytest.raises(ProbeError, match="give 1 to 4051 in a context of 4096"):
        text_for(model, prompt=[1] * 4052)


@pytest.mark.slow
def test_compiled_regions_are_a_way_too(tiny_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    def packages(say: Callable[[str], None]) -> Packages:
        return Packages(tmp_path, say)

    for dtype in ("float32", "bfloat16"):
        compiled = matrix_of(tiny_checkpoint("gemma3 shallow"), dtype, packages).cells[-1]
        assert compiled.way == COMPILED
        assert compiled.verdict is Verdict.rounding
        assert compiled.reasons[-1] == "the compiler's sums run in another order"


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


def test_rows_that_do_not_fill_a_vector_are_computed_alike(tmp_path: Path) -> None:
    """Of a slice of a stacked product, whose rows do not lie together, SiLU has other last bits."""
    save_tiny(llama(intermediate_size=172, num_key_value_heads=4), tmp_path, torch.float32)
    model = load(tmp_path).model
    given, room = prompts(LENGTHS["padded rows"]), NUM_DECODED + 1
    readable = logits_of(ReadableBatch(model, given, room), 3)
    assert torch.equal(logits_of(FastModel(model).start(given, room), 3), readable)


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
