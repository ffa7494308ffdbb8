"""Files that mean greedy decoding, or an end, against what the reference generates with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import portkit.cli
from parity_tests.checkpoints import llama, save_tiny
from parity_tests.generation.specimens import write_tokenizer
from portkit.checkpoint import LocalFiles
from portkit.errors import GenerationError
from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.loading import load

PROMPT, LENGTH = [5, 17, 99, 3], 8
GREEDY: list[dict[str, Any]] = [
    {"temperature": 0},
    {"do_sample": False, "temperature": 0.0, "top_k": -1},
    {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1},
    {"do_sample": 0, "temperature": "0.6", "top_k": 2.5, "top_p": 1.5, "min_p": -1},
    {"do_sample": None, "temperature": -1.0, "top_p": 0.0},
    {"typical_p": 0.9, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "top_h": 0.3},
    {"num_beam_groups": 2, "diversity_penalty": 0.5, "length_penalty": 2.0},
    {"remove_invalid_values": True, "renormalize_logits": True},
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "top_p": 0.0},
    {"do_sample": True, "top_p": 1.5, "top_k": 1, "penalty_alpha": 0.6},
    {"repetition_penalty": 1.2, "temperature": 0},
    {"eos_token_id": -1},
]
SAMPLED: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 0},
    {"do_sample": True, "top_k": -1},
    {"do_sample": True, "temperature": -1.0},
    {"do_sample": True, "top_k": 2.5},
    {"do_sample": True, "top_p": -0.1},
    {"do_sample": True, "min_p": 1.5},
]
"""The reference refuses them."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    ids = {"bos_token_id": None, "eos_token_id": None}
    save_tiny(llama(num_hidden_layers=2, **ids), folder, torch.float32)
    return write_tokenizer(folder)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The checkpoint once more, without a generation config."""
    for file in made.iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            (tmp_path / file.name).symlink_to(file)
    shutil.copyfile(made / "config.json", tmp_path / "config.json")
    return tmp_path


def write(folder: Path, generation: dict[str, Any] | None, **config: Any) -> None:
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def theirs(folder: Path) -> list[int]:
    """What the reference goes on with."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=LENGTH)
    return list(ids[0, len(PROMPT) :].tolist())


def ours(folder: Path, **options: Any) -> tuple[list[int], list[str]]:
    """What we go on with, and what was said of the file."""
    said: list[str] = []
    settings = GenerationSettings.read(
        LocalFiles(folder), say=said.append, max_new_tokens=LENGTH, **options
    )
    steps = generate(load(folder).model, [PROMPT], settings, context_length=4096)
    return [step.token_id for step in steps], said


@pytest.mark.parametrize("generation", GREEDY, ids=json.dumps)
def test_a_file_that_means_greedy_is_obeyed(generation: dict[str, Any], folder: Path) -> None:
    write(folder, generation)
    assert ours(folder) == (theirs(folder), [])


@pytest.mark.parametrize("generation", SAMPLED, ids=json.dumps)
def test_what_the_reference_refuses_is_refused_or_told(
    generation: dict[str, Any], folder: Path
) -> None:
    """A number that has one meaning has it, and that is said."""
    write(folder, generation)
    with pytest.raises(ValueError, match=r"temperature|top_k|top_p|min_p"):
        theirs(folder)
    *_, (key, value) = generation.items()
    if value in (0, -1) and not isinstance(value, float):
        tokens, (said,) = ours(folder, seed=3)
        assert said.endswith("Transformers refuses it beside do_sample" if value == 0 else "it")
        write(folder, {} if value == 0 else generation | {"top_k": 0})
        assert ours(folder, seed=3) == (tokens, [])
        return
    with pytest.raises(GenerationError, match=f"--ignore-config {key} goes on without it"):
        ours(folder)
    assert ours(folder, seed=3, **{key: 0.5 if key != "top_k" else 7})[1] == []


def test_the_end_is_the_references_or_it_is_said(folder: Path) -> None:
    """A file without an EOS: the reference passes over config.json's, and only then."""
    first, second = theirs(folder)[:2]
    assert first != second
    for generation in (None, {"eos_token_id": float(second)}, {"eos_token_id": [7, second]}):
        write(folder, generation, eos_token_id=second)
        assert ours(folder) == (theirs(folder), []) == ([first, second], [])
    write(folder, {"eos_token_id": 7})
    assert ours(folder) == (theirs(folder), [])
    write(folder, {"top_k": 3})
    assert len(theirs(folder)) == LENGTH
    assert ours(folder) == (
        [first, second],
        [
            "generation_config.json names no EOS: text ends at config.json's eos_token_id "
            f"{second}, where Transformers goes on"
        ],
    )
    assert ours(folder, eos_token_ids=()) == (theirs(folder), [])


BAD = {
    "do_sample": True,
    "temperature": "hot",
    "top_k": -3,
    "top_p": -1,
    "min_p": 7,
    "repetition_penalty": 0,
    "max_new_tokens": -1,
    "max_length": 1,
    "stop_strings": 3,
    "eos_token_id": "</s>",
}
OPTIONS = [
    *("--temperature=0.7", "--top-k=3", "--top-p=0.9", "--min-p=0.1", "--repetition-penalty=1.1"),
    *("--max-new-tokens=4", "--stop=END", "--ignore-eos"),
]


def test_what_is_overridden_is_not_looked_at(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, BAD)
    assert code_of(folder, *OPTIONS) == 0
    capsys.readouterr()
    for left_out in OPTIONS:
        assert code_of(folder, *(one for one in OPTIONS if one != left_out)) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert "generation_config.json of " in err
    drawing = [one for one in OPTIONS if one.startswith(("--temp", "--top", "--min"))]
    assert code_of(folder, "--greedy", *(one for one in OPTIONS if one not in drawing)) == 0


def code_of(folder: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        portkit.cli.main(["generate", str(folder), "-p", "Once", *options])
    return int(exit_.value.code or 0)
