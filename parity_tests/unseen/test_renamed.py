"""The port that is right beforehand: equal in every bit, and without one name of the reference."""

from __future__ import annotations

import pytest
import torch
import transformers

from parity_tests.unseen.conftest import UnseenMaker
from parity_tests.unseen.families import UNSEEN, VOCABULARY, named_inputs
from parity_tests.unseen.renamed import rename, renamed

FAST = ("gpt2", "phi3", "deepseek_v2", "mamba", "falcon_h1")
CAUSAL = [name for name, unseen in UNSEEN.items() if not unseen.own_class]
NAMED = [name for name, unseen in UNSEEN.items() if unseen.own_class]


@pytest.mark.parametrize(
    "name", [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in CAUSAL]
)
@torch.no_grad()
def test_it_is_the_reference_under_other_names(name: str, unseen_checkpoint: UnseenMaker) -> None:
    folder, dtype = unseen_checkpoint(name), torch.bfloat16
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    port = renamed(folder, dtype, torch.device("cpu"))
    names = {one for one, _ in reference.named_modules() if one}
    assert not names & {one for one, _ in port.named_modules()}
    assert {line.split(" = ")[1] for line in port.sites.splitlines()} == names

    draw = torch.Generator().manual_seed(5)
    input_ids = torch.randint(4, VOCABULARY, (2, 31), generator=draw)
    mask = torch.ones_like(input_ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    due = reference(input_ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(port(input_ids, positions, mask)[0], due)
    _, cache = port(input_ids[:, :30], positions[:, :30], mask[:, :30])
    step, _ = port(input_ids[:, 30:], positions[:, 30:], mask, cache)
    torch.testing.assert_close(step[:, -1].float(), due[:, -1].float(), atol=0.1, rtol=0.0)


@pytest.mark.parametrize("name", NAMED)
@torch.no_grad()
def test_so_is_a_model_of_named_inputs(name: str, unseen_checkpoint: UnseenMaker) -> None:
    unseen, folder = UNSEEN[name], unseen_checkpoint(name)
    load = getattr(transformers, unseen.own_class).from_pretrained
    reference, port = (load(folder, dtype=torch.float32).eval() for _ in range(2))
    given = named_inputs(unseen, torch.float32)
    names = {one for one, _ in reference.named_modules() if one}
    table = rename(port)
    assert not names & {one for one, _ in port.named_modules() if one}
    assert {line.split(" = ")[1] for line in table.splitlines()} == names
    assert torch.equal(port(**given)[0], reference(**given)[0])
