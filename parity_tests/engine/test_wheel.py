"""What people install: the wheel holds everything, and works where Transformers is not.

Builds the wheel, looks into it, installs it under the constraints into an environment of its own,
and runs the commands there on the checkpoint that ships. Downloads torch, hence `slow`.
"""

from __future__ import annotations

import email
import json
import os
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import portkit
from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.loading import LoadedModel, load
from portkit.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("portkit", "architectures")
DEMO = ROOT / "portkit" / "demo_checkpoint"
PROMPT = "Once upon a time"


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Standard output of a command that succeeds, in an environment without ours."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PORTKIT_DATA")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    (found,) = out.iterdir()
    return found


class Installed:
    """A virtual environment that holds the wheel and what it asks for, and nothing else."""

    def __init__(self, directory: Path, wheel: Path) -> None:
        self.elsewhere = directory / "elsewhere"  # where no source tree is found by chance
        self.elsewhere.mkdir()
        run(sys.executable, "-m", "venv", directory / "venv")
        self.bin = directory / "venv" / "bin"
        install = (self.bin / "python", "-m", "pip", "install", "--quiet")
        constraints = ("-c", ROOT / "constraints.txt")
        run(*install, *constraints, "torch")  # first, so that the wheel asks for no other build
        run(*install, *constraints, wheel)

    def python(self, code: str) -> str:
        return run(self.bin / "python", "-c", code, cwd=self.elsewhere).strip()

    def portkit(self, *arguments: str | Path) -> str:
        return run(self.bin / "portkit", *arguments, cwd=self.elsewhere)

    def portkit_json(self, *arguments: str | Path) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.portkit(*arguments, "--json"))
        assert told["command"] == arguments[0]
        assert told["versions"]["portkit"] == portkit.__version__
        assert "transformers" not in told["versions"]
        return told


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture(scope="module")
def demo(installed: Installed) -> Path:
    """The checkpoint as it was installed."""
    where = "from importlib.resources import files; print(files('portkit') / 'demo_checkpoint')"
    found = Path(installed.python(where))
    assert found.is_relative_to(installed.bin.parent)
    return found


@pytest.fixture(scope="module")
def here() -> LoadedModel:
    """The same checkpoint from the source tree."""
    return load(DEMO, device="cpu")


def greedy(loaded: LoadedModel, max_new_tokens: int) -> tuple[list[int], str]:
    tokenizer = Tokenizer.open(loaded.files)
    settings = GenerationSettings.read(loaded.files).override(
        do_sample=False, max_new_tokens=max_new_tokens
    )
    steps = list(
        generate(
            loaded.model,
            [tokenizer.encode(PROMPT)],
            settings,
            context_length=loaded.config.max_position_embeddings,
            tokenizer=tokenizer,
        )
    )
    return [step.token_id for step in steps], "".join(step.text for step in steps)


def source_files(package: str) -> set[str]:
    paths = (path for path in (ROOT / package).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts}


def test_the_wheel_holds_two_packages_and_all_of_their_files(wheel: Path) -> None:
    names = {name for name in ZipFile(wheel).namelist() if not name.endswith("/")}
    information = f"portkit-{portkit.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, information}
    for package in PACKAGES:
        held = {name for name in names if name.partition("/")[0] == package}
        assert held == source_files(package)
    assert {"portkit/py.typed", "portkit/demo_checkpoint/model.safetensors"} <= names
    assert f"{information}/licenses/LICENSE" in names
    assert wheel.stat().st_size < 4e6


def test_the_wheel_announces_commands_families_and_needs(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    information = f"portkit-{portkit.__version__}.dist-info"
    with ZipFile(wheel) as archive:
        points = ConfigParser(delimiters="=")
        points.optionxform = str  # type: ignore[assignment, method-assign]
        points.read_string(archive.read(f"{information}/entry_points.txt").decode())
        metadata = email.message_from_bytes(archive.read(f"{information}/METADATA"))
    assert dict(points["console_scripts"]) == project["scripts"]
    families = project["entry-points"]["portkit.architectures"]
    assert dict(points["portkit.architectures"]) == families
    asked = map(Requirement, metadata.get_all("Requires-Dist", []))
    needed = {one for one in asked if one.marker is None}
    assert needed == set(map(Requirement, project["dependencies"]))
    assert "transformers" not in {one.name for one in needed}
    assert metadata["License-Expression"] == "Apache-2.0"
    text = metadata.get_payload(decode=True)
    assert isinstance(text, bytes)
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in text.decode()


def test_transformers_is_not_there(installed: Installed) -> None:
    found = installed.python("import importlib.util as u; print(u.find_spec('transformers'))")
    assert found == "None"
    run(installed.bin / "python", "-m", "pip", "check")


def test_list(installed: Installed) -> None:
    families = installed.portkit_json("list")["families"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = project["entry-points"]["portkit.architectures"]
    assert {one["model_type"]: one["entry_point"] for one in families} == expected
    assert set(expected) <= set(installed.portkit("list").split())


def test_load_and_inspect(installed: Installed, demo: Path, here: LoadedModel) -> None:
    loaded = installed.portkit_json("load", demo, "--check")
    assert loaded["parameters"] == here.report.parameters
    assert (loaded["tensors"], loaded["bytes"]) == (here.report.tensors, here.report.bytes)
    assert loaded["sha256"] == here.blueprint.checkpoint.check()
    assert f"{here.report.parameters:,}" in installed.portkit("load", demo)
    inspected = installed.portkit_json("inspect", demo)
    assert inspected["parameters"] == here.report.parameters
    assert inspected["layers"] == here.config.num_hidden_layers
    assert f"{here.report.parameters:,}" in installed.portkit("inspect", demo)


def test_generate(installed: Installed, demo: Path, here: LoadedModel) -> None:
    token_ids, text = greedy(here, 40)
    asked = ("generate", demo, "--prompt", PROMPT, "--greedy", "--max-new-tokens", "40")
    told = installed.portkit_json(*asked)
    assert (told["token_ids"], told["text"]) == (token_ids, text)
    assert installed.portkit(*asked).strip() == text.strip()


def test_demo(installed: Installed, here: LoadedModel) -> None:
    told = installed.portkit_json("demo")
    assert told["parameters"] == here.report.parameters
    assert (told["verdict"], told["proofs"], told["fault"]) == (
        None,
        {},
        None,
    )  # nothing to be proven against
    assert told["text"] == PROMPT + greedy(here, 200)[1]
    aloud = installed.portkit("demo")
    assert "not verified: Transformers is not installed" in aloud
    assert told["text"] in aloud


def test_a_users_error_is_one_line(installed: Installed) -> None:
    done = subprocess.run(
        [installed.bin / "portkit", "load", "./nowhere"],
        cwd=installed.elsewhere,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("portkit: error: ")
    assert done.stderr.count("\n") == 1


def test_both_packages_come_from_the_wheel(installed: Installed) -> None:
    homes = installed.python(
        "import portkit, architectures.llama as l; print(portkit.__file__); print(l.__file__)"
    ).splitlines()
    assert len(homes) == 2
    assert all(Path(home).is_relative_to(installed.bin.parent) for home in homes)
