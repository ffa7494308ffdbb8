"""`portkit generate --engine` and what stands behind it: the same text, whoever decodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import portkit
from parity_tests.generation.specimens import write_checkpoint
from portkit.bench.agreement import compare_tokens
from portkit.cli import main
from portkit.decoding import session as session_module
from portkit.decoding.fast import FastModel
from portkit.decoding.tracing import Untraceable
from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.importers.llama2c import import_llama2c
from portkit.loading import load

DEMO = Path(portkit.__file__).parent / "demo_checkpoint"


def portkit_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--json"])
    assert left.value.code == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        "llama3",
        "qwen3",
        "qwen3 moe",
        "llama4 scout",
        "cohere2 with biases",
        "gemma3n plain",
        "smollm3 sliding",
        "qwen2 yarn sliding",
        "mistral",
    ],
)
def test_engines_say_the_same(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, name)
    asked = ("generate", str(tmp_path), "-p", "Once", "--greedy", "--max-new-tokens", "50")
    readable = portkit_json(capsys, *asked, "--engine", "readable")
    assert len(readable["token_ids"]) == 50
    for options in (["--engine", "fast"], ["--engine", "auto"], ["--speculate"]):
        assert portkit_json(capsys, *asked, *options)["token_ids"] == readable["token_ids"]


def test_sampling_and_batches_too(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path, "gemma3")).model
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [13]]
    for options in (
        {"do_sample": True, "top_k": 7, "top_p": 0.9, "seed": 3},
        {"repetition_penalty": 1.3},
        {},
    ):
        settings = GenerationSettings(max_new_tokens=40, **options)
        readable = list(generate(model, prompts, settings, context_length=400))
        fast = list(generate(FastModel(model), prompts, settings, context_length=400))
        assert fast == readable


def test_a_thousand_tokens_of_the_demo_checkpoint() -> None:
    """In four stories to the end of its context, ends of stories do not end them."""
    loaded = load(DEMO, dtype="float32")
    settings = GenerationSettings(max_new_tokens=1000)
    length = loaded.config.max_position_embeddings
    fast, num_tokens = FastModel(loaded.model), 0
    for prompt in ([1, 2, 3], [2], [2, 300, 41], [2, 700]):
        readable = list(generate(loaded.model, [prompt], settings, context_length=length))
        assert list(generate(fast, [prompt], settings, context_length=length)) == readable
        num_tokens += len(readable)
    assert num_tokens > 1000


def test_in_bfloat16_only_a_close_call_falls_otherwise() -> None:
    """The stored dtype: equal until two logits lie within one step of each other."""
    loaded = load(DEMO)
    assert next(loaded.model.parameters()).dtype is torch.bfloat16
    settings = GenerationSettings(max_new_tokens=250)
    length = loaded.config.max_position_embeddings
    told = {
        name: [s.token_id for s in generate(model, [[1, 2, 3]], settings, context_length=length)]
        for name, model in (("readable", loaded.model), ("fast", FastModel(loaded.model)))
    }
    tokens = {name: [ids] for name, ids in told.items()}
    agreement = compare_tokens(loaded.model, [[1, 2, 3]], tokens, {})["fast"]
    assert agreement.same
    assert agreement.first_difference is None or agreement.first_difference["steps"] <= 1


def test_stories260k_tells_the_published_story(data_folder: Path, tmp_path: Path) -> None:
    source = data_folder / "weights" / "stories260K"
    import_llama2c(
        source / "stories260K.bin", tmp_path / "stories", tokenizer=source / "tok512.bin"
    )
    ids = json.loads((source / "golden_greedy200_ids.json").read_text())["ids"]
    model = FastModel(load(tmp_path / "stories").model)
    settings = GenerationSettings(max_new_tokens=len(ids) - 1)
    found = [s.token_id for s in generate(model, [ids[:1]], settings, context_length=512)]
    assert found == ids[1:]


def test_a_family_that_cannot_be_followed_is_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(write_checkpoint(tmp_path, "llama3")).model
    settings = GenerationSettings(max_new_tokens=12)
    readable = list(generate(model, [[4, 5]], settings, context_length=99))

    def fail(*_: object) -> None:
        raise Untraceable("a branch on a value")

    monkeypatch.setattr(session_module, "_Step", fail)
    said: list[str] = []
    fast = FastModel(model, say=said.append)
    assert list(generate(fast, [[4, 5]], settings, context_length=99)) == readable
    assert said == ["the fast path cannot follow this family's code (a branch on a value)"]


def test_nan_is_found_by_every_engine(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path, "llama3", torch.bfloat16)).model
    settings = GenerationSettings(max_new_tokens=12)
    steps = generate(FastModel(model), [[4, 5]], settings, context_length=99)
    next(steps)
    next(steps)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(portkit.PortkitError, match="logits are NaN"):
        list(steps)


def test_caches_beyond_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portkit.decoding.memory._available_bytes", lambda _: 1000)
    with pytest.raises(portkit.PortkitError, match=r"caches of 2 rows .* take fewer prompts"):
        FastModel(load(DEMO).model).start([[1], [2]], 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "fast", "--attention", "eager"], "--engine fast takes at most 32 prompts"),
        (["--engine", "fast", "--speculate"], "leave --engine fast out"),
        (["--speculate", "--sample"], "one prompt, decoded greedily"),
        (["--engine", "rapid"], "rapid"),
    ],
)
def test_what_does_not_go_together(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["generate", str(DEMO), "-p", "Once", *options])
    assert left.value.code == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1 or "rapid" in message


def test_an_interrupted_stream_ends_its_line() -> None:
    """Ctrl-C: exit 130, what was said stays, and the prompt comes on a line of its own."""
    code = (
        "import signal, sys; from portkit.cli import main; from portkit.decoding.session import "
        "Session; greedy = Session.greedy; count = []\n"
        "def counted(self, tokens):\n"
        "    count.append(1)\n"
        "    if len(count) == 5: signal.raise_signal(signal.SIGINT)\n"
        "    return greedy(self, tokens)\n"
        "Session.greedy = counted\n"
        # What a shell starts in the background ignores Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", str(DEMO), "-p", "Once", "--greedy", "--engine",
         "fast"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stdout.endswith("\n")
    assert done.stdout.strip()
    assert done.stderr == "portkit: error: interrupted\n"
