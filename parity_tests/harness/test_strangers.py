"""Right ports as strangers write them are not accused, and a fault planted in each is placed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import portkit.parity
from parity_tests.checkpoints import Tiny, mistral, qwen3, save_tiny
from parity_tests.harness import stranger_ports as strangers
from portkit.parity import record
from portkit.parity.api import Result
from portkit.parity.judging.judge import Verdict

PAIRS = strangers.PAIRS + strangers.HEAD_NORMS
WITHIN = f"{PAIRS}\ntakes = input_ids as tokens, past as start_pos"
KINDS: dict[str, tuple[Any, str]] = {
    "plain": (strangers.Plain, PAIRS),
    "without float64": (strangers.OutOfReach, PAIRS),
    "hugging": (strangers.Hugging, PAIRS),
    "buffered": (strangers.Buffered, WITHIN),
    "ringed": (strangers.Ringed, strangers.PAIRS),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Maker = Callable[[str, int, str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """`folder(kind, seed, dtype)`: a checkpoint for that kind of port, made once."""
    made: dict[tuple[str, int, str], Path] = {}

    def make(kind: str, seed: int, dtype: str) -> Path:
        tiny: Tiny = (mistral if kind == "ringed" else qwen3)(num_hidden_layers=2)
        key = tiny.family, seed, dtype
        if key not in made:
            made[key] = tmp_path_factory.mktemp("-".join(map(str, key)))
            save_tiny(tiny, made[key], DTYPES[dtype], seed)
        return made[key]

    return make


def compared(kind: str, where: Path, dtype: str, plant: Any = None, probe: Any = None) -> Result:
    """On the default probe where a port keeps a cache: it fills it in every way."""
    if probe is None:
        probe = "quick" if kind in {"plain", "without float64"} else "default"
    made, pairs = KINDS[kind]
    model = strangers.load(made, where, DTYPES[dtype])
    if plant is not None:
        plant(model)
    return portkit.parity.compare(model, where, sites=pairs, probe=probe)


def check_right(result: Result, kind: str) -> None:
    """Nobody is accused; what the port shows is compared, all of it."""
    (found,) = result.comparisons
    assert found.culprits == ()
    assert found.causes == {}
    assert found.verdict in {Verdict.exact, Verdict.rounding}
    assert len(found.judgements) == (83 if kind == "ringed" else 95)
    names = [one.name for one in result.not_verified]
    assert not [one for one in names if "not compared" in one or "_norm" in one], names
    assert ("the port: the same function" in names) == (kind == "without float64")


@pytest.mark.parametrize(
    ("kind", "dtype"), [*zip(KINDS, [*DTYPES, *DTYPES, "float32"], strict=True)]
)
def test_a_right_port_is_not_accused(kind: str, dtype: str, folder: Maker) -> None:
    check_right(compared(kind, folder(kind, 0, dtype), dtype), kind)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nor_on_other_weights(kind: str, dtype: str, seed: int, folder: Maker) -> None:
    check_right(compared(kind, folder(kind, seed, dtype), dtype), kind)


def test_a_model_of_transformers_needs_no_adapter_and_no_table(folder: Maker) -> None:
    """The reference's own class, given as a port: exact; and with a fault, placed."""
    from transformers import AutoModelForCausalLM

    where = folder("hugging", 0, "bfloat16")
    model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16)
    result = portkit.parity.compare(model, where, probe="quick", gate="exact")
    assert (result.verdict, len(result.comparisons[0].judgements)) == (Verdict.exact, 112)
    model.model.layers[1].self_attn.k_norm.weight.data[7] *= 1.1
    result = portkit.parity.compare(model, where, probe="quick")
    first, norm = result.first, "model.layers.1.self_attn.k_norm"
    assert first is not None
    assert norm in [one.site for one in result.culprits]
    assert (first.site, first.kind) == (f"{norm}.weight (parameter)", "function")


def test_as_many_heads_as_tokens_are_no_other_order(folder: Maker) -> None:
    """Six heads of six tokens have the size of six tokens of six heads."""
    where, tokens = folder("hugging", 0, "bfloat16"), [5, 6, 7, 8, 9, 10]
    result = compared("hugging", where, "bfloat16", probe=tokens)
    check_right(result, "hugging")


class HookPoint(nn.Module):
    """Gives what it is given, as in a well-known library."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Hooked(nn.Module):
    """A feed-forward with a point behind it; gate and up in one matrix, dead rows between them."""

    def __init__(self, ff: Any, point: nn.Module) -> None:
        super().__init__()
        dead = torch.ones_like(ff.fc1.weight[:7])
        self.both = nn.Linear(1, 1, bias=False)
        self.both.weight = nn.Parameter(torch.cat((ff.fc1.weight, dead, ff.fc2.weight)))
        self.fc3, self.out = ff.fc3, point
        self.width = len(ff.fc1.weight)

    def forward(self, x: Tensor) -> Tensor:
        gate, _, up = self.both(x).split((self.width, 7, self.width), -1)
        out: Tensor = self.out(self.fc3(nn.functional.silu(gate) * up))
        return out


@pytest.mark.parametrize(
    ("point", "words", "verdict"),
    [
        (HookPoint, "[output]", Verdict.exact),
        (nn.Identity, "", Verdict.exact),
        (HookPoint, "", Verdict.diverged),
    ],
)
def test_a_point_is_paired_by_output_and_a_part_left_out(
    point: type[nn.Module], words: str, verdict: Verdict, folder: Maker
) -> None:
    where = folder("plain", 0, "bfloat16")
    model = strangers.load(strangers.Plain, where, torch.bfloat16)
    for block in model.blocks:
        block.ff = Hooked(block.ff, point())
    lines = [line for line in PAIRS.splitlines() if ".ff" not in line]
    lines += [
        f"blocks.{{layer}}.ff.out = model.layers.{{layer}}.mlp {words}",
        "blocks.{layer}.ff.both = model.layers.{layer}.mlp.{p=gate|_|up}_proj",
        "blocks.{layer}.ff.fc3 = model.layers.{layer}.mlp.down_proj",
    ]
    result = portkit.parity.compare(model, where, sites="\n".join(lines), probe="quick")
    assert result.verdict is verdict
    (found,) = result.comparisons
    assert {f"model.layers.1.mlp{one}" for one in ("", ".gate_proj", ".up_proj")} <= {
        *found.accounts
    }
    assert ("model.layers.0.mlp:in" in found.accounts) == (verdict is Verdict.diverged)


def test_brackets_reach_inputs_and_a_second_time_is_another_site(folder: Maker) -> None:
    """Norms as the table says; a head that is recorded twice, and a module that runs twice."""
    where = folder("plain", 0, "bfloat16")
    model = strangers.load(strangers.Plain, where, torch.bfloat16)
    run, att = model.run, model.blocks[0].att

    def recorded(*given: Any) -> Tensor:
        logits = run(*given)
        return record("lm_head", record("lm_head", logits)) * 1  # of which the second is another

    model.run = recorded
    att.q_norm.register_forward_hook(lambda norm, given, _: norm.forward(given[0]))
    once = model.final_norm.forward
    model.final_norm.forward = lambda x: (once(x), model.blocks[0].norm1(x * 0))[0]
    lines = [line for line in PAIRS.splitlines() if "out_head" not in line and "q_norm" not in line]
    lines.append(
        "blocks.{layer}.att.q_norm = model.layers.{layer}.self_attn.q_norm "
        "[batch head position channel]"
    )
    result = portkit.parity.compare(model, where, sites="\n".join(lines), probe="quick")
    assert result.verdict is Verdict.exact, str(result)
    assert "model.layers.1.self_attn.q_norm:in" in result.comparisons[0].accounts
    told = {one.name: one.reason for one in result.not_verified}
    assert told["lm_head@*"] == "the reference does not show it"
    assert told["model.layers.*: input_layernorm@*"] == "the reference does not show it"


def test_what_fits_in_no_way_is_not_compared_and_not_put_in_place(folder: Maker) -> None:
    where = folder("plain", 0, "bfloat16")
    model = strangers.load(strangers.Plain, where, torch.bfloat16)
    norm = model.blocks[0].att.q_norm
    right = norm.forward

    def cut(x: Tensor) -> Tensor:
        return record("model.layers.0.self_attn#query", right(x)[..., :-2])

    norm.forward = lambda x: (cut(x), right(x))[1]
    result = portkit.parity.compare(model, where, sites=PAIRS, probe="quick")
    assert result.verdict is Verdict.exact
    told = {one.name: one.reason for one in result.not_verified}
    assert told["model.layers.*.self_attn#query: not compared"] == (
        "the port has [2, 6, 12, 38] bfloat16 there, the reference [2, 6, 12, 40] bfloat16"
    )


def test_what_a_port_raises_behind_an_injection_is_told_as_that(folder: Maker) -> None:
    """It checks itself, and is wrong: the culprit is named, and the port not said to refuse."""
    where = folder("plain", 0, "bfloat16")
    model = strangers.load(strangers.Plain, where, torch.bfloat16)
    ff, block = model.blocks[0].ff, model.blocks[0]
    right = ff.forward
    ff.forward = lambda x: right(x) * 1.01

    def forward(x: Tensor, step: Any) -> Tensor:
        x = x + block.att(block.norm1(x), step)
        z = block.norm2(x)
        y = block.ff(z)
        if not torch.equal(y, ff.forward(z)):
            raise ValueError("inconsistent")
        return x + y

    block.forward = forward
    result = portkit.parity.compare(model, where, sites=PAIRS, probe="quick")
    assert [one.site for one in result.culprits] == ["model.layers.0.mlp"]
    told = {one.name: one.reason for one in result.not_verified}
    assert told["pass prompt"].startswith(
        "by itself the port runs it; the reference's model.layers.0.mlp was put in place, and it "
        f"raised ValueError: inconsistent ({__file__}, line "
    )


# -- with a fault each -----------------------------------------------------------------------------


def _epsilon(model: Any) -> None:
    model.blocks[1].att.q_norm.eps = 1.0001e-6


def _too_large(model: Any) -> None:
    model.blocks[1].att.W_key.weight.data *= 1.5


def _padding_seen(model: Any) -> None:
    visible = model.visible
    model.visible = lambda past, new, _: visible(past, new, None)


def _slot_before(model: Any) -> None:
    att = model.blocks[1].att
    remember = att.remember

    def late(step: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if step.memory == 0:
            return remember(step, k, v)  # type: ignore[no-any-return]
        step = strangers.Step(step.cos, step.sin, step.mask, step.memory - 1)
        keys, values = remember(step, k, v)
        return torch.cat((keys, k[:, :, -1:]), 2), torch.cat((values, v[:, :, -1:]), 2)

    att.remember = late


def _ring_a_slot_off(model: Any) -> None:
    write = strangers.Ring.write

    def off(ring: Any, i: int, k: Tensor, v: Tensor) -> None:
        if i == 1 and ring.num_tokens >= ring.size:
            k = torch.cat((k[:, :, 1:], k[:, :, :1]), 2) * 1.02
        write(ring, i, k, v)

    att = model.blocks[1].att
    remember = att.remember

    def planted(step: Any, k: Tensor, v: Tensor) -> Any:
        step.memory.write = lambda *given: off(step.memory, *given)
        return remember(step, k, v)

    att.remember = planted


FAULTS = {
    "plain": (_epsilon, "model.layers.1.self_attn.q_norm", "function"),
    "without float64": (_too_large, "model.layers.1.self_attn.k_proj", "function"),
    "hugging": (_padding_seen, "model.layers.0.self_attn#context", None),
    "buffered": (_slot_before, "model.layers.1.self_attn#key", "glue"),
    "ringed": (_ring_a_slot_off, "model.layers.1.self_attn#key", "glue"),
}
SHORTER: dict[str, Any] = {"buffered": "quick", "ringed": [3 + 7 * i for i in range(30)]}
"""Probes that are enough to show it."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_in_it_is_placed(kind: str, folder: Maker) -> None:
    plant, site, what = FAULTS[kind]
    result = compared(kind, folder(kind, 0, "bfloat16"), "bfloat16", plant, SHORTER.get(kind))
    assert result.verdict is Verdict.diverged
    first = result.culprits[0]
    assert first.site == site
    assert what in (None, first.kind)
    if kind == "without float64":
        assert "care with which" not in str(result)
        assert "it is too far off for a lack of care" in str(result)
