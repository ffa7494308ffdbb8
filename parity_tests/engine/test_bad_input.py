"""Bad input: one table, one test. Each row gets its exit code and one line that helps.

The rows are in `bad_weights`, `bad_configs`, `bad_layers`, `bad_layouts` and `bad_surroundings`.
Behind the table: the sound neighbours of some rows, damage at random, and what is not the input's
fault.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from parity_tests.engine.bad_configs import (
    CONFIG_FILE,
    CONFIG_VALUES,
    required_field_cases,
    required_fields,
)
from parity_tests.engine.bad_layers import FAMILY_VALUES
from parity_tests.engine.bad_layouts import CLASSIFIER_BY_NAME, LAYOUTS
from parity_tests.engine.bad_surroundings import EXPORTS, SURROUNDINGS
from parity_tests.engine.bad_weights import FILES, GATE, PICKLES, SHARDED, TENSORS
from parity_tests.engine.damage import (
    CONFIGS,
    GONE,
    PICKLE,
    SHARDS,
    WEIGHTS,
    Case,
    Damage,
    config,
    join_header,
    link,
    nothing,
    pickle,
    pickled,
    put,
    rename,
    several,
    shard_map,
    sharded,
    split_header,
    tensors,
    write_checkpoint,
)
from parity_tests.engine.hub_server import NOWHERE, environment
from portkit import exporting
from portkit.cli import main
from portkit.errors import PortkitError
from portkit.loading import load
from portkit.registry import registered

Maker = Callable[[str], Path]


CASES = [
    *FILES,
    *TENSORS,
    *SHARDED,
    *PICKLES,
    *CONFIG_FILE,
    *CONFIG_VALUES,
    *FAMILY_VALUES,
    *LAYOUTS,
    *required_field_cases(),
    *SURROUNDINGS,
    *EXPORTS,
]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """`sound(base)`: the folder of an undamaged checkpoint, made once and not to be changed."""
    made: dict[str, Path] = {}

    def make(base: str) -> Path:
        if base not in made:
            made[base] = tmp_path_factory.mktemp(base) / "checkpoint"
            write_checkpoint(made[base], CONFIGS[base if base in CONFIGS else "llama"])
            {"sharded": sharded, "pickled": pickled}.get(base, nothing)(made[base])
        return made[base]

    return make


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str, str]]:
    """`run(*arguments)`: exit code, stdout and stderr of portkit in this process."""

    def call(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        return exit_.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.base}: {case.name}")
def test_bad_input(
    case: Case, sound: Maker, tmp_path: Path, run: Callable[..., tuple[object, str, str]]
) -> None:
    if case.needs_proc and not Path("/proc/self/mem").exists():
        pytest.skip("no /proc here")
    folder = tmp_path / "checkpoint"
    shutil.copytree(sound(case.base), folder)
    case.damage(folder)
    before = listing(tmp_path)
    places = {"folder": folder, "parent": tmp_path}
    arguments = [argument.format(**places) for argument in case.arguments]
    if case.hub is None and not case.disk_is_small:
        code, out, err = run(*arguments)
    else:
        code, out, err = run_process(case, arguments, tmp_path / "home")
    assert (code, out) == (case.code, ""), err
    assert err.startswith("portkit: error: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    for word in case.words:
        assert word.replace("{folder}", str(folder)).replace("{parent}", str(tmp_path)) in err
    assert listing(tmp_path) == before


def run_process(case: Case, arguments: list[str], home: Path) -> tuple[int, str, str]:
    """`python -m portkit` as a person runs it, with the surroundings that the case asks for."""
    small_disk = ["sh", "-c", 'ulimit -f 16; exec "$@"', "sh"]  # blocks of 512 or 1024 bytes
    done = subprocess.run(
        [*(small_disk if case.disk_is_small else []), sys.executable, "-m", "portkit", *arguments],
        env=environment(NOWHERE, home, **(case.hub or {})),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def listing(parent: Path) -> dict[str, object]:
    """Everything below a folder, with its content."""
    return {
        str(path.relative_to(parent)): path.readlink()
        if path.is_symlink()
        else path.is_file() and path.read_bytes()
        for path in parent.rglob("*")
    }


def test_every_family_is_in_the_table() -> None:
    """A family that was added must be added here: its required fields then follow."""
    assert set(CONFIGS) == set(registered())
    for model_type in CONFIGS:
        keys = {path.rpartition(".")[2] for path in required_fields(model_type)}
        assert {"hidden_size", "intermediate_size", "num_hidden_layers"} <= keys


def into_subfolder(folder: Path) -> None:
    held = load_file(folder / SHARDS[0])
    rename(SHARDS[0], f"part/{SHARDS[0]}")(folder)
    shard_map(dict.fromkeys(held, f"part/{SHARDS[0]}"))(folder)


def pickled_in_shards(folder: Path) -> None:
    index = {"weight_map": dict.fromkeys(torch.load(folder / PICKLE), "part.bin")}
    rename(PICKLE, "part.bin")(folder)
    put(f"{PICKLE}.index.json", index)(folder)


CHECK, TRUST = ("--check",), ("--allow-pickle", "--check")
LINKED = several(rename(SHARDS[0], "../blob"), link(SHARDS[0], "../blob"))
OLD = pickle(dict, _use_new_zipfile_serialization=False)
NULLS = config({"rope_parameters": None, "rope_theta": None, "quantization_config": None})
UNKNOWN = config({"attention_multiplier": 0.5})
EXOTIC = tensors({"vision_tower.a": torch.ones(3).to(torch.float8_e4m3fn)})
NEIGHBOURS: dict[str, tuple[str, Damage, tuple[str, ...]]] = {
    **{model_type: (model_type, nothing, CHECK) for model_type in CONFIGS},
    "shards": ("sharded", nothing, CHECK),
    "a shard that is a link out of the folder": ("sharded", LINKED, CHECK),
    "a shard in a subfolder": ("sharded", into_subfolder, CHECK),
    "a tensor that the index lists elsewhere": ("sharded", shard_map({GATE: SHARDS[0]}), CHECK),
    "a tensor that the index does not list": ("sharded", shard_map({GATE: GONE}), CHECK),
    "an index that lists what no shard has": ("sharded", shard_map({"extra": SHARDS[1]}), CHECK),
    "a classifier by name alone": ("llama", CLASSIFIER_BY_NAME, CHECK),
    "a pickle that is allowed": ("pickled", nothing, TRUST),
    "a pickle of before torch 1.6": ("pickled", OLD, TRUST),
    "a pickle in shards": ("pickled", pickled_in_shards, TRUST),
    "keys that are null": ("llama", NULLS, CHECK),
    "an ignored key": ("llama", UNKNOWN, ("--ignore-config", "attention_multiplier")),
    "a dropped tensor of a dtype that is not loaded": ("gemma3", EXOTIC, CHECK),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_sound_neighbours(
    name: str, sound: Maker, tmp_path: Path, run: Callable[..., tuple[object, str, str]]
) -> None:
    """What looks like a row of the table and is none loads, bit for bit, and exports."""
    base, damage, options = NEIGHBOURS[name]
    folder = tmp_path / "checkpoint"
    shutil.copytree(sound(base), folder)
    damage(folder)
    code, _, err = run("load", str(folder), *options, "--export", str(tmp_path / "new" / "copy"))
    assert (code, err) == (0, "")
    original = load_file(sound(base if base in CONFIGS else "llama") / WEIGHTS)
    exported = load_file(tmp_path / "new" / "copy" / WEIGHTS)
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], tensor) for key, tensor in original.items())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["copy"]


JUNK: list[object] = [None, True, -1, 0, 3, 2**70, 0.5, float("inf"), "", "\ud800", [], [[]], {}]


def spoil_value(draw: random.Random, raw: bytes) -> bytes:
    """Put junk in the place of one value of a JSON text, however deep."""
    whole = json.loads(raw)
    places: list[tuple[Any, Any]] = []
    sections = [whole]
    for section in sections:
        pairs = section.items() if isinstance(section, dict) else enumerate(section)
        for key, value in pairs:
            places.append((section, key))
            if isinstance(value, dict | list):
                sections.append(value)
    section, key = draw.choice(places)
    section[key] = draw.choice(JUNK)
    return json.dumps(whole).encode()


def spoil_bytes(draw: random.Random, raw: bytes) -> bytes:
    """Flip a bit, cut some bytes out, or cut the end off."""
    start = draw.randrange(len(raw))
    flipped = raw[start] ^ 1 << draw.randrange(8)
    return draw.choice(
        [
            raw[:start] + bytes([flipped]) + raw[start + 1 :],
            raw[:start] + raw[start + draw.randrange(1, 9) :],
            raw[:start],
        ]
    )


def spoil(draw: random.Random, name: str, content: bytes) -> bytes:
    """One spoiling of a file; of a safetensors file, of its header."""
    if name.endswith(".json"):
        return draw.choice([spoil_value, spoil_bytes])(draw, content)
    header, data = split_header(content)
    if draw.random() < 0.5:
        return join_header(spoil_value(draw, header), data)
    return spoil_bytes(draw, content[: 8 + len(header)]) + data


@pytest.mark.parametrize("base", ["llama", "sharded"])
def test_damage_at_random(base: str, sound: Maker, tmp_path: Path) -> None:
    """Whatever is wrong is refused with an answer; what loads all the same is what it was."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(sound(base), folder)
    original = load_file(sound("llama") / WEIGHTS)
    draw, outcomes = random.Random(0), Counter[int]()
    for _ in range(150):
        name = draw.choice(sorted(path.name for path in folder.iterdir()))
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(spoil(draw, name, content))
        try:
            held = dict(load(folder).model.named_parameters())
        except PortkitError as error:
            outcomes[error.exit_code] += 1
        else:
            outcomes[0] += 1
            assert all(torch.equal(held[key], tensor) for key, tensor in original.items())
        (folder / name).write_bytes(content)
    assert outcomes.keys() <= {0, 1, 2}
    assert outcomes[2] > 75, outcomes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_interrupted(
    number: signal.Signals,
    sound: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., tuple[object, str, str]],
) -> None:
    """Ctrl-C or SIGTERM in the middle of an export: no traceback, and nothing half-written."""

    def interrupt(folder: Path, *_: object) -> None:
        (folder / WEIGHTS).write_bytes(b"half")
        signal.raise_signal(number)

    monkeypatch.setattr(exporting, "write_weights", interrupt)
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    # What a shell starts in the background ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    target = tmp_path / "new" / "copy"
    try:
        code, out, err = run("load", str(sound("llama")), "--export", str(target))
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert (code, out) == (130, "")
    assert len(err.splitlines()) <= 1
    assert listing(tmp_path) == {}


def test_our_own_fault(
    sound: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., tuple[object, str, str]],
) -> None:
    """What is nobody's input is said in one line that names the file with the traceback."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(exporting, "write_weights", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, out, err = run("load", str(sound("llama")), "--export", str(tmp_path / "new" / "copy"))
    assert (code, out) == (70, "")
    (kept,) = tmp_path.iterdir()
    assert err == (
        "portkit: error: this is a fault of portkit itself (ZeroDivisionError: two lines); "
        f"the traceback is in {kept}\n"
    )
    assert 'raise ZeroDivisionError("two\\nlines")' in kept.read_text()
