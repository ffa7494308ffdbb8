"""`portkit generate`: what reaches stdout, stderr, JSON and the exit code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import portkit.cli
from parity_tests.generation.specimens import write_checkpoint
from portkit.checkpoint import LocalFiles
from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.loading import load
from portkit.tokenizer import Tokenizer

DEMO = Path(portkit.__file__).with_name("demo_checkpoint")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("gemma3"), "gemma3", eos_token_id=1)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def run(folder, capsys):
    """Run the command on the checkpoint; returns exit code, stdout and stderr."""

    def run(*options: str, repo: Path = folder) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            portkit.cli.main(["generate", str(repo), *options])
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    return run


def expected(folder: Path, prompts: list[list[int]], **options) -> list[tuple[list[int], str]]:
    """Ids and text of each row, from the loop itself."""
    tokenizer, model = Tokenizer.open(LocalFiles(folder)), load(folder).model
    rows: list[tuple[list[int], str]] = [([], "")] * len(prompts)
    settings = GenerationSettings(eos_token_ids=(1,), **options)
    for step in generate(model, prompts, settings, context_length=4096, tokenizer=tokenizer):
        ids, text = rows[step.row]
        rows[step.row] = [*ids, step.token_id], text + step.text
    return rows


def with_files(folder: Path, target: Path, **files: dict) -> Path:
    """The checkpoint again in `target`, some of its JSON files (named without .json) changed."""
    for path in folder.iterdir():
        if not (target / path.name).exists():
            (target / path.name).symlink_to(path)
    for name, changes in files.items():
        path = target / f"{name}.json"
        content = json.loads((folder / path.name).read_text())
        path.unlink()
        path.write_text(json.dumps(content | changes))
    return target


def ids_of(folder: Path, text: str, **options) -> list[int]:
    return Tokenizer.open(LocalFiles(folder)).encode(text, **options)


def test_one_prompt_is_streamed_and_stdout_holds_nothing_else(run, folder, monkeypatch):
    class Watched(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.flushed = [""]

        def flush(self) -> None:
            self.flushed.append(self.getvalue())

    watched = Watched()
    monkeypatch.setattr(sys, "stdout", watched)
    code, _, err = run("-p", "Once upon", "--max-new-tokens", "20")
    ((_, text),) = expected(folder, [ids_of(folder, "Once upon")], max_new_tokens=20)
    assert (code, watched.getvalue(), err) == (0, text + "\n", "")
    seen = [flushed for flushed in dict.fromkeys(watched.flushed) if text.startswith(flushed)]
    assert len(seen) > 5  # it came piece by piece


def test_json_says_what_was_done(run, folder):
    prompt = ids_of(folder, "Once upon")
    code, out, err = run("-p", "Once upon", "--json", "--max-new-tokens", "9")
    said = json.loads(out)
    ((ids, text),) = expected(folder, [prompt], max_new_tokens=9)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert (said["format"], said["command"]) == (1, "generate")
    assert "torch" in said["versions"]
    assert (said["text"], said["token_ids"], said["finish_reason"]) == (text, ids, "length")
    assert (said["prompt_tokens"], said["seed"]) == (len(prompt), None)
    assert said["tokens_per_s"] > 0
    assert said["prefill_s"] > 0


def test_a_single_token_has_no_speed(run):
    _, out, _ = run("-p", "Once", "--json", "--max-new-tokens", "1")
    assert json.loads(out)["tokens_per_s"] is None


def test_several_prompts_are_a_batch(run, folder):
    texts = ["Once upon a time", "a", ""]
    options = ["-p", texts[0], "-p", texts[1], "-p", texts[2], "--max-new-tokens", "6"]
    rows = expected(folder, [ids_of(folder, text) for text in texts], max_new_tokens=6)
    _, out, _ = run(*options, "--json")
    said = json.loads(out)
    assert list(zip(said["token_ids"], said["text"], strict=True)) == [tuple(row) for row in rows]
    assert said["prompt_tokens"] == [len(ids_of(folder, text)) for text in texts]
    assert said["finish_reason"] == ["length"] * 3
    assert said["seed"] == [None] * 3
    _, out, err = run(*options)
    assert out == "".join(
        f"==> {prompt} <==\n{text}\n\n" for prompt, (_, text) in zip(texts, rows, strict=True)
    )
    assert err == ""


def test_sampling_is_what_its_options_say(run, folder):
    values = {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.01}
    values |= {"repetition_penalty": 1.2, "max_new_tokens": 12, "seed": 5}
    flags = [
        word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))
    ]
    rows = expected(folder, [ids_of(folder, "Once")] * 2, do_sample=True, **values)
    _, out, _ = run("-p", "Once", "-p", "Once", "--json", *flags)
    said = json.loads(out)
    assert said["token_ids"] == [ids for ids, _ in rows]
    assert said["token_ids"][0] != said["token_ids"][1]
    assert said["seed"] == [5, 6]


def test_a_seed_that_was_not_given_is_told_and_repeats_the_text(run):
    options = ["-p", "Once", "--sample", "--max-new-tokens", "8", "--json"]
    first, second = (json.loads(run(*options)[1]) for _ in range(2))
    again = json.loads(run(*options, "--seed", str(first["seed"]))[1])
    assert again["token_ids"] == first["token_ids"]
    assert first["seed"] != second["seed"]


def test_generation_config_is_heeded_and_overridden(run, folder, tmp_path):
    said = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 5, "num_beams": 1}
    repo = with_files(folder, tmp_path, generation_config=said)
    prompt = ids_of(folder, "Once")
    ((sampled, _),) = expected(
        folder, [prompt], do_sample=True, temperature=3.0, max_new_tokens=5, seed=4
    )
    ((greedy, _),) = expected(folder, [prompt], max_new_tokens=5)
    _, out, _ = run("-p", "Once", "--seed", "4", "--json", repo=repo)
    assert json.loads(out)["token_ids"] == sampled
    _, out, _ = run("-p", "Once", "--greedy", "--json", repo=repo)
    assert json.loads(out)["token_ids"] == greedy != sampled


def test_what_generation_config_asks_in_vain_is_refused_unless_ignored(run, folder, tmp_path):
    repo = with_files(folder, tmp_path, generation_config={"num_beams": 3})
    options = ["-p", "Once", "--max-new-tokens", "3"]
    code, out, err = run(*options, repo=repo)
    assert (code, out, "num_beams = 3 is not supported" in err) == (2, "", True)
    code, out, _ = run(*options, "--ignore-config", "num_beams", repo=repo)
    assert (code, out) == (0, run(*options)[1])


def test_stop_strings_and_eos(run, folder):
    ((free, text),) = expected(folder, [ids_of(folder, "Once")], max_new_tokens=20)
    stop = text[6:8]
    assert text.index(stop) > 0
    said = json.loads(
        run("-p", "Once", "--max-new-tokens", "20", "--stop", "nonesuch", "--stop", stop, "--json")[
            1
        ]
    )
    assert (said["text"], said["finish_reason"]) == (text[: text.index(stop)], "stop")
    assert said["token_ids"] == free[: len(said["token_ids"])]


def test_eos_ends_the_text_unless_ignored(run, folder, tmp_path):
    ((free, _),) = expected(folder, [ids_of(folder, "Once")], max_new_tokens=20)
    repo = with_files(folder, tmp_path, generation_config={"eos_token_id": [1, free[7]]})
    options = ["-p", "Once", "--max-new-tokens", "20", "--json"]
    said = json.loads(run(*options, repo=repo)[1])
    assert said["token_ids"] == free[: free.index(free[7]) + 1]
    assert said["finish_reason"] == "eos"
    said = json.loads(run(*options, "--ignore-eos", repo=repo)[1])
    assert (said["token_ids"], said["finish_reason"]) == (free, "length")


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chat(system, run, folder):
    rendered = f"<bos>[system]{system}[user]Hi[assistant]" if system else "<bos>[user]Hi[assistant]"
    prompt = ids_of(folder, rendered, special=False)
    options = ["--system", system] if system else []
    said = json.loads(run("-p", "Hi", "--chat", *options, "--max-new-tokens", "6", "--json")[1])
    assert said["prompt_tokens"] == len(prompt)
    assert said["token_ids"] == expected(folder, [prompt], max_new_tokens=6)[0][0]
    assert prompt[0] == 2 != prompt[1]


def test_a_prompt_from_stdin(run, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once\nupon\n"))
    said = json.loads(run("-p", "-", "--max-new-tokens", "4", "--json")[1])
    prompt = ids_of(folder, "Once\nupon")
    assert said["prompt_tokens"] == len(prompt)
    assert said["token_ids"] == expected(folder, [prompt], max_new_tokens=4)[0][0]


def test_verbose_tells_on_stderr_how_it_went(run):
    _, _, err = run("-p", "Once", "--max-new-tokens", "4", "--verbose", "--sample", "--seed", "9")
    assert err.startswith("4 tokens, prefill ")
    assert " tokens/s, seed 9\n" in err


def test_the_end_of_the_context_is_told(run, folder, tmp_path):
    repo = with_files(folder, tmp_path, config={"max_position_embeddings": 9})
    num_prompt_tokens = len(ids_of(folder, "Once"))
    code, out, err = run("-p", "Once", "--json", "--max-new-tokens", "99", repo=repo)
    assert (code, json.loads(out)["finish_reason"]) == (0, "context")
    assert len(json.loads(out)["token_ids"]) == 9 - num_prompt_tokens
    assert err == "portkit: note: cut at the end of the model's context of 9 tokens\n"
    code, out, err = run("-p", "Once upon a time " * 5, repo=repo)
    assert (code, out) == (2, "")
    assert "leaves no room in a context of 9: shorten it" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Missing option '-p'"),
        (["-p", "x", "--greedy", "--top-p", "0.9"], "--top-p has no effect with --greedy"),
        (["-p", "x", "--temperature", "0"], "temperature must be above 0"),
        (["-p", "x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["-p", "x", "--seed", "-1"], "seed must be from 0"),
        (["-p", "x", "--stop", ""], "a stop string must not be empty"),
        (["-p", "x", "--system", "y"], "--system is a message of a chat: give --chat"),
        (["-p", "-", "-p", "-"], "-p - reads standard input to its end: give it once"),
        (["-p", "\udcff"], "not valid Unicode"),
    ],
)
def test_bad_options_are_one_line(options, words, run):
    code, out, err = run(*options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("portkit: error: ")
    assert words in err


def test_an_empty_prompt_is_bos_alone_or_refused(run, folder, tmp_path):
    options = ["-p", "", "--json", "--max-new-tokens", "3"]
    repo = with_files(folder, tmp_path, tokenizer={"post_processor": None})
    code, out, _ = run(*options, repo=repo)
    assert (code, json.loads(out)["prompt_tokens"]) == (0, 1)
    assert json.loads(out)["token_ids"] == expected(folder, [[2]], max_new_tokens=3)[0][0]
    repo = with_files(folder, tmp_path, tokenizer_config={"bos_token": None})
    code, out, err = run(*options, repo=repo)
    assert (code, out, "the tokenizer has no BOS token" in err) == (2, "", True)


def test_a_tokenizer_of_another_model_is_refused(run, folder, tmp_path):
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    last = max(token["id"] for token in added)
    added += [{**added[0], "id": last + n, "content": f"<new{n}>"} for n in range(1, 600)]
    repo = with_files(folder, tmp_path, tokenizer={"added_tokens": added})
    (unknown,) = ids_of(repo, "<new599>", special=False)
    code, out, err = run("-p", "Once <new599>", repo=repo)
    assert (code, out) == (2, "")
    assert f"gives id {unknown} where the model has 509 tokens" in err


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo checkpoint has not been trained yet")
def test_the_demo_checkpoint_tells_a_story():
    command = [sys.executable, "-m", "portkit", "generate", str(DEMO), "-p", "Once upon a time"]
    done = subprocess.run(
        [*command, "--greedy", "--max-new-tokens", "60"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert len(done.stdout.split()) > 20
    assert "." in done.stdout
    assert "\ufffd" not in done.stdout
