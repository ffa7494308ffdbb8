"""The weight map: templates, rules that move values both ways, plans that leave nothing over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from portkit.errors import Mismatch
from portkit.weights import Copy, Drop, Fuse, Plan, Slice, Stack, Template, Tie, WeightMap

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("template", "name", "bindings"),
    [
        ("model.norm.weight", "model.norm.weight", {}),
        ("layers.{layer}.w", "layers.10.w", {"layer": "10"}),
        ("layers.{layer}.w", "layers.010.w", None),
        ("layers.{layer}.w", "layers.x.w", None),
        ("layers.{layer}.w", "layers.1.2.w", None),
        ("layers.{layer}.w", "layers.1xw", None),
        ("layers.{layer}.w", "xlayers.1.w", None),
        ("{p=q|k}_proj", "q_proj", {"p": "q"}),
        ("{p=q|k}_proj", "v_proj", None),
        ("{p=a.b|c}.w", "a.b.w", {"p": "a.b"}),
        ("{p=a.b|c}.w", "axb.w", None),
        ("vision.{*}", "vision.a.0.b", {}),
        ("vision.{*}", "vision.", None),
    ],
)
def test_a_template_matches_no_more_than_it_says(
    template: str, name: str, bindings: dict[str, str] | None
) -> None:
    found = Template(template).match(name)
    assert found == bindings
    if found is not None and "*" not in template:
        assert Template(template).fill(found) == name


@pytest.mark.parametrize("text", ["a.{", "a.}", "a.{B}", "{a}.{a}", "{*}.a", "{a=}", "{}"])
def test_a_template_that_makes_no_sense_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="template") as caught:
        Template(text)
    assert repr(text) in str(caught.value)


class Tangled(nn.Module):
    """A fused, a stacked, a renamed and a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.empty(7, 3))
        self.experts = nn.Parameter(torch.empty(12, 2, 3))
        self.plain = nn.Parameter(torch.empty(5))
        self.head = nn.Parameter(torch.empty(4, 3))
        self.embed = self.head


RULES = WeightMap(
    (
        Fuse("qkv", ("attn.q", "attn.k", "attn.v")),
        Stack("experts", "experts.{expert}.w", over="expert"),
        Copy("plain", "renamed"),
        Copy("embed"),
        Copy("head"),
        Tie("head", to="embed"),
        Drop("tower.{*}", because="not ported"),
    ),
    prefixes=("outer.", "outer.inner."),
)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {
        "attn.q": torch.randn(4, 3),
        "attn.k": torch.randn(2, 3),
        "attn.v": torch.randn(1, 3),
        "renamed": torch.randn(5),
        "embed": torch.randn(4, 3),
        "tower.0.w": torch.randn(1),
    }
    # In the order that sorts wrongly: 0, 1, 10, 11, 2, …
    return found | {f"experts.{i}.w": torch.randn(2, 3) for i in sorted(range(12), key=str)}


def plan(on_disk: dict[str, torch.Tensor]) -> Plan:
    return RULES.plan(Tangled(), {name: tuple(t.shape) for name, t in on_disk.items()})


def assemble(on_disk: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        claim.parameter: claim.assemble(on_disk.__getitem__, torch.float32, CPU)
        for claim in plan(on_disk).claims
    }


def test_rules_move_values_and_can_be_undone() -> None:
    on_disk = tensors()
    found = assemble(on_disk)
    assert torch.equal(found["qkv"], torch.cat([on_disk[f"attn.{p}"] for p in "qkv"]))
    assert torch.equal(
        found["experts"], torch.stack([on_disk[f"experts.{i}.w"] for i in range(12)])
    )
    assert found["plain"].data_ptr() == on_disk["renamed"].data_ptr(), (
        "a copy where a view would do"
    )
    back: dict[str, torch.Tensor] = {}
    for claim in plan(on_disk).claims:
        back |= claim.split(found[claim.parameter])
    del on_disk["tower.0.w"]
    assert back.keys() == on_disk.keys()
    assert all(torch.equal(back[name], on_disk[name]) for name in back)


def test_every_tensor_is_accounted_for() -> None:
    found = plan(tensors())
    assert [drop.source for drop in found.dropped] == ["tower.0.w"]
    assert [(one.parameter, one.to, one.also_on_disk) for one in found.tied] == [
        ("head", "embed", None)
    ]
    assert {source for claim in found.claims for source in claim.sources} == (
        tensors().keys() - {"tower.0.w"}
    )


def test_either_half_of_a_tie_may_be_on_disk_and_both_are_noted() -> None:
    on_disk = tensors()
    on_disk["head"] = on_disk.pop("embed")
    assert torch.equal(assemble(on_disk)["embed"], on_disk["head"])
    on_disk["embed"] = on_disk["head"] + 1
    assert plan(on_disk).tied[0].also_on_disk == "head"
    assert torch.equal(assemble(on_disk)["embed"], on_disk["embed"])


def test_prefixes_are_spellings_of_one_name() -> None:
    prefixed = {f"outer.inner.{name}": tensor for name, tensor in tensors().items()}
    claims = {claim.parameter: claim for claim in plan(prefixed).claims}
    assert claims["plain"].sources == ("outer.inner.renamed",)
    assert claims["plain"].canonical == ("renamed",)
    with pytest.raises(Mismatch, match="two spellings"):
        plan({**prefixed, "renamed": torch.empty(5)})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("attn.k"), "1 missing: attn.k"),
        (lambda t: t.pop("experts.10.w"), "1 missing: experts.10.w"),
        (lambda t: t.update({"extra": torch.empty(1)}), "1 unexpected: extra"),
        (lambda t: t.update({"experts.12.w": torch.empty(2, 3)}), "1 unexpected: experts.12.w"),
        (lambda t: t.update({"renamed": torch.empty(6)}), "renamed is [6] where"),
        (lambda t: t.update({"attn.v": torch.empty(2, 3)}), "1 of another shape"),
        (lambda t: t.clear(), "17 missing"),
    ],
)
def test_leftovers_are_listed_by_name(damage: object, words: str) -> None:
    on_disk = tensors()
    damage(on_disk)  # type: ignore[operator]
    with pytest.raises(Mismatch) as caught:
        plan(on_disk)
    assert words in str(caught.value)


def test_a_stack_holds_several_parameters_and_they_are_written_one_by_one() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for part in ("a", "b"):
                matrices = [nn.Parameter(torch.empty(2, 3)) for _ in range(12)]
                setattr(self, part, nn.ParameterList(matrices))

    rules = WeightMap(
        (
            Copy("{part=a|b}.{expert}", "experts.{expert}.{part}"),
            Slice("a.{expert}", "stack", over="expert", block=0, blocks=2),
            Slice("b.{expert}", "stack", over="expert", block=1, blocks=2),
        )
    )
    stack = torch.randn(12, 4, 3)
    found = rules.plan(Apart(), {"model.stack": (12, 4, 3)})  # spelled once too often
    assert found.sources == ("model.stack",)
    back: dict[str, torch.Tensor] = {}
    for claim in found.claims:
        part, number = claim.parameter.split(".")
        value = claim.assemble({"model.stack": stack}.__getitem__, torch.float32, CPU)
        assert torch.equal(value, stack[int(number)][:2] if part == "a" else stack[int(number)][2:])
        assert value.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()
        back |= claim.split(value)
    assert back.keys() == {f"experts.{n}.{part}" for n in range(12) for part in "ab"}
    assert torch.equal(back["experts.10.b"], stack[10][2:])
    for shape in ((11, 4, 3), (13, 4, 3), (12, 5, 3), (12, 4)):
        with pytest.raises(Mismatch, match=r"stack is \[.*makes it \[12, 4, 3\]"):
            rules.plan(Apart(), {"stack": shape})
    with pytest.raises(Mismatch, match=r"24 missing: experts\.0\.a"):
        rules.plan(Apart(), {})


def test_two_rules_for_one_parameter_are_our_own_mistake() -> None:
    twice = WeightMap((*RULES.rules, Copy("plain")))
    with pytest.raises(AssertionError, match="claimed by 2 rules"):
        twice.plan(Tangled(), dict.fromkeys(tensors()))
