"""Fields of a config are moved: what a probe shows of it, and what is said of what it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from architectures.gemma3 import Gemma3, Gemma3Config
from architectures.qwen3 import Qwen3Config
from parity_tests.checkpoints import TINY
from parity_tests.conftest import CheckpointMaker
from portkit.cli import app
from portkit.loading import draw, load, materialize, open_checkpoint
from portkit.nn.norms import UnitOffsetRMSNorm
from portkit.nn.rope import RopeParameters
from portkit.parity.judging.local import Trace, recorder
from portkit.parity.probes.probe import Probe
from portkit.parity.probes.probing import default_probe, quick_probe
from portkit.parity.prove import prove
from portkit.parity.question import Question
from portkit.parity.reference import load_reference
from portkit.parity.sides.port import PortSide
from portkit.parity.sides.sites import LOGITS, watching
from portkit.parity.subject.discovery import sites_of
from portkit.parity.teeth.moving import ConfigMoves
from portkit.parity.teeth.neighbours import Move, Neighbour, moves
from portkit.parity.teeth.sensitivity import LOADING, UNREAD, Sensitivity, over_dtypes

ONE_EACH = [
    "llama tied with biases",
    "qwen3 yarn sliding",
    "qwen3 moe sliding",
    "llama4 scout",
    "gemma3 shallow",
    "gemma3n plain",
    "smollm3 sliding",
    "qwen2 yarn sliding",
    "cohere2 with biases",
]
DECIDES_NOTHING = {"pad_token_id", "max_position_embeddings"}
"""Gradients alone; and how far the model may be asked."""
NOTHING_HERE = {
    "qwen3 moe": {"intermediate_size"},  # of dense layers, and there are none
    "llama4 scout": {"intermediate_size_mlp"},
    "llama4 crowded": {"attn_scale", "floor_scale"},  # of a temperature that is off
}
Chooser = Callable[..., Probe]


@dataclass
class Moved:
    """What became of each field, and what the moves ran."""

    fields: dict[str, Sensitivity]
    num_products: int = 0
    """Calls of a linear map."""
    num_products_of_probe: int = 0
    """The same of the port when it runs the probe."""


def moved(
    folder: Path, dtype: torch.dtype, choose: Chooser = default_probe, kernel: str = "sdpa"
) -> Moved:
    word = str(dtype).removeprefix("torch.")
    blueprint = draw(open_checkpoint(folder))
    model = materialize(blueprint, word, "cpu").model
    reference = load_reference(folder, dtype, kernel)
    table, probe = sites_of(model), choose(model)
    caches, linear, counts, place = (dict[str, Any](), dict[str, Any]()), F.linear, [0, 0], 0

    def counted(*given: Any) -> Tensor:
        counts[place] += 1
        return linear(*given)

    fields, port = ConfigMoves(blueprint, model, table, probe), PortSide(model, probe.longest)
    for one in probe:
        trace: Trace = {}
        with torch.no_grad(), watching(reference, table, recorder(trace)):
            trace[LOGITS] = reference.run(one, caches[0])
        kept = {name: tensor.clone() for name, tensor in trace.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "linear", counted)
            place = 0
            fields.see(one, trace)
            place = 1
            port.run(one, caches[1])
        assert all(torch.equal(trace[name], kept[name]) for name in kept)
    found = fields.found()
    assert len({one.field for one in found}) == len(found)
    return Moved({one.field: one for one in found}, *counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [*ONE_EACH, *(pytest.param(x, marks=pytest.mark.slow) for x in TINY if x not in ONE_EACH)],
)
def test_the_default_probe_sees_every_field_that_a_forward_pass_depends_on(
    name: str, dtype: torch.dtype, tiny_checkpoint: CheckpointMaker
) -> None:
    found = moved(tiny_checkpoint(name, dtype), dtype)
    fields = found.fields
    assert {one.field: one.by for one in fields.values() if one.seen is False} == {}
    idle = {one.field for one in fields.values() if one.seen is None}
    assert idle == DECIDES_NOTHING | NOTHING_HERE.get(name, set())
    assert all(fields[one].by == UNREAD for one in idle)
    held = {one.field for one in fields.values() if one.by.startswith(LOADING)}
    assert held >= {"vocab_size", "hidden_size", "num_hidden_layers", "head_dim"}
    assert not any(one.startswith("rope_parameters") or "eps" in one for one in held)
    assert fields[next(one for one in fields if one.endswith("norm_eps"))].seen
    # What is built alike is not run: all moves together cost less than the probe does once.
    assert found.num_products < found.num_products_of_probe * 2 / 3


def test_where_a_field_is_seen_first(tiny_checkpoint: CheckpointMaker) -> None:
    folder = tiny_checkpoint("gemma3 shallow", torch.bfloat16)
    found = {
        one.field: (one.by, one.moved) for one in moved(folder, torch.bfloat16).fields.values()
    }
    layer = "model.layers.0.self_attn"
    assert {name: found[name] for name in (
        "query_pre_attn_scalar", "sliding_window", "layer_types", "final_logit_softcapping",
        "tie_word_embeddings", "rope_parameters.full_attention.rope_theta", "head_dim",
    )} == {
        "query_pre_attn_scalar": (f"{layer}#context, bfloat16, in short", "48.0 read as 48.75"),
        "sliding_window": (f"{layer}#mask, bfloat16, in long", "24 read as 25"),
        "layer_types": (
            "model.layers.1:in.cos, bfloat16, in short",
            "'sliding_attention' of layer 1 read as 'full_attention'",
        ),
        "final_logit_softcapping": ("#logits, bfloat16, in short", "None read as 1.0"),
        "tie_word_embeddings": (
            f"{LOADING}: 1 missing: lm_head.weight", "True read as False"
        ),
        "rope_parameters.full_attention.rope_theta": (
            "model#cos.full_attention, bfloat16, in short", "1000000.0 read as 1015625.0"
        ),
        "head_dim": (
            f"{LOADING}: {layer}.q_proj.weight would be [164, 320], not [160, 320]",
            "40 read as 41",
        ),
    }  # fmt: skip


def test_bits_that_hide_an_epsilon_are_asked_in_float64(tiny_checkpoint: CheckpointMaker) -> None:
    """Of a norm whose input is large no bit moves in bfloat16."""
    folder = tiny_checkpoint("qwen3 yarn tempered", torch.bfloat16)
    blueprint = draw(open_checkpoint(folder))
    model = materialize(blueprint, "bfloat16", "cpu").model
    table, probe = sites_of(model), quick_probe(model)
    found = ConfigMoves(blueprint, model, table, probe)
    one = next(iter(probe))
    (twin,) = (each for each in found._open if each.move.field == "rms_norm_eps")
    site = "model.norm"
    assert site in twin.plain
    x = torch.randn(2, one.num_tokens, 320, dtype=torch.bfloat16) * 100
    ours, theirs = twin.plain[site], found._plain.get_submodule(site)
    assert torch.equal(ours(x), theirs(x))
    by = found._asked_in_float64(twin, one, {f"{site}:in": x})
    assert by == "model.norm, float64,"


def test_twelve_tokens_do_not_see_the_window(tiny_checkpoint: CheckpointMaker) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        folder = tiny_checkpoint("gemma3 shallow", dtype)
        found = moved(folder, dtype, quick_probe).fields
        unseen = {one.field: one.by for one in found.values() if one.seen is False}
        assert unseen == {
            "sliding_window": "nothing shows 24 read as 25: the quick probe has no prompt of more "
            "than 24 tokens, no step of one token after 24 others, as the default one has"
        }
    # The pattern of a model whose layers share one rotary table shows in masks alone.
    found = moved(tiny_checkpoint("qwen3 yarn sliding"), torch.float32, quick_probe).fields
    unseen = {one.field: one.by for one in found.values() if one.seen is False}
    assert unseen == {
        "windows": "nothing shows None of layer 0 read as 24: the quick probe has no prompt of "
        "more than 24 tokens, no step of one token after 24 others, as the default one has"
    }


def test_rounding_of_another_kernel_is_no_move(tiny_checkpoint: CheckpointMaker) -> None:
    """Where port and reference differ anyway, the port's own values are what a twin is held to."""
    folder = tiny_checkpoint("gemma3 shallow", torch.bfloat16)
    found = moved(folder, torch.bfloat16, quick_probe, kernel="eager").fields
    assert found["sliding_window"].seen is False
    assert (
        found["query_pre_attn_scalar"].by == "model.layers.0.self_attn#context, bfloat16, in prompt"
    )


def test_a_model_that_ignores_fields_is_found_out(
    tiny_checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said comes of the model that runs, and not of the fields' names."""
    folder = tiny_checkpoint("gemma3 shallow", torch.bfloat16)
    forward = UnitOffsetRMSNorm.forward

    def fixed(self: UnitOffsetRMSNorm, hidden_states: Tensor) -> Tensor:
        eps, self.eps = self.eps, 1e-6
        try:
            return forward(self, hidden_states)
        finally:
            self.eps = eps

    monkeypatch.setattr(UnitOffsetRMSNorm, "forward", fixed)
    monkeypatch.setattr(Gemma3, "logits", lambda self, hidden: self.lm_head(hidden))
    found = moved(folder, torch.bfloat16).fields
    assert found["rms_norm_eps"].seen is False
    assert found["rms_norm_eps"].by == "nothing shows 1e-06 read as 1.015625e-06"
    assert found["final_logit_softcapping"].seen is None
    assert found["sliding_window"].seen is True
    question = Question(folder, choose_probe=lambda traits, _: quick_probe(traits))
    named = {one.name: one for one in prove(question).not_verified}
    assert named["config: rms_norm_eps"].reason.startswith(found["rms_norm_eps"].by)
    assert "config: final_logit_softcapping" not in named


def test_a_port_that_cannot_be_moved_is_not_seen_and_says_so(
    tiny_checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, build = tiny_checkpoint("gemma3 shallow", torch.bfloat16), Gemma3.__init__

    def checked(self: Gemma3, config: Any, kernel: str = "sdpa") -> None:
        if not isinstance(config, Gemma3Config):
            raise TypeError("no config of ours")
        build(self, config, kernel)

    monkeypatch.setattr(Gemma3, "__init__", checked)
    fields = moved(folder, torch.bfloat16, quick_probe).fields
    assert {one.seen for one in fields.values()} == {False}
    assert {one.by for one in fields.values()} == {"it could not be moved: no config of ours"}


def test_reports_name_a_field_that_is_not_seen(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    folder = str(tiny_checkpoint("gemma3 shallow", torch.bfloat16))
    done = CliRunner().invoke(app, ["parity", folder, "--quick", "--out", str(tmp_path)])
    said = "nothing shows 24 read as 25: the quick probe has no prompt of more than 24 tokens"
    assert f"not verified: config: sliding_window ({said}" in done.stdout
    assert "and sees 17 of 18 fields of the config" in done.stdout
    printed = json.loads((tmp_path / "parity.json").read_text())
    told = {one["name"]: one["reason"] for one in printed["not_verified"]}
    assert told["config: sliding_window"].startswith(said)
    assert [one for one in told if one.startswith("config:")] == ["config: sliding_window"]
    (field,) = (one for one in printed["faults"]["config"] if one["field"] == "sliding_window")
    assert (field["seen"], field["moved"]) == (False, "24 read as 25")
    page, markdown = ((tmp_path / x).read_text() for x in ("report.html", "summary.md"))
    assert "config: sliding_window" in page
    assert said in page
    assert r"config: sliding\_window" in markdown
    assert "config: sliding_window" in (tmp_path / "junit.xml").read_text()


def test_layers_that_are_left_out_say_so(tiny_checkpoint: CheckpointMaker) -> None:
    """Held to some layers, a proof does not see what only the head shows."""
    folder = tiny_checkpoint("gemma3 shallow", torch.bfloat16)
    choose = lambda traits, _: quick_probe(traits)  # noqa: E731
    result = prove(Question(folder, layers=range(1), choose_probe=choose))
    named = {one.name: one.reason for one in result.not_verified if "config" in one.name}
    of_full_layers = "config: rope_parameters.full_attention"
    assert set(named) == {
        "config: sliding_window", "config: layer_types", "config: final_logit_softcapping",
        f"{of_full_layers}.rope_type", f"{of_full_layers}.rope_theta",
    }  # fmt: skip
    assert named["config: final_logit_softcapping"] == "nothing shows None read as 1.0"


@dataclass(frozen=True)
class Strange:
    """A config with a value that no rule moves."""

    act: str = "silu"
    table: complex = 1j


def test_the_nearest_values() -> None:
    rope = RopeParameters(rope_type="linear", rope_theta=1e4, factor=4.0)
    config = Qwen3Config(
        vocab_size=7, pad_token_id=None, hidden_size=8, intermediate_size=8, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=64,
        rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=False, rope_parameters=rope,
        windows=(None, 8, 8),
    )  # fmt: skip
    found: dict[str, list[list[Any]]] = {}
    for move in moves(config, {}):
        found.setdefault(move.field, []).append([one.becomes for one in move.neighbours])
        assert all(one.config != config for one in move.neighbours)
    assert found["pad_token_id"] == [[2]]
    assert found["head_dim"] == [[5, 3, 8, 2]]
    assert found["rms_norm_eps"] == [[1e-6 * 65 / 64, 1e-6 * 64 / 65, 2e-6, 5e-7]]
    assert found["tie_word_embeddings"] == [[False]]
    assert found["rope_parameters.rope_type"] == [["default"]]
    assert found["rope_parameters.factor"] == [[4.0625, 4.0 * 64 / 65, 8.0, 2.0]]
    assert "rope_parameters.beta_fast" not in found
    assert found["windows"] == [
        [(8, 8, None)],
        [(None, 9, 9), (None, 7, 7), (None, 16, 16), (None, 4, 4)],
    ]
    everywhere = replace(config, windows=(None, None, None))
    (alone,) = (one for one in moves(everywhere, {}) if one.field == "windows")
    assert [one.becomes for one in alone.neighbours] == [(2, None, None)]
    (said,) = (one.said for one in alone.neighbours)
    assert said == "None of layer 0 read as 2"
    assert list(moves(Strange(), {"act": ("relu", "silu")})) == [
        Move("act", (Neighbour(Strange(act="relu"), "silu", "relu"),)),
        Move("table", ()),
    ]


def test_a_dtype_that_shows_a_field_settles_it() -> None:
    blind, sees = Sensitivity("x", False, "nothing shows it"), Sensitivity("x", True, "#logits")
    idle = Sensitivity("y", None, UNREAD)
    assert over_dtypes([(blind, idle), (sees,)]) == (sees, idle)
    assert over_dtypes([(blind, idle), (blind,)]) == (blind, idle)


def test_a_twin_holds_the_ports_own_tensors(tiny_checkpoint: CheckpointMaker) -> None:
    folder = tiny_checkpoint("llama plain heads", torch.float32)
    blueprint, model = draw(open_checkpoint(folder)), load(folder).model
    table = sites_of(model)
    found = ConfigMoves(blueprint, model, table, quick_probe(model))
    held = {one.data_ptr() for one in model.parameters()}
    assert len(found._open) >= 4
    for twin in found._open:
        assert {one.data_ptr() for one in twin.model.parameters()} <= held
