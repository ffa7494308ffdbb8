"""The floors: a module imports only from lower ones, and two files know the reference."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from portkit.registry import GROUP, find, registered

ROOT = Path(__file__).resolve().parents[2]

FLOORS = {
    "portkit.cli": 8,
    "portkit.bench": 7,
    "portkit.parity": 6,
    "portkit.training": 6,
    "portkit.generation": 5,
    "portkit.decoding": 5,
    "portkit.importers": 5,
    "portkit.exporting": 5,
    "portkit.gguf": 6,
    "portkit.slicing": 5,
    "portkit.loading": 4,
    "portkit.quantizing": 4,
    "portkit.readable": 4,
    "portkit.tokenizer": 4,
    "portkit.tokenizer_backend": 1,
    "portkit.registry": 3,
    "architectures": 3,
    "portkit.architecture": 2,
    "portkit.tokenizer_files": 2,
    "portkit.checking": 2,
    "portkit.config": 1,
    "portkit.checkpoint": 1,
    "portkit.hub": 2,
    "portkit.layout": 1,
    "portkit.weights": 1,
    "portkit.nn": 1,
    "portkit.errors": 0,
    "portkit.envelope": 0,
    "portkit.json_reading": 0,
    "portkit.confined": 0,
    "portkit.columns": 1,
    "portkit.foreign_layouts": 0,
    "portkit.plain_pickles": 0,
    "portkit.safetensors_header": 0,
    "portkit.shown": 0,
    "portkit.hub_answers": 1,
}
NO_FAMILY = ("google/gemma-3-270m", "llama2.c", "llama2c", "llama3", "llama.cpp", "llama_cpp")
"""An example, a file format, a rotary rule, a program: named after a family, and none."""
FOREIGN_FORMATS = {"portkit.importers", "portkit.gguf"}
FAMILY_IMPORTS = {"portkit.nn", "portkit.config", "portkit.weights", "portkit.architecture"}
SOURCES = sorted([*ROOT.glob("portkit/**/*.py"), *ROOT.glob("architectures/**/*.py")])


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def unit(module: str) -> str | None:
    """The row of the table that a module belongs to."""
    parts = module.split(".")
    return next((u for n in (2, 1) if (u := ".".join(parts[:n])) in FLOORS), None)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, those for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if _is_module(name) else node.module for name in deeper)


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_module_imports_only_from_lower_floors(path: Path) -> None:
    here = unit(module_name(path))
    if here is None:
        assert module_name(path) in {"portkit", "portkit.__main__"}, "a module without a floor"
        return
    for imported in imports(path):
        there = unit(imported)
        if there is not None and there != here:
            assert FLOORS[there] < FLOORS[here], f"{here} imports {imported}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("architectures/*.py")), ids=module_name)
def test_a_family_stands_on_the_leaves_alone(path: Path) -> None:
    """And on its own config, where that has a file to itself."""
    for imported in imports(path):
        if imported == f"{module_name(path)}_config":
            continue
        if imported.split(".")[0] in {"portkit", "architectures"}:
            assert unit(imported) in FAMILY_IMPORTS, imported
        assert imported.split(".")[0] != "transformers"


def test_two_files_know_the_reference() -> None:
    knowing = [
        module_name(p) for p in SOURCES if any(i.startswith("transformers") for i in imports(p))
    ]
    assert knowing == ["portkit.parity.pretrained", "portkit.parity.reference"]


def test_the_engine_names_no_family() -> None:
    """In prose it may; but no word of code. A foreign format is some family's."""
    for path in SOURCES:
        name = module_name(path)
        if not name.startswith("portkit") or unit(name) in FOREIGN_FORMATS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            word = node.id if isinstance(node, ast.Name) else getattr(node, "value", None)
            if isinstance(word, str) and "\n" not in word and " " not in word:
                word = word.lower()
                for allowed in NO_FAMILY:
                    word = word.replace(allowed, "")
                named = [f for f in ("llama", "qwen", "gemma") if f in word]
                assert not named, f"{name}, line {node.lineno}: {word!r}"


def test_the_installation_knows_every_family() -> None:
    """An editable install keeps the entry points it was made with."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        GROUP
    ]
    installed = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    missing = declared.items() - installed.items()
    assert not missing, f"renew the editable install: pip install -e . does not know {missing}"


def test_every_registered_family_loads_under_its_own_name() -> None:
    assert {"llama", "qwen3", "gemma3_text", "gemma3"} <= registered().keys()
    for model_type in registered():
        assert find(model_type).model_type == model_type
