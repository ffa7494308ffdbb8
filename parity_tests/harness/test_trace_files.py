"""Traces: what `portkit record` writes, what `portkit diff` says of two, and what is no trace."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from parity_tests.conftest import CheckpointMaker
from parity_tests.faults.planted.planting import replace_forward
from parity_tests.harness.conftest import Recorder, Run
from portkit import loading
from portkit.parity.subject.discovery import sites_of
from portkit.parity.traces.trace_file import KEY, TraceFile

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.bfloat16, torch.float32]
Described = dict[str, Any]
Tensors = dict[str, Tensor]


def parts(path: Path) -> tuple[Tensors, Described]:
    """Tensors and description of a trace."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()[KEY])


def written(path: Path, tensors: Tensors, described: object) -> Path:
    save_file(tensors, path, metadata={KEY: json.dumps(described)})
    return path


# -- what is recorded ----------------------------------------------------------------------------


def shown_by_ours(trace: TraceFile) -> list[str]:
    """The sites of a recording but for what our ports do not show: activations, which are no
    modules there, and the eager kernel's weights.
    """
    return [name for name in trace.sites if ".act_fn" not in name and ":out." not in name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_trace_says_what_ran_and_how(
    dtype: torch.dtype, recorded: Recorder, tiny_checkpoint: CheckpointMaker
) -> None:
    path = recorded("gemma3 shallow", dtype)
    trace = TraceFile(path)
    word = str(dtype).removeprefix("torch.")
    said = trace.provenance
    assert (said.engine, said.dtype, said.attention) == ("transformers", word, "sdpa")
    assert (said.device, said.threads, said.cache) == ("cpu", 1, "DynamicCache")
    assert said.model == tiny_checkpoint("gemma3 shallow", dtype).name
    assert said.versions["torch"] == torch.__version__
    assert (trace.is_whole, trace.has_inputs, trace.last_tokens) == (True, False, None)
    assert [one.name for one in trace.probe][:3] == ["short", "long", "prompt"]
    assert trace.probe.is_complete
    known = sites_of(loading.load(tiny_checkpoint("gemma3 shallow", dtype)).model)
    own = {name: trace.sites[name] for name in shown_by_ours(trace)}
    assert {name: known.dims(name) for name in own} == own
    assert trace.sites["model.layers.0.self_attn#context"] == "batch position head channel"
    order = list(trace.sites)
    assert order[0] == "model.embed_tokens"
    assert order[-2:] == ["lm_head", "#logits"]
    assert order.index("model.layers.1.mlp") < order.index("model.layers.2.self_attn#query")
    padded = next(one for one in trace.probe if one.name == "padded")
    assert trace.read(padded, "model.layers.0.mlp").dtype == dtype
    assert trace.read(padded, "model.layers.0.self_attn#mask").dtype == torch.bool


def test_floors_are_those_of_a_proof(recorded: Recorder, tiny_checkpoint: CheckpointMaker) -> None:
    """Measured by the recorder as by parity, and what is carried is more than what is made."""
    from parity_tests.harness.test_known_answers import run as compared

    trace = TraceFile(recorded("gemma3 shallow", torch.bfloat16))
    assert trace.floors is not None
    shown = set(shown_by_ours(trace))
    floors = {site: floor for site, floor in trace.floors.items() if site in shown}
    proof = compared(loading.load(tiny_checkpoint("gemma3 shallow", torch.bfloat16)))
    proven = {one.site: one.floor for one in proof.judgements if one.floor is not None}
    for site, floor in floors.items():
        if site not in {"#logits", "model"}:  # what holds the layers has no block of its own
            assert floor.rms == pytest.approx(proven[site], rel=1e-5)
            assert floor.channels is not None
            assert len(floor.channels) > 1
            assert floor.carried is not None
    assert "model.layers.0.self_attn#mask" not in floors
    deep, shallow = floors["model.layers.3"], floors["model.layers.0"]
    assert deep.carried > 2 * deep.rms  # type: ignore[operator]
    assert deep.carried > shallow.carried  # type: ignore[operator]
    assert floors["#logits"].rms is None
    assert floors["#logits"].carried == pytest.approx(floors["lm_head"].carried)


def test_what_is_kept_can_be_chosen(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, run: Run
) -> None:
    folder = tiny_checkpoint("gemma3 shallow", torch.bfloat16)
    base = ["record", folder, "--quick", "--no-floors", "--json", "-o"]
    sizes = {}
    for name, options in {
        "all": [],
        "last": ["--last-tokens", "1"],
        "some": ["--sites", "model.layers.*.mlp", "--sites", "*#context"],
        "inputs": ["--inputs"],
        "layer": ["--layers", "1", "--inputs"],
    }.items():
        path = tmp_path / name
        code, out, err = run(*base, path, *options)
        printed = json.loads(out)
        assert code == 0
        assert printed["bytes"] == path.stat().st_size
        assert err.startswith(f"{path}: about ")
        data = sum(tensor.nbytes for tensor in parts(path)[0].values())
        assert 0.95 * data < printed["expected_bytes"] < 1.3 * data
        assert printed["floors"] is False
        sizes[name] = TraceFile(path)
    assert {one.num_tokens for one in sizes["all"].probe} == {1, 12}
    one = sizes["last"].probe.passes[0]
    assert sizes["last"].shape(one, "model.layers.2") == (2, 1, 320)
    assert sizes["last"].shape(one, "model.layers.2.self_attn#mask") == (1, 1, 1, 12)
    assert torch.equal(
        sizes["last"].read(one, "model.layers.2"), sizes["all"].read(one, "model.layers.2")[:, -1:]
    )
    assert sorted(sizes["some"].sites) == sorted(
        f"model.layers.{n}{part}" for n in range(4) for part in (".mlp", ".self_attn#context")
    )
    assert not sizes["some"].is_whole
    assert "model.layers.3.mlp:in" in sizes["inputs"].sites
    assert all(site.startswith("model.layers.1") for site in sizes["layer"].sites)


def test_a_trace_is_written_whole_or_not_at_all(
    tiny_checkpoint: CheckpointMaker, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("gemma3 shallow", torch.bfloat16)
    out = tmp_path / "trace"
    out.write_text("of before")
    code, _, err = run("record", folder, "--quick", "--sites", "nothing.*", "-o", out)
    assert (code, "no site matches nothing.*" in err) == (2, True)
    monkeypatch.setattr(TraceFile, "__init__", lambda *_: None)
    code, _, err = run("record", folder, "--quick", "-o", tmp_path / "no" / "folder")
    assert (code, "cannot be written: No such file" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]
    assert out.read_text() == "of before"


# -- two traces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda one: one.name)
def test_a_recording_that_is_ended_leaves_nothing(
    number: signal.Signals, tiny_checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    """The bytes that wait for their order have no name: not even a kill leaves them."""
    code = (
        "import os, sys; from portkit.cli import main\n"
        "from portkit.parity.traces.trace_writer import TraceWriter\n"
        "add = TraceWriter.add\n"
        "def ended(self, name, tensor):\n"
        "    add(self, name, tensor)\n"
        f"    if len(self._entries) == 5: os.kill(os.getpid(), {number.value})\n"
        "TraceWriter.add = ended\n"
        "main(sys.argv[1:])"
    )
    target = tmp_path / "traces" / "trace.safetensors"
    target.parent.mkdir()
    asked = ("record", str(tiny_checkpoint("llama3")), "-o", str(target), "--engine", "portkit")
    done = subprocess.run(
        [sys.executable, "-c", code, *asked], capture_output=True, text=True, check=False
    )
    assert done.returncode == (130 if number == signal.SIGTERM else -number), done.stderr
    assert ("portkit: error: interrupted" in done.stderr) is (number == signal.SIGTERM)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_port_is_exact_and_another_kernel_is_rounding(
    dtype: torch.dtype, recorded: Recorder, run: Run
) -> None:
    reference = recorded("gemma3 shallow", dtype)
    port = recorded("gemma3 shallow", dtype, "--engine", "portkit", "--no-floors")
    code, out, _ = run("diff", reference, port, "--gate", "exact", "--json")
    printed = json.loads(out)
    assert (code, printed["verdict"], printed["first"]) == (0, "exact", None)
    assert printed["exact"] == printed["sites"] == len(shown_by_ours(TraceFile(reference)))
    assert printed["only"][1] == []
    assert all(name.endswith(".act_fn") for name in printed["only"][0])
    assert printed["first_difference"] is None

    other = recorded(
        "gemma3 shallow", dtype, "--engine", "portkit", "--attention", "eager", "--no-floors"
    )
    for first, second in ((reference, other), (other, reference)):
        code, out, _ = run("diff", first, second, "--json")
        printed = json.loads(out)
        assert (code, printed["verdict"], printed["culprits"]) == (0, "rounding", [])
        assert printed["first_difference"] == "model.layers.0.self_attn#context"
        assert "mistakes smaller than what rounding carries" in [
            one["name"] for one in printed["not_verified"]
        ]
    assert run("diff", reference, other, "--gate", "exact")[0] == 1


def _query_scaled(model: Any) -> str:
    norm = model.model.layers[3].self_attn.q_norm
    replace_forward(norm, lambda own, x: own(x) * 1.01)
    return "model.layers.3.self_attn.q_norm"


def _residual_lost(model: Any) -> str:
    """The input of the norm is not recorded: what is made of it differs first."""
    layer = model.model.layers[3]

    def forward(_: Any, h: Tensor, *args: Any) -> Tensor:
        h = layer.post_attention_layernorm(layer.self_attn(layer.input_layernorm(h), *args))
        return h + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h)))

    replace_forward(layer, forward)
    return "model.layers.3.pre_feedforward_layernorm"


@pytest.mark.parametrize("plant", [_query_scaled, _residual_lost])
def test_a_fault_is_placed_where_nothing_was_carried_yet(
    plant: Callable[[Any], str],
    recorded: Recorder,
    tiny_checkpoint: CheckpointMaker,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, sites = loading.materialize, []

    def planted(*args: Any) -> Any:
        loaded = own(*args)
        sites.append(plant(loaded.model))
        return loaded

    monkeypatch.setattr("portkit.parity.traces.recording.materialize", planted)
    folder = tiny_checkpoint("gemma3 shallow", torch.bfloat16)
    wrong = tmp_path / "wrong"
    assert run("record", folder, "--engine", "portkit", "--no-floors", "-o", wrong)[0] == 0
    code, out, _ = run("diff", recorded("gemma3 shallow", torch.bfloat16), wrong, "--json")
    printed = json.loads(out)
    assert (code, printed["verdict"]) == (1, "diverged")
    (first,) = printed["culprits"]
    assert printed["first"] == first
    assert first["site"] == printed["first_difference"] == sites[0]
    assert first["carried_error"] > 2.25 * first["floor"]
    assert first["local_error"] is None
    code, out, _ = run("diff", recorded("gemma3 shallow", torch.bfloat16), wrong)
    assert code == 1
    assert f"the first site that differs is {first['site']}\n" in out


def test_last_tokens_are_held_against_all(
    recorded: Recorder, tiny_checkpoint: CheckpointMaker, tmp_path: Path, run: Run
) -> None:
    last = tmp_path / "last"
    folder = tiny_checkpoint("gemma3 shallow", torch.bfloat16)
    options = "--engine", "portkit", "--no-floors", "--last-tokens", "2"
    assert run("record", folder, *options, "-o", last)[0] == 0
    code, out, _ = run("diff", recorded("gemma3 shallow", torch.bfloat16), last, "--json")
    printed = json.loads(out)
    assert (code, printed["verdict"]) == (0, "exact")
    assert "all but the last tokens" in [one["name"] for one in printed["not_verified"]]


def test_dtypes_are_compared_in_float64(recorded: Recorder, tmp_path: Path, run: Run) -> None:
    path = recorded("gemma3 shallow", torch.bfloat16)
    tensors, described = parts(path)
    wide = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    other = written(tmp_path / "wide", wide, {**described, "dtype": "float32", "floors": None})
    code, out, _ = run("diff", path, other, "--gate", "exact", "--json")
    printed = json.loads(out)
    assert (code, printed["verdict"]) == (0, "exact")
    assert "bfloat16 and float32 are compared in float64" in printed["notes"]
    name = "long/model.layers.1.mlp"
    wide[name] = wide[name] * (1 + 1e-6)
    written(other, wide, described)
    code, out, _ = run("diff", path, other, "--json")
    assert json.loads(out)["first_difference"] == "model.layers.1.mlp"


def test_without_floors_a_difference_is_inconclusive(
    recorded: Recorder, tmp_path: Path, run: Run
) -> None:
    tensors, described = parts(recorded("gemma3 shallow", torch.bfloat16))
    described["floors"] = None
    first = written(tmp_path / "first", tensors, described)
    tensors["far/model.layers.2.mlp"][0, 3, 17] += 1.0
    second = written(tmp_path / "second", tensors, described)
    code, out, _ = run("diff", first, second, "--json")
    printed = json.loads(out)
    assert (code, printed["verdict"], printed["culprits"]) == (3, "inconclusive", [])
    assert printed["first_difference"] == "model.layers.2.mlp"
    reasons = {one["name"]: one["reason"] for one in printed["not_verified"]}
    assert reasons["whether rounding explains the differences"].startswith(
        "neither trace has floors"
    )


def test_words_of_a_trace_are_printable_wherever_they_come(
    recorded: Recorder, tmp_path: Path, run: Run
) -> None:
    nasty = "x\x1b[2J\nexact: forged\r\u202e\x9b1m\u2028\ufffe\ud800"
    spelled = r"x\x1b[2J\nexact: forged\r\u202e\x9b1m\u2028\ufffe\ud800"
    sound = recorded("gemma3 shallow", torch.bfloat16)
    tensors, described = parts(sound)
    described |= dict.fromkeys(("model", "engine", "revision", "experts", "cache", "cast"), nasty)
    described["versions"] = {nasty: nasty}
    foreign = written(tmp_path / "foreign", tensors, described)
    code, plain, _ = run("diff", sound, sound)
    assert code == 0
    code, out, _ = run("diff", sound, foreign)
    assert (code, out.count("\n")) == (0, plain.count("\n"))
    assert all(line.isprintable() for line in out.split("\n"))
    assert f"  B: {spelled} by {spelled} in bfloat16\n" in out
    code, out, _ = run("diff", sound, foreign, "--json")
    assert code == 0
    assert out.removesuffix("\n").isprintable()
    told = json.loads(out)["traces"][1]
    exact = nasty.replace("\ud800", r"\ud800")
    assert (told["model"], told["engine"], told["versions"]) == (exact, exact, {exact: exact})


def test_what_only_one_has_is_listed(recorded: Recorder, tmp_path: Path, run: Run) -> None:
    path = recorded("gemma3 shallow", torch.bfloat16)
    tensors, described = parts(path)
    described["sites"] = [one for one in described["sites"] if ".mlp.gate" not in one["name"]]
    described["passes"] = [one for one in described["passes"] if one["name"] != "far"]
    kept = {one["name"] for one in described["sites"]}
    described["floors"] = None
    fewer = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("far/") and name.partition("/")[2] in kept
    }
    code, out, _ = run("diff", path, written(tmp_path / "fewer", fewer, described), "--json")
    printed = json.loads(out)
    assert (code, printed["verdict"]) == (0, "exact")
    assert printed["only"] == [[f"model.layers.{n}.mlp.gate_proj" for n in range(4)], []]
    named = [one["name"] for one in printed["not_verified"]]
    assert "passes far (1)" in named
    assert any("(4)" in one and "gate_proj" in one for one in named)


@pytest.mark.parametrize(
    ("change", "kind", "site"),
    [
        ("nan", "function", "model.layers.1.mlp"),
        ("mask", "function", "model.layers.1.self_attn#mask"),
        ("shape", "shape", "model.layers.1.mlp"),
        ("dims", "shape", "model.layers.1.self_attn#context"),
    ],
)
def test_what_no_rounding_explains(
    change: str, kind: str, site: str, recorded: Recorder, tmp_path: Path, run: Run
) -> None:
    path = recorded("gemma3 shallow", torch.bfloat16)
    tensors, described = parts(path)
    described["floors"] = None
    name = f"long/{site}"
    if change == "nan":
        tensors[name][0, 5, 3] = torch.nan
    elif change == "mask":
        tensors[name][0, 0, 7, 7] = False
    elif change == "shape":
        tensors[name] = tensors[name][..., :-1].contiguous()
    else:
        entry = next(one for one in described["sites"] if one["name"] == site)
        entry["dims"] = "batch position channel head"
    code, out, _ = run("diff", path, written(tmp_path / "changed", tensors, described), "--json")
    first = json.loads(out)["first"]
    assert (code, first["site"], first["kind"]) == (1, site, kind)


# -- a trace by NumPy alone ----------------------------------------------------------------------

BLOCKED = ("torch", "portkit", "transformers", "jax")


@pytest.mark.parametrize("fault", ["none", "query scaled"])
def test_numpy_alone_writes_a_trace(
    fault: str, tiny_checkpoint: CheckpointMaker, tmp_path: Path, run: Run
) -> None:
    """The lines of docs/traces.md, around a model in NumPy; nothing of ours is imported there."""
    folder = tiny_checkpoint("llama plain heads")
    document = (ROOT / "docs" / "traces.md").read_text(encoding="utf-8")
    lines = re.findall(r"^```python\n(.*?)^```$", document, flags=re.MULTILINE | re.DOTALL)[0]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 15
    (tmp_path / "tracing.py").write_text(lines)
    program = (ROOT / "parity_tests" / "harness" / "numpy_llama.py").read_text()
    block = f"import sys\nfor one in {BLOCKED}: sys.modules[one] = None\n"
    (tmp_path / "program.py").write_text(block + program)
    theirs = tmp_path / "numpy.safetensors"
    subprocess.run(
        [sys.executable, "program.py", str(folder), str(theirs), fault], cwd=tmp_path, check=True
    )
    probe = {"name": "mine", "passes": parts(theirs)[1]["passes"]}
    (tmp_path / "probe.json").write_text(json.dumps(probe))
    ours = tmp_path / "reference.safetensors"
    assert run("record", folder, "--tokens", tmp_path / "probe.json", "-o", ours)[0] == 0
    code, out, _ = run("diff", ours, theirs, "--json")
    printed = json.loads(out)
    unshown = [f"model.layers.{n}.mlp.act_fn" for n in range(3)]
    assert printed["only"] == [[*unshown, "model"], []]
    assert printed["traces"][1]["engine"] == "numpy"
    if fault == "none":
        assert (code, printed["verdict"], printed["culprits"]) == (0, "rounding", [])
        return
    assert (code, printed["verdict"]) == (1, "diverged")
    assert printed["first"]["site"] == "model.layers.0.self_attn#query"
    assert printed["first"]["carried_error"] == pytest.approx(0.01, rel=0.01)
