"""Engines in processes of their own: what goes wrong there is said here, and nothing is left."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import portkit
from parity_tests.conftest import CheckpointMaker
from portkit.bench.decode import Plan, Worker, with_gguf
from portkit.bench.engines import FAST, LLAMA_CPP, READABLE
from portkit.errors import BenchError

DEMO = str(Path(portkit.__file__).parent / "demo_checkpoint")


def plan(repo: str, *engines: str) -> Plan:
    return Plan(repo, "auto", engines, (3,), (1,), 4, 1, 1, 256)


@pytest.fixture
def started() -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    yield workers
    for worker in workers:
        worker.close()


def test_what_an_engine_lacks_is_said(
    started: list[Worker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PORTKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    started.append(Worker(plan(DEMO, FAST), FAST))
    with pytest.raises(BenchError, match=r"^fast cannot be measured: .*no C\+\+ compiler"):
        started[0].run([[1, 2, 3]], 4)


def test_an_engine_that_was_killed_is_told_of(started: list[Worker]) -> None:
    started.append(Worker(plan(DEMO, READABLE), READABLE))
    started[0]._process.kill()
    started[0]._process.wait()
    with pytest.raises(BenchError, match=r"readable cannot be measured: it was killed, .* batches"):
        started[0].run([[1, 2, 3]], 4)


def test_a_file_for_llama_cpp_has_no_name_that_could_stay(
    tiny_checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever ends the process, the system takes the file back."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    asked = plan(str(tiny_checkpoint("llama plain heads")), LLAMA_CPP)
    with with_gguf(asked) as found:
        assert found.gguf is not None
        assert Path(found.gguf).read_bytes()[:4] == b"GGUF"
        if Path("/proc/self/fd").is_dir():
            assert [one for one in tmp_path.rglob("*") if one.is_file()] == []
    assert not Path(found.gguf).exists()
