"""Causes: what the harness says of ports whose mistakes are known, and of right ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from parity_tests.conftest import CheckpointMaker
from parity_tests.faults.judging import Judging, checkpoints_in
from parity_tests.faults.planted import PLANTINGS
from parity_tests.faults.stages import Stage
from portkit.cli import app
from portkit.loading import load, materialize
from portkit.parity.comparing import compare
from portkit.parity.faults.catalogue import NAMED
from portkit.parity.probes.probing import quick_probe
from portkit.parity.reference import load_reference
from portkit.parity.reports import schema, summary
from portkit.parity.result import Comparison, ParityResult
from portkit.parity.sides import making
from portkit.parity.sides.port import PortSide
from portkit.parity.subject.discovery import sites_of
from portkit.parity.teeth.diagnose import Cause
from portkit.parity.teeth.kill import kill_matrix

NAMED_FIRST = [
    ("norm.epsilon", "llama", "bfloat16"),
    ("norm.epsilon (by a ten-thousandth)", "llama", "bfloat16"),
    ("loader.k_v_swapped", "qwen3", "float32"),
    ("rope.llama3_factor", "llama square", "float32"),
    ("attention.q_norm_missing", "qwen3", "bfloat16"),
    ("attention.scale_of_head_dim", "gemma3", "bfloat16"),
    ("mlp.gelu_exact", "gemma3", "bfloat16"),
    ("cache.stale_after_chunk", "gemma3", "bfloat16"),
    ("residual.missing (of the feed-forward)", "qwen3", "bfloat16"),
]
BY_NAME = {one.name: one for one in PLANTINGS}


@pytest.fixture(scope="module")
def judging(tmp_path_factory: pytest.TempPathFactory) -> Judging:
    torch.set_num_threads(1)
    return Judging(checkpoints_in(Path(tmp_path_factory.mktemp("diagnosed"))))


def diagnosed(judging: Judging, name: str, checkpoint: str, dtype: str) -> Comparison:
    family = checkpoint.partition(" ")[0]
    return judging.judge(Stage(BY_NAME[name], family, checkpoint, dtype)).comparison


@pytest.mark.parametrize(("name", "checkpoint", "dtype"), NAMED_FIRST)
def test_the_cause_is_named(name: str, checkpoint: str, dtype: str, judging: Judging) -> None:
    found = diagnosed(judging, name, checkpoint, dtype)
    cause = found.causes[found.culprits[0].site]
    assert [one.id for one in cause.faults] == [BY_NAME[name].fault]
    assert cause.explains > 0.99
    assert set(found.causes) == {one.site for one in found.culprits}


@pytest.mark.parametrize("name", ["qwen3 moe", "llama4 scout", "cohere2", "gemma3n plain"])
def test_families_of_other_shapes_have_their_faults_caught_and_named(
    name: str, tiny_checkpoint: CheckpointMaker
) -> None:
    loaded = load(tiny_checkpoint(name, torch.bfloat16))
    reference = load_reference(loaded.files.origin, torch.bfloat16)
    table, probe = sites_of(loaded.model), quick_probe(loaded.model)
    fates = kill_matrix(reference, table, probe).fates()
    assert sum(one.killed for one in fates) >= 45
    assert all((one.survived or "beyond").startswith("beyond") for one in fates)
    loaded.model.get_submodule("model.layers.1.input_layernorm").eps = 1e-3
    found = compare(PortSide(loaded.model, probe.longest), reference, table, probe)
    assert {k: v.name for k, v in found.causes.items()} == {
        "model.layers.1.input_layernorm": "norm.epsilon"
    }


def test_a_right_port_has_no_cause(judging: Judging) -> None:
    for checkpoint, dtype in (("gemma3", "bfloat16"), ("llama", "float32")):
        assert judging.clean(checkpoint, dtype, "sdpa").causes == {}


def test_rounding_has_a_cause_only_where_a_fault_gives_its_very_bits(judging: Judging) -> None:
    found = diagnosed(judging, "norm.weight_before_cast", "llama", "bfloat16")
    assert found.verdict == "rounding"
    assert {one.name for one in found.causes.values()} == {"norm.weight_before_cast"}
    loaded = judging.load("llama", "bfloat16", "eager")
    found = held(judging, loaded, "llama", "bfloat16")  # against the reference's fused kernel
    assert found.verdict == "rounding"
    assert found.causes == {}


def test_reports_name_the_cause_of_rounding(
    judging: Judging, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An upcast too many fails the exact gate, and is told of as what diverged would be."""

    def planted(*arguments: Any, **options: Any) -> Any:
        loaded = materialize(*arguments, **options)
        norm = loaded.model.get_submodule("model.layers.1.input_layernorm")

        def forward(x: Tensor) -> Tensor:
            wide = x.float()
            normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
            return (norm.weight.float() * normed).to(x.dtype)

        norm.forward = forward
        return loaded

    monkeypatch.setattr(making, "materialize", planted)
    folder = str(judging.folder("llama", "bfloat16"))
    command = ["parity", folder, "--quick", "--faults", "off", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    site = "model.layers.1.input_layernorm"
    says = "your port multiplies the weight in float32 and casts last"
    assert f"rounding in bfloat16, first at {site}\n  {says}" in done.stdout
    assert "norm.weight_before_cast explains 100 % of the difference" in done.stdout
    printed = json.loads((tmp_path / "parity.json").read_text())
    (told,) = printed["rounded"]
    assert (told["site"], told["cause"]["fault"]) == (site, "norm.weight_before_cast")
    assert printed["culprits"] == []
    assert says in (tmp_path / "junit.xml").read_text()
    assert says in (tmp_path / "summary.md").read_text()
    assert CliRunner().invoke(app, [*command, "--gate", "rounding"]).exit_code == 0


def test_two_mistakes_at_one_site_are_both_named(judging: Judging) -> None:
    """An epsilon of 1e-3 in a norm without its offset: either alone leaves most of it."""
    loaded = judging.load("gemma3", "float32", "sdpa")
    norm = loaded.model.get_submodule("model.layers.1.input_layernorm")

    def forward(x: Tensor) -> Tensor:
        power = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(power + 1e-3) * norm.weight  # type: ignore[operator]

    norm.forward = forward
    found = held(judging, loaded, "gemma3", "float32")
    cause = found.causes["model.layers.1.input_layernorm"]
    assert {one.id for one in cause.faults} == {"norm.epsilon", "norm.offset_missing"}
    assert cause.explains > 0.99


def held(judging: Judging, loaded: object, checkpoint: str, dtype: str) -> Comparison:
    from parity_tests.faults.judging import hold_against

    reference = judging.reference(checkpoint, dtype, "sdpa")
    return hold_against(reference, loaded, quick_probe(loaded.model))  # type: ignore[attr-defined, arg-type]


def test_what_nothing_explains_is_described(judging: Judging) -> None:
    loaded = judging.load("llama", "float32", "sdpa")
    norm = loaded.model.get_submodule("model.layers.1.input_layernorm")
    own = norm.forward
    norm.forward = lambda x: own(x) * 1.25
    found = held(judging, loaded, "llama", "float32")
    cause = found.causes["model.layers.1.input_layernorm"]
    assert (cause.name, cause.explains) == ("unexplained", 0.0)
    assert "the reference's values times 1.25" in cause.tendencies
    assert cause.sentence.startswith("unexplained by any known fault")

    def swapped(x: Tensor) -> Tensor:
        made: Tensor = own(x).clone()
        made[..., [3, 7]] = made[..., [7, 3]]
        return made

    norm.forward = swapped
    cause = held(judging, loaded, "llama", "float32").causes["model.layers.1.input_layernorm"]
    assert "the reference's channels in another order" in cause.tendencies
    norm.forward = lambda x: own(x) + torch.nn.functional.one_hot(torch.tensor(17), x.shape[-1])
    cause = held(judging, loaded, "llama", "float32").causes["model.layers.1.input_layernorm"]
    assert "only in channel 17" in cause.tendencies


def test_a_cause_reads_as_a_sentence_and_stands_in_the_object(judging: Judging) -> None:
    found = diagnosed(judging, "norm.epsilon", "llama", "bfloat16")
    first = schema.as_fields(ParityResult((found,)))["first"]
    assert first["cause"]["fault"] == "norm.epsilon"
    assert first["cause"]["sentence"] == (
        f"your port {NAMED['norm.epsilon'].says}: {NAMED['norm.epsilon'].mend}"
    )
    lines = summary.details(ParityResult((found,)))
    assert lines[1] == f"  {first['cause']['sentence']}"
    assert lines[2].startswith("  norm.epsilon explains ")


def test_what_is_said_of_a_cause() -> None:
    one = NAMED["norm.missing"]
    assert Cause((one,), 1.0).sentence == "your port leaves this norm out: call it"
    assert summary.share(1.0) == "100 %"
    assert summary.share(1 - 1e-9) == "99.9999 %"
