"""The order of training: every token once an epoch, a function of (seed, step) and nothing else."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from portkit.errors import DataError
from portkit.training.order import Order
from portkit.training.tokens import Origin, TokenFile, TokenWriter

BLOCK = 16
EXPECTED = [[27, 28, 29, 30, 31], [679, 680, 681, 682, 683]]


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    """Documents of all lengths; each id occurs once, so that it tells where it stands."""
    origin = Origin(tokenizer_sha256="", source_sha256="", part="train", vocab_size=100_000)
    lengths = [(7 * number * number + 3) % 59 + 1 for number in range(50)]
    first = 0
    with TokenWriter(tmp_path / "t.tokens", origin) as writer:
        for length in lengths:
            writer.add(range(first, first + length), 1)
            first += length
        writer.finish()
    return TokenFile(tmp_path / "t.tokens")


def test_every_token_is_predicted_once_an_epoch(tokens: TokenFile) -> None:
    order = Order(tokens, BLOCK, seed=3)
    count = order.blocks_per_epoch
    spare = count * BLOCK - tokens.num_tokens
    assert 0 < spare < BLOCK
    for epoch in range(3):
        blocks = order.blocks(epoch * count, count)
        targets = Counter(blocks[:, 1:].flatten().tolist())
        assert set(targets) == set(range(tokens.num_tokens))
        assert sum(times - 1 for times in targets.values()) == spare


def test_documents_stay_whole_within_a_block(tokens: TokenFile) -> None:
    """What follows a token is the next of its document, or the first of another."""
    begins = set(tokens.starts[:-1].tolist())
    ends = {end - 1 for end in tokens.starts[1:].tolist()}
    for block in Order(tokens, BLOCK, seed=3).blocks(0, 60).tolist():
        for one, following in itertools.pairwise(block):
            assert following == one + 1 or (one in ends and following in begins)


def test_epochs_and_seeds_differ_in_order_and_in_cuts(tokens: TokenFile) -> None:
    order = Order(tokens, BLOCK, seed=3)
    count = order.blocks_per_epoch
    first, second = order.blocks(0, count), order.blocks(count, count)
    other = Order(tokens, BLOCK, seed=4).blocks(0, count)
    for a, b in ((first, second), (first, other)):
        shared = {tuple(r) for r in a.tolist()} & {tuple(r) for r in b.tolist()}
        assert len(shared) < count / 4  # a document may be cut alike by chance
        assert not torch.equal(a, b)


def test_any_step_can_be_replayed(tokens: TokenFile) -> None:
    order = Order(tokens, BLOCK, seed=3)
    at_once = order.blocks(0, 150)
    fresh = Order(tokens, BLOCK, seed=3)
    for first in (140, 3, 77, 76, 0):
        assert torch.equal(fresh.blocks(first, 5), at_once[first : first + 5])


def test_the_order_is_the_same_on_every_machine(tokens: TokenFile) -> None:
    """Written down: a run must be resumable under the next version of every library."""
    assert Order(tokens, 4, seed=7).blocks(5, 2).tolist() == EXPECTED


def test_text_shorter_than_a_block_is_refused(tokens: TokenFile) -> None:
    with pytest.raises(DataError, match="a block needs 9,001"):
        Order(tokens, 9000, seed=0)
