"""Compiled regions: the same tokens, and no harm done where there are none to be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parity_tests.conftest import CheckpointMaker
from parity_tests.decoding.test_equivalence import (
    NUM_DECODED,
    distance,
    logits_of,
    prompts,
    true_logits,
)
from portkit.decoding.compiler import Recipe, from_json, recipe
from portkit.decoding.fast import FastModel
from portkit.decoding.packages import Packages, default_folder
from portkit.decoding.session import Session
from portkit.loading import load
from portkit.readable import ReadableBatch

ROOT = Path(__file__).resolve().parents[2]


def some_recipe() -> Recipe:
    from torch import fx

    graph = fx.Graph()
    x = graph.placeholder("p0")
    graph.output((graph.call_function(torch.add, (x, x)),))
    return recipe(graph, [torch.ones(3)], [None], 1)


@pytest.fixture
def said() -> list[str]:
    return []


@torch.inference_mode()
def story(session: Session, count: int) -> list[int]:
    token = session.prefill().argmax(-1)
    found = [int(token)]
    for _ in range(count):
        token = session.greedy(token)[:, -1]
        found.append(int(token))
    return found


def test_without_a_compiler_the_tokens_are_the_same(
    tiny_checkpoint: CheckpointMaker,
    tmp_path: Path,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(tiny_checkpoint("gemma3", torch.bfloat16)).model
    plain = story(FastModel(model).start(prompts([15]), 20), 19)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    fast = FastModel(model, Packages(tmp_path / "packages", said.append))
    session = fast.start(prompts([15]), 20, 1)
    assert story(session, 19) == plain
    assert not session.is_compiled
    assert said == [
        "decoding without compiled regions: no C++ compiler was found (g++, clang++, or the one "
        "that CXX names)"
    ]


def test_a_compiler_that_fails_is_told_of_once(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    packages = Packages(tmp_path, said.append)
    assert packages.wait([some_recipe()]) is None
    assert packages.find([some_recipe()]) is None
    (line,) = said
    assert "the compiler failed (exit code 1" in line
    assert str(tmp_path) in line


def test_a_folder_that_cannot_be_written_is_told_of(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").write_text("")
    packages = Packages(tmp_path / "file" / "folder", said.append)
    assert packages.wait([some_recipe()]) is None
    assert "cannot be kept in" in said[0]


def test_a_damaged_package_is_told_of(tmp_path: Path, said: list[str]) -> None:
    packages = Packages(tmp_path, said.append)
    packages.path(some_recipe()).write_bytes(b"no package")
    packages.path(some_recipe()).chmod(0o600)
    assert packages.wait([some_recipe()]) is None
    assert "cannot be loaded" in said[0]


def planted(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have a file or folder be another's in some way; returns what is said of it."""
    elsewhere = path.with_name("elsewhere")
    match kind:
        case "owner":
            monkeypatch.setattr("os.geteuid", lambda: 4_000_000)
            return f"belongs to another user (id {path.stat().st_uid})"
        case "group":
            path.chmod(path.stat().st_mode | 0o020)
        case "world":
            path.chmod(path.stat().st_mode | 0o002)
        case "link":
            path.rename(elsewhere)
            path.symlink_to(elsewhere)
            return "is a link"
        case "hard link":
            elsewhere.hardlink_to(path)
            return "has a second name elsewhere"
    return "can be written by other users (mode "


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        *(("folder", kind) for kind in ("owner", "group", "world", "link")),
        *(("package", kind) for kind in ("group", "world", "link", "hard link")),
    ],
)
def test_what_another_can_have_written_is_not_loaded(
    what: str, kind: str, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "packages"
    folder.mkdir(mode=0o700)
    packages = Packages(folder, said.append)
    package = packages.path(some_recipe())
    package.write_bytes(b"machine code")
    package.chmod(0o600)
    loaded: list[str] = []

    class Loader:
        def __init__(self, path: str, *_: object) -> None:
            loaded.append(path)

        run = print

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", Loader)
    assert Packages(folder, said.append).find([some_recipe()]) == [print]
    assert loaded == [str(package)], "what is ours alone is loaded"
    loaded.clear()
    path = folder if what == "folder" else package
    why = planted(kind, path, monkeypatch)
    assert packages.wait([some_recipe()]) is None
    assert loaded == []
    (line,) = said
    assert line.startswith(f"decoding without compiled regions: {path} {why}")
    assert line.endswith("remove it, or name a folder of your own with PORTKIT_CACHE")


@pytest.mark.parametrize("kind", ["owner", "group", "world", "link"])
@pytest.mark.parametrize("what", ["packages", "packages/inductor"])
def test_nothing_is_compiled_where_another_can_write(
    what: str, kind: str, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / what).mkdir(mode=0o700, parents=True)
    (tmp_path / "packages").chmod(0o700)
    why = planted(kind, tmp_path / what, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("subprocess.Popen", None)
    assert Packages(tmp_path / "packages", said.append).wait([some_recipe()]) is None
    assert why in said[0]
    assert len(said) == 1
    assert [one for one in sorted(tmp_path.rglob("*")) if one.is_file()] == []
    assert set(before) <= set(tmp_path.rglob("*"))


def test_what_a_log_leads_to_is_not_written(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "packages"
    folder.mkdir(mode=0o700)
    (folder / "compiler.log").symlink_to(precious)
    monkeypatch.setattr(sys, "executable", "/bin/echo")
    assert Packages(folder, said.append).find([some_recipe()]) is None
    assert precious.read_text() == "mine"
    assert not (folder / "compiler.log").is_symlink()


def test_recipes_travel_as_plain_values_and_past_the_folder(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    start = subprocess.Popen

    def look(*_: Any, **options: Any) -> Any:
        given.append(os.pread(options["stdin"].fileno(), 1 << 20, 0).decode())
        return start(["/bin/false"], stdin=options["stdin"])

    monkeypatch.setattr("subprocess.Popen", look)
    tmp_path.chmod(0o700)
    packages = Packages(tmp_path, said.append)
    assert packages.wait([some_recipe()]) is None
    ((saved, path),) = json.loads(given[0])
    assert from_json(saved) == some_recipe()
    assert path == str(packages.path(some_recipe()))
    assert {one.name for one in tmp_path.iterdir()} == {"compiler.log", "inductor"}


def test_the_compiler_imports_nothing_from_where_its_user_stands(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody decodes from within a folder that was downloaded, which holds a `torch.py`."""
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    (downloaded / "torch.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.chdir(downloaded)
    # The tests' own path may have a place for where one stands.
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [*paths, str(ROOT)])))
    failing = replace(some_recipe(), code="raise ValueError('compiled, it would take long')")
    assert Packages(tmp_path / "packages", said.append).wait([failing]) is None
    assert not (tmp_path / "ran").exists()
    assert "it would take long" in (tmp_path / "packages" / "compiler.log").read_text()


def test_what_a_package_depends_on_is_in_its_name(tmp_path: Path) -> None:
    graph_recipe = some_recipe()
    names = set()
    for threads, size in ((1, 3), (2, 3), (1, 4)):
        packages = Packages(tmp_path, lambda _: None)
        changed = Recipe(
            graph_recipe.code,
            graph_recipe.names,
            ((size,),),
            graph_recipe.dtypes,
            graph_recipe.growing,
            threads,
        )
        names.add(packages.path(changed))
    assert len(names) == 3


def test_how_far_a_cache_is_filled_is_not_in_the_name(tmp_path: Path) -> None:
    from torch import fx

    graph = fx.Graph()
    x = graph.placeholder("p0")
    graph.output((graph.call_function(torch.add, (x, x)),))
    packages = Packages(tmp_path, lambda _: None)
    shorter, longer = (recipe(graph, [torch.ones(n, 4)], ["filled"], 1) for n in (7, 9))
    assert packages.path(shorter) == packages.path(longer)
    assert packages.path(shorter) != packages.path(recipe(graph, [torch.ones(7, 4)], [None], 1))


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PORTKIT_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    monkeypatch.delenv("PORTKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "portkit" / "compiled"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3 shallow", "qwen3", "llama tied with biases"])
def test_compiled_regions_are_within_the_floor(
    name: str, tiny_checkpoint: CheckpointMaker, tmp_path: Path, said: list[str]
) -> None:
    """Over the window's edge, with the caches growing, in bfloat16; and again from the folder."""
    model = load(tiny_checkpoint(name, torch.bfloat16)).model
    given = prompts([15])
    room = NUM_DECODED + 1
    truth = true_logits(model, given)
    readable = logits_of(ReadableBatch(model, given, room), 1)
    packages = Packages(tmp_path, said.append)
    fast = FastModel(model, packages)

    whole, largest = (
        logits_of(fast.start(given, room, count), 1, compiled=True) for count in (None, 5)
    )
    assert distance(whole, truth) <= 1.25 * distance(readable, truth)
    kept = largest > -torch.inf
    assert bool((kept[:, 1:].sum(-1) >= 5).all())
    assert not bool(kept[:, 1:].all())
    assert packages.compile_s > 1
    assert {one.stat().st_mode & 0o077 for one in tmp_path.glob("*.pt2")} == {0}
    made = Packages(tmp_path, said.append)
    again = FastModel(model, made).start(given, room)
    with torch.inference_mode():
        again.prefill()
        again.prepare()
        again.decode(torch.tensor([3]))
    assert again.is_compiled, "the regions are there from before: nobody waits"
    assert made.compile_s == 0
    assert said == []
