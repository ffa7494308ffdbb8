"""`portkit demo`: what it proves, what it breaks and finds, and what it says of both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import portkit
from portkit.cli import demo, main
from portkit.loading import load
from portkit.parity import demonstration
from portkit.parity.demonstration import EPSILON, SITE, Found, Gates, gates_of
from portkit.parity.judging.judge import Verdict
from portkit.parity.probes.probe import Pass, Probe
from portkit.parity.result import Comparison, ParityResult

CHECKPOINT = Path(portkit.__file__).parent / "demo_checkpoint"
NUM_SITES = 338
"""Of the shipped checkpoint."""
STORY = "Once upon a time, there was a little piglet named Finn."


@pytest.fixture(scope="module")
def found() -> Found:
    torch.set_num_threads(1)
    return demonstration.find_planted(CHECKPOINT, [2, 5, 9])


@pytest.fixture
def quickly(found: Found, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Proofs that were made before: gives the dtypes and kernels that they were asked for."""
    asked: list[tuple[str, str]] = []
    (comparison,) = found.result.comparisons
    judgements = (one for one in comparison.judgements if one.verdict is Verdict.exact)
    proof = replace(comparison, judgements=tuple(judgements))

    def prove(folder: Path, dtype: str, kernel: str) -> Comparison:
        assert folder == CHECKPOINT
        asked.append((dtype, kernel))
        return proof

    monkeypatch.setattr(demonstration, "prove_shipped", prove)
    monkeypatch.setattr(demonstration, "find_planted", lambda *_: found)
    return asked


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["demo", *arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, capsys.readouterr().out


def test_the_shipped_checkpoint_is_exact_at_every_site() -> None:
    proof = demonstration.prove_shipped(CHECKPOINT, "bfloat16", "eager")
    assert (proof.verdict, proof.dtype, len(proof.probe)) == ("exact", "bfloat16", 16)
    assert proof.num_exact == len(proof.judgements) == NUM_SITES


def test_everyday_gates_let_the_planted_fault_through_and_portkit_does_not(found: Found) -> None:
    gates, generation = found.gates, found.result.generation
    assert gates.pass_it
    assert gates.cosine > 1 - 1e-9
    assert gates.top1 == 1.0
    assert 1e-6 < gates.max_difference < 1e-4
    assert generation is not None
    assert generation.is_equal
    assert found.result.verdict is Verdict.diverged
    (culprit,) = found.result.comparisons[0].culprits
    assert (culprit.site, culprit.kind) == (SITE, "function")
    assert culprit.function_error is not None
    assert 1e-7 < culprit.function_error < 1e-4


def test_what_is_planted_is_another_epsilon() -> None:
    model: Any = load(CHECKPOINT, device="cpu").model
    before = {name: norm.eps for name, norm in model.named_modules() if hasattr(norm, "eps")}
    demonstration.plant(model)
    after = {name: norm.eps for name, norm in model.named_modules() if hasattr(norm, "eps")}
    assert set(before.values()) == {1e-6}
    assert {name: eps for name, eps in after.items() if eps != 1e-6} == {SITE: EPSILON}


def test_gates_are_measured_at_every_real_token() -> None:
    ids = torch.tensor([[0, 3], [4, 5]])
    probe = Probe("of two", (Pass("one", ids, ids, torch.tensor([[0, 1], [1, 1]])),))
    theirs = torch.tensor([[[9.0, 9.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 2.0]]])
    ours = theirs.clone()
    ours[0, 0] = 100.0  # padding
    assert gates_of(probe, [ours], [theirs]) == Gates(pytest.approx(1.0), 1.0, 0.0)
    ours[1, 1] = torch.tensor([2.0, 0.0])
    wrong = gates_of(probe, [ours], [theirs])
    assert wrong == Gates(pytest.approx(0.0), pytest.approx(2 / 3), 2.0)
    assert not wrong.pass_it
    for field, value in (("cosine", 0.99), ("top1", 0.999), ("max_difference", 2e-3)):
        assert not replace(Gates(1.0, 1.0, 0.0), **{field: value}).pass_it, field


def test_it_is_told_in_steps(
    quickly: list[tuple[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = run(capsys, "--out", str(tmp_path / "out"))
    assert code == 0
    assert quickly == [(dtype, kernel) for dtype in demo.DTYPES for kernel in demo.KERNELS]
    lines = out.splitlines()
    steps = [line.split()[1] for line in lines if line[:2] in {f"{n}." for n in range(1, 6)}]
    assert steps == ["load", "prove", "break", "find", "generate"]
    for said in (
        f"float32, eager   exact: {NUM_SITES - 1} of {NUM_SITES - 1} sites equal in every bit "
        "over 16 passes",
        f"3. break     {SITE} is given an epsilon of 1e-05 where the checkpoint has 1e-06",
        f"first made at {SITE}",
        "function: it computes another function",
        f"diverged, {NUM_SITES - 1} of {NUM_SITES} sites",
        f"report: {tmp_path / 'out' / 'report.html'} (one file: open it in a browser)",
        STORY,
    ):
        assert said in out, said
    assert sum(line.endswith("  passes") for line in lines) == 4
    assert len(lines) < 30
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert SITE in page
    assert f"portkit demo --out {tmp_path / 'out'}" in page


def test_the_object_says_the_same(
    quickly: list[tuple[str, str]],
    found: Found,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out = run(capsys, "--json")
    printed = json.loads(out)
    assert (code, printed["verdict"]) == (0, "exact")
    assert len(printed["proofs"]) == len(quickly) == 4
    equal = NUM_SITES - 1  # what is not equal is left out of the proof that stands in here
    proof = {"verdict": "exact", "passes": 16, "sites": equal, "exact": equal}
    assert printed["proofs"]["float32, eager"] == proof
    fault = printed["fault"]
    assert (fault["planted"], fault["found"], fault["verdict"]) == (SITE, True, "diverged")
    assert fault["everyday_gates"] == {**vars(found.gates), "pass_it": True}
    assert fault["first"]["site"] == SITE
    (folder,) = tmp_path.iterdir()
    assert fault["report"] == str(folder / "report.html")
    assert Path(fault["report"]).is_file()
    assert printed["text"].startswith(STORY)


@pytest.mark.usefixtures("quickly")
def test_a_fault_that_is_not_found_is_no_success(
    found: Found,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missed = ParityResult(
        (demonstration.prove_shipped(CHECKPOINT, "", ""),), found.result.generation
    )
    monkeypatch.setattr(demonstration, "find_planted", lambda *_: Found(found.gates, missed))
    code, out = run(capsys, "--out", str(tmp_path))
    assert code == 1
    assert f"4. find      exact, {NUM_SITES - 1} of {NUM_SITES - 1} sites" in out


def test_a_place_that_cannot_be_written_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--out", str(tmp_path / "file" / "out")])
    assert exit_.value.code == 2
    assert "name another folder" in capsys.readouterr().err


def test_without_transformers_nothing_is_proven_and_that_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portkit.parity.reference.is_available", lambda: False)
    code, out = run(capsys, "--json")
    printed = json.loads(out)
    assert (code, printed["verdict"], printed["proofs"], printed["fault"]) == (0, None, {}, None)
    code, out = run(capsys)
    assert code == 0
    assert "2. prove     not verified: Transformers is not installed" in out
    assert "3. generate  Once upon a time" in out
