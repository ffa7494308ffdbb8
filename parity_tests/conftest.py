"""Fixtures for all tests: one thread, the data folder, tiny awkward checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parity_tests.checkpoints import TINY, save_tiny

CheckpointMaker = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The bitwise tests hold at one thread: how a sum is shared out decides its last bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Released configs, trained weights, texts; the test is skipped where there are none."""
    named = os.environ.get("PORTKIT_DATA")
    if named is None or not Path(named).is_dir():
        pytest.skip("PORTKIT_DATA does not name the folder of real configs and weights")
    return Path(named)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointMaker:
    """`tiny_checkpoint(name, dtype)`: the folder of a checkpoint of `TINY`, made once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            save_tiny(TINY[name], folder, dtype)
            made[name, dtype] = folder
        return made[name, dtype]

    return make
