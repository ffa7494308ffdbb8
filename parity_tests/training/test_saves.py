"""A saved step is whole or absent: damage is passed over, a full disk and a kill lose nothing."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from parity_tests.training.conftest import Write, recipe, same_weights
from portkit.errors import TrainingError
from portkit.training import journal
from portkit.training.ranks import Ranks
from portkit.training.recipe import Habits
from portkit.training.run import Inputs, train
from portkit.training.saves import LATEST, MANIFEST, Saves, State, _described

ALONE = Ranks(0, 1, torch.device("cpu"))


def small_state(seed: int) -> State:
    torch.manual_seed(seed)
    module = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return State(module, [optimizer])


def equal(one: State, other: State) -> bool:
    flat = [
        [value for part in state.tensors().values() for value in part.values()]
        for state in (one, other)
    ]
    return all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[int, State]]:
    """Steps 1 to 4, of which the last three are kept."""
    states = {step: small_state(step) for step in (1, 2, 3, 4)}
    for step, state in states.items():
        Saves(tmp_path, 3, ALONE).save(step, state)
    return tmp_path, states


def loaded(folder: Path) -> tuple[int, State, list[str]]:
    state, notes = small_state(99), list[str]()
    return Saves(folder, 3, ALONE, notes.append).load(state), state, notes


def test_the_last_few_are_kept_and_the_newest_is_loaded(
    saved: tuple[Path, dict[int, State]],
) -> None:
    folder, states = saved
    assert sorted(path.name for path in folder.iterdir()) == [
        LATEST,
        *(f"step-0000000{step}" for step in (2, 3, 4)),
    ]
    assert (folder / LATEST).read_text() == "step-00000004\n"
    step, state, notes = loaded(folder)
    assert (step, notes) == (4, [])
    assert equal(state, states[4])
    assert not equal(state, states[3])


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "manifest", "no manifest", "format"])
def test_a_damaged_step_is_passed_over(damage: str, saved: tuple[Path, dict[int, State]]) -> None:
    folder, states = saved
    newest = folder / "step-00000004"
    data, manifest = newest / "__0_0.distcp", newest / MANIFEST
    match damage:
        case "flip":
            content = bytearray(data.read_bytes())
            content[len(content) // 2] ^= 1
            data.write_bytes(content)
        case "cut":
            data.write_bytes(data.read_bytes()[:-1])
        case "missing":
            data.unlink()
        case "manifest":
            manifest.write_text(manifest.read_text()[:-5])
        case "no manifest":
            manifest.unlink()
        case "format":
            manifest.write_text(json.dumps({"format": 99, "step": 4, "files": {}}))
    step, state, notes = loaded(folder)
    assert step == 3
    assert equal(state, states[3])
    assert len(notes) == 1
    assert notes[0].startswith("step-00000004 is passed over: ")
    Saves(folder, 3, ALONE).save(4, states[4])  # made again
    assert loaded(folder)[0] == 4


def test_without_a_whole_step_nothing_is_begun_anew(saved: tuple[Path, dict[int, State]]) -> None:
    folder, _ = saved
    for manifest in folder.glob("*/manifest.json"):
        manifest.write_text("{}")
    with pytest.raises(TrainingError, match="none of the 3 saved steps"):
        loaded(folder)


MANIFESTS: dict[str, Any] = {
    "names nothing": {"format": 1, "step": 4, "files": {}},
    "no object": [1, 2],
    "null": None,
    "deep": None,
    "files are a list": {"format": 1, "step": 4, "files": [["__0_0.distcp", {}]]},
    "files are null": {"format": 1, "step": 4, "files": None},
    "format is an object": {"format": {}, "step": 4, "files": {}},
    "of another step": "step",
    "one file too many": "more",
    "one file too few": "less",
    "out of the folder": "out",
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_malformed_manifest_is_no_step(kind: str, saved: tuple[Path, dict[int, State]]) -> None:
    folder, states = saved
    path = folder / "step-00000004" / MANIFEST
    manifest = json.loads(path.read_text())
    match MANIFESTS[kind]:
        case "step":
            manifest["step"] = 3
        case "more":
            manifest["files"]["__1_0.distcp"] = manifest["files"]["__0_0.distcp"]
        case "less":
            (path.parent / "stray").write_bytes(b"")
        case "out":
            manifest["files"]["../step-00000003/.metadata"] = manifest["files"][".metadata"]
        case other:
            manifest = other
    path.write_text("[" * 100_000 if kind == "deep" else json.dumps(manifest))
    step, state, notes = loaded(folder)
    assert (step, len(notes)) == (3, 1)
    assert equal(state, states[3])
    assert notes[0].startswith("step-00000004 is passed over: ")


def test_a_folder_that_holds_a_manifest_alone_is_no_step(
    saved: tuple[Path, dict[int, State]],
) -> None:
    folder, states = saved
    newest = folder / "step-00000009"
    newest.mkdir()
    (newest / MANIFEST).write_text(json.dumps({"format": 1, "step": 9, "files": {}}))
    step, state, _ = loaded(folder)
    assert step == 4
    assert equal(state, states[4])


@pytest.mark.parametrize(
    "name", ["step-", "step-x", "step-²", "step-٣", "step-9", "step-000000099"]
)
def test_a_stray_folder_is_no_step(name: str, saved: tuple[Path, dict[int, State]]) -> None:
    folder, states = saved
    (folder / name).mkdir()
    (folder / ".step-00000009.partial").write_text("a file, where a folder is usual")
    step, state, notes = loaded(folder)
    assert (step, notes) == (4, [])
    assert equal(state, states[4])
    Saves(folder, 3, ALONE).save(5, states[1])
    assert (folder / name).is_dir()


def test_a_link_is_no_step_and_what_it_leads_to_stays(
    saved: tuple[Path, dict[int, State]], tmp_path: Path
) -> None:
    folder, states = saved
    elsewhere = tmp_path / "elsewhere"
    (folder / "step-00000004").rename(elsewhere)
    (folder / "step-00000004").symlink_to(elsewhere)
    assert loaded(folder)[0] == 3
    Saves(folder, 3, ALONE).save(4, states[4])
    assert loaded(folder)[0] == 4
    assert (elsewhere / MANIFEST).is_file()


class Planted:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def with_index(step: Path, index: Any) -> None:
    """Put an index in place, and its digest in the manifest."""
    (step / ".metadata").write_bytes(pickle.dumps(index))
    manifest = json.loads((step / MANIFEST).read_text())
    manifest["files"][".metadata"] = _described(step / ".metadata")
    (step / MANIFEST).write_text(json.dumps(manifest))


def test_no_code_is_run_by_an_index(saved: tuple[Path, dict[int, State]], tmp_path: Path) -> None:
    folder, states = saved
    with_index(folder / "step-00000004", Planted(tmp_path / "planted"))
    step, state, notes = loaded(folder)
    assert (step, len(notes)) == (3, 1)
    assert "asks for pathlib.Path.touch" in notes[0] or "asks for builtins.getattr" in notes[0]
    assert equal(state, states[3])
    assert not (tmp_path / "planted").exists()


def test_no_code_is_run_by_what_is_no_tensor(saved: tuple[Path, dict[int, State]]) -> None:
    """What the index calls bytes torch would unpickle, whatever they ask for."""
    folder, states = saved
    newest = folder / "step-00000004"
    index = pickle.loads((newest / ".metadata").read_bytes())
    index.state_dict_metadata["model.bias"] = BytesStorageMetadata()
    with_index(newest, index)
    step, state, notes = loaded(folder)
    assert step == 3
    assert "BytesStorageMetadata" in notes[0]
    assert equal(state, states[3])


def test_an_index_leads_to_no_file_outside(saved: tuple[Path, dict[int, State]]) -> None:
    folder, _ = saved
    newest = folder / "step-00000004"
    index = pickle.loads((newest / ".metadata").read_bytes())
    for one in index.storage_data.values():
        one.relative_path = "../step-00000003/__0_0.distcp"
    with_index(newest, index)
    step, _, notes = loaded(folder)
    assert step == 3
    assert notes == ["step-00000004 is passed over: .metadata names files that it does not list"]


def test_a_step_of_another_model_is_passed_over(saved: tuple[Path, dict[int, State]]) -> None:
    folder, states = saved
    module = nn.Linear(5, 4)
    Saves(folder, 9, ALONE).save(5, State(module, [torch.optim.AdamW(module.parameters())]))
    step, state, notes = loaded(folder)
    assert (step, len(notes)) == (4, 1)
    assert "is of shape [4, 5] where [3, 5] is due" in notes[0]
    assert equal(state, states[4])


def test_a_step_that_cannot_be_loaded_after_all_says_the_way_out(
    saved: tuple[Path, dict[int, State]],
) -> None:
    folder, states = saved
    newest = folder / "step-00000004"
    (newest / "__0_0.distcp").write_bytes(b"whatever")
    manifest = json.loads((newest / MANIFEST).read_text())
    manifest["files"]["__0_0.distcp"] = _described(newest / "__0_0.distcp")
    (newest / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(TrainingError, match=r"step-00000004 cannot be loaded.*or delete it"):
        loaded(folder)
    shutil.rmtree(newest)
    step, state, _ = loaded(folder)
    assert step == 3
    assert equal(state, states[3])


def test_where_nothing_was_saved_nothing_is_changed(tmp_path: Path) -> None:
    """Torch's question for an optimizer's state takes a step, so that there is one."""
    module = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    (tmp_path / "step-x").mkdir()
    assert Saves(tmp_path, 3, ALONE).load(State(module, [optimizer])) == 0
    assert not optimizer.state


def test_half_a_save_is_cleared_away(saved: tuple[Path, dict[int, State]]) -> None:
    folder, _ = saved
    partial = folder / ".step-00000005.partial"
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(b"half")
    assert loaded(folder)[0] == 4
    assert not partial.exists()


def test_a_disk_without_room_is_said_before_writing(
    saved: tuple[Path, dict[int, State]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, states = saved
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(TrainingError, match=r"10 bytes are free.*step 4 is safe: make room"):
        Saves(folder, 3, ALONE).save(5, states[4])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not list(folder.glob(".*"))


FULL = """
import resource, signal, sys
from parity_tests.training.test_saves import ALONE, loaded, small_state
from portkit.errors import TrainingError
from portkit.training.saves import Saves
from pathlib import Path
state = small_state(5)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    Saves(Path(sys.argv[1]), 3, ALONE).save(5, state)
except TrainingError as error:
    sys.stdout.write(str(error))
"""


def test_a_disk_that_fills_while_writing_loses_nothing(
    saved: tuple[Path, dict[int, State]],
) -> None:
    """No file may grow beyond 200 bytes: the write is refused half way, as on a full disk."""
    folder, states = saved
    done = subprocess.run(
        [sys.executable, "-c", FULL, folder], capture_output=True, text=True, check=True
    )
    assert "step 5 cannot be saved" in done.stdout
    assert "step 4 is safe" in done.stdout
    assert not list(folder.glob(".*"))
    step, state, notes = loaded(folder)
    assert (step, notes) == (4, [])
    assert equal(state, states[4])


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from portkit.training.recipe import Habits, Recipe
from portkit.training.run import Inputs, train

inputs, recipe, habits, folder, kills = json.loads(sys.argv[1])
torch.set_num_threads(1)
torch._dynamo  # imported here and not by every child
draw = random.Random(0)
runs, while_saving = 1, 0
while True:
    run = Path(folder, f"run-{runs}")
    # Forked from a process that has never run autograd: a child begins at once.
    child = os.fork()
    if child == 0:
        train(Inputs(**inputs), Recipe(**recipe), run, Habits(**habits))
        os._exit(0)
    deadline = time.monotonic() + (draw.uniform(0.02, 0.5) if kills else 600)
    ended = False
    while not ended and time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        ended = pid != 0
        time.sleep(0.001)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert kills, "the last attempt hangs"
        kills -= 1
        while_saving += bool(list(run.glob("steps/.step-*.partial")))
    elif status != 0:
        sys.exit(f"a run ended with {status}")
    elif kills:
        runs += 1  # there are kills left for another
    else:
        break
sys.stdout.write(json.dumps([runs, while_saving]))
"""


def kill_and_resume(inputs: Inputs, tmp_path: Path, steps: int, kills: int) -> int:
    """Runs of `steps` steps, killed `kills` times at random moments and gone on with each time.

    All come to what the straight run comes to. Returns how many kills hit a save.
    """
    told, habits = recipe(steps=steps, context=12), Habits(eval_every=0, save_every=3, keep=2)
    straight = tmp_path / "straight"
    train(inputs, told, straight, habits)
    arguments = [asdict(inputs), asdict(told), asdict(habits), str(tmp_path), kills]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    num_runs, while_saving = json.loads(done.stdout)
    expected = journal.series(journal.read_lines(straight), "step", "loss")
    for number in range(1, num_runs + 1):
        run = tmp_path / f"run-{number}"
        assert same_weights(straight, run)
        assert journal.series(journal.read_lines(run), "step", "loss") == expected
    assert [step for step, _ in expected] == list(range(1, steps + 1))
    return int(while_saving)


@pytest.fixture
def smaller(inputs: Inputs, config_file: Write) -> Inputs:
    """One layer: a step and a save take some milliseconds."""
    config_file(num_hidden_layers=1, layer_types=["sliding_attention"])
    return inputs


def test_killed_at_ten_random_moments(smaller: Inputs, tmp_path: Path) -> None:
    kill_and_resume(smaller, tmp_path, 40, 10)


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments(smaller: Inputs, tmp_path: Path) -> None:
    assert kill_and_resume(smaller, tmp_path, 300, 100) > 5


def test_a_failed_save_stops_the_run_and_the_same_command_goes_on(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told, habits = tmp_path / "run", recipe(), Habits(save_every=4, eval_every=0)

    def fill(record: Mapping[str, Any]) -> None:
        if record["event"] == "saved":
            monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))

    with pytest.raises(TrainingError, match=r"step 8 cannot be saved .*; step 4 is safe"):
        train(inputs, told, run, habits, fill)
    monkeypatch.undo()
    train(inputs, told, run, habits)
    train(inputs, told, tmp_path / "straight", habits)
    assert same_weights(run, tmp_path / "straight")
