"""A run from text to a folder that loads; stopped, resumed, and refused where it must be."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from parity_tests.training.conftest import RECIPE, Write, recipe, same_weights, story, weights
from portkit.errors import DataError, InvalidConfig, PortkitError, TokenizerError, TrainingError
from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.loading import load
from portkit.parity.reference import load_reference
from portkit.tokenizer import Tokenizer
from portkit.training import journal
from portkit.training.lock import only_one
from portkit.training.recipe import Habits, OptimizerName, Precision, Recipe
from portkit.training.run import Inputs, train
from portkit.training.schedule import Shape
from portkit.training.tokens import TokenFile

HABITS = Habits(eval_every=4, save_every=5, keep=2)
ROOT = Path(__file__).resolve().parents[2]


def stop_at(step: int) -> Callable[[Mapping[str, Any]], None]:
    def watch(record: Mapping[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return watch


def test_the_result_loads_everywhere(inputs: Inputs, tmp_path: Path) -> None:
    outcome = train(inputs, recipe(steps=40), tmp_path / "run", HABITS)
    first = journal.series(journal.read_lines(tmp_path / "run"), "step", "loss")[0][1]
    assert outcome.evaluation.nats_per_token < first / 2
    loaded = load(outcome.model, device="cpu")
    assert loaded.report.parameters == outcome.num_parameters
    assert str(loaded.model.get_parameter("model.norm.weight").dtype) == "torch.float32"
    reference = load_reference(outcome.model, torch.float32)
    tokenizer = Tokenizer.open(loaded.files)
    ids = torch.tensor([tokenizer.encode(story(1))])
    with torch.no_grad():
        ours, theirs = loaded.model(ids), reference.model(input_ids=ids).logits
    assert torch.equal(ours, theirs)
    settings = GenerationSettings.read(loaded.files).override(max_new_tokens=9)
    steps = generate(loaded.model, [ids[0, :5].tolist()], settings, context_length=64)
    assert len(list(steps)) == 9


def test_the_evaluation_is_the_published_models(inputs: Inputs, tmp_path: Path) -> None:
    """Nats per token from the folder and the held-out documents; bits per byte from its bytes."""
    run = tmp_path / "run"
    outcome = train(inputs, recipe(context=60), run, HABITS)
    model = load(outcome.model, device="cpu").model
    file = TokenFile(run / "data" / "held-out.tokens")
    ids = torch.from_numpy(file.ids.astype("int64"))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 60):
            part = ids[start : start + 61]
            logits = model(part[None, :-1])[0].double()
            nats += torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum").item()
    assert outcome.evaluation.num_tokens == len(ids) - 1
    assert outcome.evaluation.nats_per_token == pytest.approx(nats / (len(ids) - 1), rel=1e-6)
    tokenizer = Tokenizer.open(load(outcome.model).files)
    num_bytes = len(tokenizer.decode(ids.tolist()).encode())
    expected = nats / torch.log(torch.tensor(2.0, dtype=torch.float64)).item() / num_bytes
    assert outcome.evaluation.bits_per_byte == pytest.approx(expected, rel=1e-6)


def test_the_published_dtype(inputs: Inputs, tmp_path: Path) -> None:
    train(replace(inputs, dtype="bfloat16"), recipe(steps=3, warmup_steps=0), tmp_path / "run")
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("stops", "changed"),
    [
        ((3, 5, 8), {}),
        ((7,), {"optimizer": OptimizerName.muon, "schedule": Shape.trapezoid, "decay_steps": 4}),
        (
            (7,),
            {"precision": Precision.bfloat16, "accumulation": 2, "activation_checkpointing": True},
        ),
    ],
    ids=["adamw", "muon", "bfloat16"],
)
def test_stopped_and_resumed_is_straight_through(
    stops: tuple[int, ...], changed: dict[str, Any], inputs: Inputs, tmp_path: Path
) -> None:
    """Stopped by SIGTERM, saved each time; weights equal in every bit."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    told = recipe(**changed)
    train(inputs, told, straight, HABITS)
    for step in stops:
        with pytest.raises(KeyboardInterrupt):
            train(inputs, told, stopped, HABITS, stop_at(step))
        pointed = (stopped / "steps" / "LATEST").read_text().strip()
        assert pointed == f"step-{step:08d}"
        assert not (stopped / "model").exists()
    train(inputs, told, stopped, HABITS)
    assert same_weights(straight, stopped)
    lines = [journal.read_lines(run) for run in (straight, stopped)]
    for key in ("loss", "gradient_norm", "learning_rate"):
        a, b = (journal.series(one, "step", key) for one in lines)
        assert a == b
        assert [step for step, _ in a] == list(range(1, 13))
    assert len(list((stopped / "steps").glob("step-*"))) == HABITS.keep


def test_a_finished_run_gives_its_result_again(inputs: Inputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = train(inputs, RECIPE, run, HABITS).evaluation
    expected = weights(run)
    assert train(inputs, RECIPE, run, HABITS).evaluation == before
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(run).items())


def test_accumulation_and_recomputation_change_memory_only(inputs: Inputs, tmp_path: Path) -> None:
    losses = {}
    for name, changed in {
        "plain": {},
        "recomputed": {"activation_checkpointing": True},
        "accumulated": {"accumulation": 4},
    }.items():
        train(inputs, recipe(**changed), tmp_path / name, HABITS)
        losses[name] = journal.series(journal.read_lines(tmp_path / name), "step", "loss")
    assert losses["recomputed"] == losses["plain"]
    for (_, one), (_, other) in zip(losses["accumulated"], losses["plain"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_compiled_layers_train_alike(inputs: Inputs, tmp_path: Path) -> None:
    """Within rounding; and resumed exactly, as any other run."""
    losses = {}
    for name, compile_ in (("plain", False), ("compiled", True)):
        train(inputs, recipe(compile=compile_), tmp_path / name, HABITS)
        losses[name] = journal.series(journal.read_lines(tmp_path / name), "step", "loss")
    for (_, one), (_, other) in zip(losses["compiled"], losses["plain"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    with pytest.raises(KeyboardInterrupt):
        train(inputs, recipe(compile=True), tmp_path / "stopped", HABITS, stop_at(7))
    train(inputs, recipe(compile=True), tmp_path / "stopped", HABITS)
    assert same_weights(tmp_path / "compiled", tmp_path / "stopped")


def test_a_seed_is_a_run(inputs: Inputs, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(inputs, recipe(seed=seed, steps=4), tmp_path / name, HABITS)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert not same_weights(tmp_path / "a", tmp_path / "c")


def test_what_the_model_draws_is_a_function_of_the_step(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with dropout resumes exactly too: no generator's state is needed."""
    from portkit.nn.mlp import GatedMLP

    forward = GatedMLP.forward

    def dropping(mlp: GatedMLP, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(forward(mlp, x), 0.3, mlp.training)

    monkeypatch.setattr(GatedMLP, "forward", dropping)
    train(inputs, RECIPE, tmp_path / "straight", HABITS)
    with pytest.raises(KeyboardInterrupt):
        train(inputs, RECIPE, tmp_path / "stopped", HABITS, stop_at(7))
    torch.manual_seed(12345)
    train(inputs, RECIPE, tmp_path / "stopped", HABITS)
    assert same_weights(tmp_path / "straight", tmp_path / "stopped")
    evaluated = [
        journal.series(journal.read_lines(tmp_path / name), "evaluation", "nats_per_token")
        for name in ("straight", "stopped")
    ]
    assert evaluated[0] == evaluated[1]  # without dropout


def test_what_a_run_leaves_to_be_read(inputs: Inputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    records: list[Mapping[str, Any]] = []
    habits = replace(HABITS, sample_every=6, sample_prompt="Lily had")
    train(inputs, RECIPE, run, habits, records.append)
    what = journal.read_run(run)
    assert what is not None
    assert Recipe(**what["recipe"]) == RECIPE
    assert what["config"]["vocab_size"] == load(run / "model").config.vocab_size
    assert what["versions"]["torch"] == version("torch")
    lines = journal.read_lines(run)
    assert [one["step"] for one in lines if one["event"] == "evaluation"] == [4, 8, 12]
    assert [one["step"] for one in lines if one["event"] == "saved"] == [5, 10, 12]
    samples = [one["text"] for one in lines if one["event"] == "sample"]
    assert len(samples) == 2
    assert all(text.startswith("Lily had") for text in samples)
    told = [one for one in records if one["event"] != "preparing"]
    assert [{**line, "steps": 12} for line in lines] == told


def test_a_not_finite_loss_stops_the_run_and_says_where(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def poison(record: Mapping[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == 7:
            monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, **_: x * torch.nan)

    with pytest.raises(TrainingError) as caught:
        train(inputs, RECIPE, run, HABITS, poison)
    said = str(caught.value)
    assert "the loss is not finite at step 8" in said
    assert "first in the output of model.layers.0.mlp" in said
    assert "step 5 is saved" in said
    monkeypatch.undo()
    train(inputs, RECIPE, run, HABITS)
    train(inputs, RECIPE, tmp_path / "straight", HABITS)
    assert same_weights(run, tmp_path / "straight")


def refusal(kind: type[PortkitError], inputs: Inputs, told: Recipe, run: Path) -> str:
    with pytest.raises(kind) as caught:
        train(inputs, told, run, HABITS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_is_not_gone_on_with_otherwise(inputs: Inputs, tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(inputs, RECIPE, run, HABITS, stop_at(6))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = refusal(TrainingError, inputs, recipe(learning_rate=3e-3), run)
    assert "--learning-rate 0.01, now 0.003" in said
    said = refusal(TrainingError, replace(inputs, tokenizer="bpe"), RECIPE, run)
    assert "tokenizer 'characters', now 'bpe'" in said
    original = text.read_text()
    text.write_text(original + "<|endoftext|>one more")
    assert "the text is not what" in refusal(TrainingError, inputs, RECIPE, run)
    text.write_text(original)
    config = Path(inputs.config)
    config.write_text(config.read_text().replace('"sliding_window": 7', '"sliding_window": 9'))
    assert "sliding_window 7, now 9" in refusal(TrainingError, inputs, RECIPE, run)
    config.write_text(config.read_text().replace('"sliding_window": 9', '"sliding_window": 7'))
    tokenizer = run / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert "not the tokenizer that the run began with" in refusal(
        TrainingError, inputs, RECIPE, run
    )
    tokenizer.write_bytes(before[tokenizer])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_damaged_token_file_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(inputs, RECIPE, run, HABITS)
    tokens = run / "data" / "train.tokens"
    tokens.write_bytes(tokens.read_bytes()[:-3])
    assert "delete it" in refusal(DataError, inputs, RECIPE, run)
    tokens.unlink()
    train(inputs, RECIPE, run, HABITS)


@pytest.mark.parametrize(
    ("changed", "kind", "complaint"),
    [
        ({"sliding_window": 1}, InvalidConfig, "sliding_window"),
        ({"num_key_value_heads": 3}, InvalidConfig, "not a multiple"),
        ({"head_dim": 11}, InvalidConfig, "odd"),
        ({"layer_types": ["full_attention"]}, InvalidConfig, "layer_types"),
        ({"max_position_embeddings": 19}, TrainingError, "max_position_embeddings 19"),
        ({"surprise": 1}, PortkitError, "surprise"),
    ],
)
def test_a_config_that_cannot_work_is_refused(
    changed: dict[str, Any],
    kind: type[PortkitError],
    complaint: str,
    inputs: Inputs,
    config_file: Write,
    tmp_path: Path,
) -> None:
    config_file(**changed)
    assert complaint in refusal(kind, inputs, RECIPE, tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_text_that_is_too_short_is_refused(inputs: Inputs, tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    text.write_text("")
    assert "holds no text" in refusal(DataError, inputs, RECIPE, run)
    text.write_text("too short")
    assert "a block needs 21" in refusal(DataError, inputs, RECIPE, run)
    text.write_text("x")
    refusal(DataError, inputs, RECIPE, run)
    text.write_text(story(3) * 3)
    refused = refusal(TokenizerError, replace(inputs, tokenizer="bpe"), RECIPE, run)
    assert "too little for a vocabulary of 512" in refused


def test_a_folder_that_is_no_run_is_left_alone(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    assert "is no run and not empty" in refusal(TrainingError, inputs, RECIPE, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("precious")
    assert "is a file" in refusal(TrainingError, inputs, RECIPE, tmp_path / "file")


def test_two_processes_do_not_train_in_one_folder(inputs: Inputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with only_one(run):
        said = refusal(TrainingError, inputs, RECIPE, run)
    assert "another process is training" in said
    train(inputs, recipe(steps=3), run, HABITS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile_", [False, True])
def test_on_a_gpu(compile_: bool, inputs: Inputs, tmp_path: Path) -> None:
    """Begins with the CPU's weights and blocks, so its first loss is the CPU's; and resumes."""
    told = recipe(precision=Precision.bfloat16, compile=compile_)
    on_gpu = replace(inputs, device="cuda")
    train(inputs, told, tmp_path / "cpu", HABITS)
    train(on_gpu, told, tmp_path / "gpu", HABITS)
    cpu, gpu = (
        journal.series(journal.read_lines(tmp_path / name), "step", "loss")
        for name in ("cpu", "gpu")
    )
    assert gpu[0][1] == pytest.approx(cpu[0][1], rel=1e-3)
    assert gpu[-1][1] == pytest.approx(cpu[-1][1], rel=2e-2)
    with pytest.raises(KeyboardInterrupt):
        train(on_gpu, told, tmp_path / "stopped", HABITS, stop_at(7))
    train(on_gpu, told, tmp_path / "stopped", HABITS)
    for name, tensor in weights(tmp_path / "stopped").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "gpu")[name], rtol=1e-2, atol=1e-2)


def test_a_checkpoints_tokenizer_brings_its_vocabulary(inputs: Inputs, tmp_path: Path) -> None:
    demo = ROOT / "portkit" / "demo_checkpoint"
    train(replace(inputs, tokenizer=str(demo)), recipe(steps=3), tmp_path / "run", HABITS)
    loaded = load(tmp_path / "run" / "model")
    assert loaded.config.vocab_size == load(demo).config.vocab_size
    encoded = Tokenizer.open(loaded.files).encode(story(0))
    assert encoded == Tokenizer.open(load(demo).files).encode(story(0))
