"""Checkpoints of unseen families, each written once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from parity_tests.unseen.families import save_unseen

UnseenMaker = Callable[[str], Path]


@pytest.fixture(scope="session")
def unseen_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> UnseenMaker:
    """`unseen_checkpoint(name)`: the folder of a row of `UNSEEN`, in float32."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
            save_unseen(name, made[name])
        return made[name]

    return make
