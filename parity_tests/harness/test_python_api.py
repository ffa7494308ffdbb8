"""Parity from Python, and in somebody's own test suite."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import portkit.parity
from parity_tests.conftest import CheckpointMaker
from portkit.cli import main
from portkit.errors import PortError, PortkitError, ProbeError
from portkit.loading import load
from portkit.parity.judging.judge import Verdict

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "portkit" / "demo_checkpoint"
EXAMPLE = ROOT / "docs" / "examples" / "somebodys_gemma.py"
PAIRS = EXAMPLE.with_suffix(".sites")


class Wrapped(nn.Module):
    """One of our models, called as a stranger's is. It shows its modules and records nothing."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.model, self.lm_head = inner, inner.model, inner.lm_head

    def forward(
        self, input_ids: Tensor, positions: Tensor, attention_mask: Tensor | None, cache: Any = None
    ) -> tuple[Tensor, Any]:
        cache = cache or self.inner.new_cache(len(input_ids), 200)
        logits = self.inner(input_ids, positions, cache, attention_mask)
        cache.advance(input_ids.shape[1])
        return logits, cache


@pytest.fixture(scope="module")
def qwen3(tiny_checkpoint: CheckpointMaker) -> Path:
    return tiny_checkpoint("qwen3 yarn tempered", torch.bfloat16)


def test_a_model_in_a_notebook(qwen3: Path, tmp_path: Path) -> None:
    model = Wrapped(load(qwen3).model)
    result = portkit.parity.compare(model, qwen3, probe="quick")
    assert (result.verdict, result.culprits, result.holds) == (Verdict.exact, (), True)
    assert {"model.layers.0.mlp", "model.layers.0.input_layernorm:in", "#logits"} <= set(
        result.comparisons[0].accounts
    )
    assert str(result).startswith(f"exact: {qwen3}, gate rounding\n")
    assert result._repr_html_().startswith("<pre>exact: ")
    assert result.report(tmp_path / "report") == tmp_path / "report" / "report.html"
    written = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert (written["verdict"], written["gate"], written["command"]) == (
        "exact",
        "rounding",
        "parity",
    )
    assert "<title>" in (tmp_path / "report" / "report.html").read_text()


def test_a_wrong_model_fails_with_the_place(qwen3: Path) -> None:
    model = Wrapped(load(qwen3).model)
    model.model.layers[0].input_layernorm.eps = 1.0001e-6
    with pytest.raises(AssertionError) as failure:
        portkit.parity.assert_parity(model, qwen3, probe="quick")
    assert "diverged: " in str(failure.value)
    assert "first culprit in bfloat16: model.layers.0.input_layernorm\n" in str(failure.value)


def test_our_own_model_that_somebody_changed(qwen3: Path) -> None:
    """Given as it is, and with a module less: that one is not verified, and not amiss."""
    model: Any = load(qwen3).model
    assert portkit.parity.compare(model, qwen3, probe="quick").verdict is Verdict.exact
    mlp, act = model.model.layers[0].mlp, nn.functional.silu
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left, right = nn.functional.linear(x, torch.cat((gate.weight, up.weight))).chunk(2, -1)
            return nn.functional.linear(act(left) * right, down.weight)  # type: ignore[no-any-return]

    model.model.layers[0].mlp = Other()
    result = portkit.parity.compare(model, qwen3, probe="quick")
    assert result.verdict is Verdict.exact
    assert "model.layers.*.mlp: gate_proj, act_fn, up_proj, down_proj" in [
        one.name for one in result.not_verified
    ]


def test_float32_says_that_care_was_not_seen(qwen3: Path) -> None:
    model = Wrapped(load(qwen3, dtype="float32").model)
    result = portkit.parity.compare(model, qwen3, probe=[5, 6, 7], gate="exact", threads=1)
    assert [one.dtype for one in result.comparisons] == ["float32"]
    assert result.verdict is Verdict.exact
    assert ("care in bfloat16", "the model was given in float32") in [
        (one.name, one.reason) for one in result.not_verified
    ]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"probe": "long"}, ProbeError, "choose one of default, quick, thorough"),
        ({"sites": "a = b"}, PortkitError, "the port has no module a"),
        ({"gates": "exact"}, TypeError, "unexpected keyword argument 'gates'"),
        ({"sites": "nowhere.sites"}, PortkitError, "nowhere.sites cannot be read"),
        ({"golden": "a.safetensors"}, PortError, "the recording is the reference"),
        ({"reference": "nowhere:load"}, PortError, "no module nowhere"),
    ],
)
def test_bad_options(
    options: dict[str, Any], error: type[Exception], said: str, qwen3: Path
) -> None:
    with pytest.raises(error, match=said):
        portkit.parity.compare(Wrapped(load(qwen3).model), qwen3, **options)


def test_help_reads_like_documentation() -> None:
    """Every option stands in the signature with its default, and in the text with what it is."""
    command = [sys.executable, "-c", "import portkit.parity; help(portkit.parity.compare)"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    signature, _, text = shown.partition("Hold a port against the reference, at every site")
    options = inspect.signature(portkit.parity.compare).parameters
    assert "faults: \"Literal['full', 'sampled', 'off']\" = 'off'" in signature
    for name, one in options.items():
        assert name in signature
        assert re.search(rf"^ *{name}( {{2,}}\S|$)", text, re.MULTILINE), name
        assert (one.default is one.empty) == (name in {"port", "repo"})
    assert max(map(len, text.splitlines())) <= 100
    asserting = inspect.signature(portkit.parity.assert_parity)
    assert asserting == inspect.signature(portkit.parity.compare)


def test_a_factory_is_asked_in_both_dtypes(qwen3: Path) -> None:
    def load_it(directory: Path, dtype: torch.dtype, device: torch.device) -> Wrapped:
        return Wrapped(load(directory, dtype=str(dtype)[6:], device=str(device)).model)

    result = portkit.parity.compare(load_it, qwen3, probe=[5, 6, 7], dtype=torch.float32)
    assert [one.dtype for one in result.comparisons] == ["float32", "bfloat16"]
    assert (result.verdict, result.first, result.causes) == (Verdict.exact, None, {})


def test_what_else_the_command_can_ask(qwen3: Path, tmp_path: Path) -> None:
    result = portkit.parity.compare(
        None, qwen3, probe="quick", backward=True, faults="sampled", reference_attention="eager"
    )
    assert result.gradients is not None
    assert result.teeth is not None
    assert result.gate == "exact"
    trace = tmp_path / "recorded.safetensors"
    with pytest.raises(SystemExit):
        main(["record", str(qwen3), "--quick", "--out", str(trace)])
    for asked in ({"golden": trace}, {"reference": str(trace)}):
        recorded: Any = portkit.parity.compare(None, qwen3, **asked)
        assert recorded.verdict is Verdict.exact
        assert recorded.notes[0].startswith("held against recorded.safetensors")


def test_decoding_from_python(qwen3: Path) -> None:
    found = portkit.parity.decode(qwen3, probe=[5, 6, 7, 8], dtype=torch.bfloat16)
    assert found.verdict in {Verdict.exact, Verdict.rounding}
    assert len(found.matrices) == 1


def test_the_first_culprit_and_its_cause(qwen3: Path) -> None:
    model = Wrapped(load(qwen3).model)
    model.model.layers[0].input_layernorm.eps = 1e-5
    result = portkit.parity.compare(model, qwen3, probe="quick")
    assert result.first is not None
    assert result.first.site == "model.layers.0.input_layernorm"
    assert result.causes[result.first.site].sentence in str(result)


def test_a_loaded_checkpoint_speaks() -> None:
    loaded = portkit.load(DEMO, dtype=torch.float32, device=torch.device("cpu"))
    assert next(loaded.model.parameters()).dtype is torch.float32
    ids = loaded.tokenizer.encode("Once upon a time")
    said = loaded.generate("Once upon a time", max_new_tokens=6, do_sample=False)
    went_on = loaded.tokenizer.encode(said, special=False)
    cache = loaded.model.new_cache(1, 40)
    for token in went_on[:3]:
        logits = loaded.model(torch.tensor([ids]), cache=cache)
        cache.advance(len(ids))
        assert int(logits[0, -1].argmax()) == token
        ids = [token]
    again = [loaded.generate("Once", max_new_tokens=6, temperature=1.5, seed=n) for n in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    with pytest.raises(PortkitError, match="temperature"):
        loaded.generate("Once", temperature=-1)


def test_what_is_no_port_is_refused(qwen3: Path) -> None:
    port: Any = {"a": 1}
    with pytest.raises(PortError, match="is no port"):
        portkit.parity.compare(port, qwen3)


SUITE = f"""
    import sys
    import portkit.parity

    sys.path.insert(0, {str(EXAMPLE.parent)!r})
    import somebodys_gemma
    import torch
    from pathlib import Path

    REPO, PAIRS = {str(DEMO)!r}, Path({str(PAIRS)!r})

    def port():
        return somebodys_gemma.load(Path(REPO), torch.bfloat16, torch.device("cpu"))

    def test_right(assert_parity):
        assert_parity(port(), REPO, probe="quick", sites=PAIRS)

    def test_wrong(assert_parity):
        model = port()
        model.blocks[2].attn.scale *= 1.01
        assert_parity(model, REPO, probe="quick", sites=PAIRS)

    def test_bad_pairs(assert_parity):
        assert_parity(port(), REPO, probe="quick", sites="bloks.{{layer}} = model.layers.{{layer}}")

    def test_plain_function():
        model = port()
        model.blocks[2].attn.scale *= 1.01
        portkit.parity.assert_parity(model, REPO, probe="quick", sites=PAIRS)
"""


def test_a_suite_of_somebodys_own(tmp_path: Path) -> None:
    (tmp_path / "test_port.py").write_text(dedent(SUITE))
    command = [sys.executable, "-m", "pytest", "-q", "--parity-report", "reports"]
    # Where pytest finds itself in a CI job, its summary repeats each message in full.
    environment = {key: one for key, one in os.environ.items() if key not in ("CI", "BUILD_NUMBER")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    out = done.stdout
    assert done.returncode == 1, out + done.stderr
    assert "3 failed, 1 passed" in out
    assert out.count("first culprit in bfloat16: model.layers.2.self_attn#context") == 2
    assert "portkit: site pairs: 'bloks.{layer} = model.layers.{layer}': the port has no" in out
    assert "near: blocks.{layer}" in out
    # Of the fixture's failures the report alone is shown, and no line of the harness of either's.
    assert "api.py" not in out
    assert "pytest_plugin.py" not in out
    folders = sorted(path.name for path in (tmp_path / "reports").iterdir())
    assert folders == ["test_port.py-test_right", "test_port.py-test_wrong"]
    page = tmp_path / "reports" / "test_port.py-test_wrong" / "report.html"
    assert f"report: {page.relative_to(tmp_path)}" in out
    assert "model.layers.2.self_attn#context" in page.read_text()


def test_the_plugin_costs_a_suite_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_light.py").write_text(
        "import sys\n"
        "def test_light():\n"
        "    assert 'portkit.parity.pytest_plugin' in sys.modules\n"
        "    assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stdout


def test_a_compiler_sees_nothing_of_record() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def port(x: Tensor) -> Tensor:
        return portkit.parity.record("#query", x * 2) + 1

    assert torch.equal(port(torch.ones(3)), torch.full((3,), 3.0))


def test_record_alone_loads_nothing_else() -> None:
    code = (
        "import sys\nfrom portkit.parity import record\nx = object()\n"
        "assert record('#query', x) is x\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
