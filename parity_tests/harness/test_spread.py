"""Which magnitudes an error has, and which tokens and values it is largest at, over all passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from parity_tests.conftest import CheckpointMaker
from parity_tests.faults.planted.planting import replace_forward
from portkit.loading import LoadedModel, load
from portkit.parity.comparing import compare
from portkit.parity.judging.ledger import SiteAccount
from portkit.parity.judging.spread import NUM_TOKENS, Spread, token_sums, worst_tokens
from portkit.parity.probes.probe import Pass, Probe
from portkit.parity.probes.probing import quick_probe
from portkit.parity.reference import load_reference
from portkit.parity.sides.port import PortSide
from portkit.parity.subject.discovery import sites_between


def test_values_are_counted_by_the_power_of_two_below_which_they_lie() -> None:
    spread = Spread()
    spread.add(torch.tensor([[1.0, -1.5, 2.0], [0.75, 0.0, -0.0]]))
    spread.add(torch.tensor([1e-300, math.inf, math.nan, 1e300], dtype=torch.float64))
    assert spread.counts == {-200: 1, 0: 1, 1: 2, 2: 1, 130: 1}
    assert (spread.num_zeros, spread.num_not_finite, len(spread)) == (2, 2, 10)


def test_blocks_add_up_and_a_share_has_a_bound() -> None:
    values = torch.randn(50, 30, dtype=torch.float64) * 1e-3
    whole, parts = Spread(), Spread()
    whole.add(values)
    for part in (values[:, :7], values[:, 7:20], values[:, 20:]):
        parts.add(part)
    assert parts.counts == whole.counts
    for share in (0.1, 0.5, 0.99, 1.0):
        bound = whole.bound(share)
        assert float((values.abs() < bound).double().mean()) >= share
        assert float((values.abs() < bound / 2).double().mean()) < share
    whole.add(torch.zeros(1500))
    assert whole.bound(0.5) == 0.0
    whole.add(torch.full((3000,), math.nan))
    assert whole.bound(0.9) == math.inf
    assert Spread().bound(0.5) == 0.0


def test_the_tokens_with_the_largest_error_of_all_passes_are_kept() -> None:
    """Padding left out, an older token without its id, errors relative to the token's own truth."""
    ids = torch.tensor([[11, 12, 13], [0, 22, 23]])
    padded = Pass("padded", ids, ids, torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]), "before")
    truth = torch.tensor([4.0, 4.0, 8.0, 4.0, 2.0, 0.0])[:, None].expand(6, 10).double()
    error = torch.tensor([0.1, 0.3, 0.1, 0.0, 0.4, 0.1])[:, None].expand(6, 10).double()
    sums = token_sums(error[:, :4], error[:, :4] / 2, truth[:, :4])
    sums += token_sums(error[:, 4:], error[:, 4:] / 2, truth[:, 4:])
    found = worst_tokens(
        (), padded, sums, padded.real_of_last(4)
    )  # a cached token and three new ones
    said = [(one.run, one.row, one.position, one.token_id) for one in found]
    # Row 0: the cached one, 11, 12, 13. Row 1: 22, 23, of which one's truth is zero.
    assert said == [
        ("padded", 1, 3, 23),
        ("padded", 1, 2, 22),
        ("padded", 0, 1, 11),
        ("padded", 0, 0, None),
    ]
    # Of a truth of zero the error itself counts.
    expected = [0.1 * math.sqrt(10), 0.2, 0.075, 0.025]
    assert [one.error for one in found] == pytest.approx(expected)
    assert [one.floor for one in found] == pytest.approx([each / 2 for each in expected])
    one = Pass("later", ids[:1], ids[:1])
    nan = torch.tensor([[math.nan, 0, 1e-6]]).T.double()
    later = worst_tokens(found, one, token_sums(nan, None, nan + 1), one.real)
    assert len(later) == NUM_TOKENS
    assert (later[0].run, later[0].token_id, later[0].error) == ("later", 11, math.inf)
    assert later[0].floor is None
    assert later[1:] == found[:3]


def account_of(loaded: LoadedModel, site: str, probe: Probe) -> SiteAccount:
    dtype = next(loaded.model.parameters()).dtype
    reference = load_reference(loaded.files.origin, dtype, "sdpa")
    table = sites_between(PortSide(loaded.model), reference)
    return compare(PortSide(loaded.model, probe.longest), reference, table, probe).accounts[site]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_token_is_told_with_its_id_and_its_channels(
    dtype: torch.dtype, tiny_checkpoint: CheckpointMaker
) -> None:
    loaded = load(tiny_checkpoint("gemma3 shallow", dtype))
    probe = quick_probe(loaded.model)
    (prompt, *_) = probe
    norm: Any = loaded.model.get_submodule("model.layers.1.self_attn.q_norm")

    def nudged(own: Any, x: Tensor) -> Tensor:
        given: Tensor = own(x).clone()
        if given.shape[2] == prompt.num_tokens:
            given[0, 3, 4] += 4.0
        return given

    replace_forward(norm, nudged)
    account = account_of(loaded, "model.layers.1.self_attn.q_norm", probe)
    assert account.inner == (4, 40)
    first, second, *_ = account.worst_tokens
    told = first.run, first.row, first.position, first.token_id
    assert told == (prompt.name, 0, 4, int(prompt.input_ids[0, 4]))
    assert first.floor is not None
    assert first.error > 100 * first.floor
    assert second.error == second.floor < first.error / 100
    far = sum(count for exponent, count in account.spread.counts.items() if exponent >= 2)
    assert far == 40
    assert len(account.spread) == len(account.floor_spread) == prompt.input_ids.numel() * 4 * 40
    assert max(account.floor_spread.counts) < 0
    assert sum(n for e, n in account.function_spread.counts.items() if e >= 2) == 40


def test_a_changed_scale_of_the_logits_is_told_though_they_have_no_truth(
    tiny_checkpoint: CheckpointMaker,
) -> None:
    loaded = load(tiny_checkpoint("gemma3 shallow"))
    own = loaded.model.logits
    loaded.model.logits = lambda hidden: own(hidden) * 2  # type: ignore[method-assign]
    probe = quick_probe(loaded.model)
    account = account_of(loaded, "#logits", probe)
    assert account.inner == (509,)
    assert len(account.worst_tokens) == NUM_TOKENS
    assert {one.error for one in account.worst_tokens} == {1.0}
    assert {one.floor for one in account.worst_tokens} == {None}
    assert len(account.spread) == sum(int(one.real_logits.sum()) * 509 for one in probe)


def test_a_changed_parameter_shows_its_values(tiny_checkpoint: CheckpointMaker) -> None:
    loaded = load(tiny_checkpoint("llama linear"))
    name = "model.layers.2.mlp.up_proj.weight"
    weight = loaded.model.get_parameter(name)
    with torch.no_grad():
        weight[3, 17] += 8.5
        weight[0, 5] = math.nan
    account = account_of(loaded, f"{name} (parameter)", quick_probe(loaded.model))
    (record,) = account.unequal
    assert (record.num_unequal, record.max_difference) == (2, math.inf)
    assert [(one.row, one.position, one.place) for one in record.worst] == [
        (None, None, "[0, 5]"),
        (None, None, "[3, 17]"),
    ]
    assert record.worst[1].port - record.worst[1].reference == pytest.approx(8.5, abs=1e-6)
    assert (account.spread.counts, account.spread.num_not_finite) == ({4: 1}, 1)
