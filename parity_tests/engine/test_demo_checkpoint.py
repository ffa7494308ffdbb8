"""The demo checkpoint: the stories it was made from, the folder that ships, and how it speaks.

Knows the tools that made it and what its card claims; each figure is read from the card. Whether
the port computes it as the reference does is asked of every family elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import portkit
from portkit.checkpoint import Checkpoint, LocalFiles
from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.loading import LoadedModel, load
from portkit.tokenizer import Tokenizer
from portkit.training.texts import find_texts

DEMO = Path(portkit.__file__).parent / "demo_checkpoint"
TOOLS = Path(__file__).resolve().parents[2] / "tools"
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
PROMPT = "Once upon a time"
PAD = 0


@pytest.fixture(scope="module", autouse=True)
def _tools_on_path() -> Iterator[None]:
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def stories(_tools_on_path: None) -> ModuleType:
    import stories

    return stories


@pytest.fixture(scope="module")
def texts(stories: ModuleType) -> list[str]:
    return [story.text for story in stories.write_stories(3, 1500)]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((DEMO / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def card() -> str:
    return (DEMO / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.open(LocalFiles(DEMO))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(DEMO, device="cpu")


# -- the stories -----------------------------------------------------------------------------


def test_a_seed_gives_the_same_stories_everywhere(stories: ModuleType) -> None:
    told = "\n".join(story.text for story in stories.write_stories(0, 200))
    assert hashlib.sha256(told.encode()).hexdigest() == (
        "b96251e6f93fff922129eedf056fdf2b8cd932a17ed2a98d58e4136b002c27a6"
    ), "the grammar changed: make the demo checkpoint again, then pin the new text here"


def test_a_story_depends_on_its_seed_and_number_alone(stories: ModuleType) -> None:
    counted = list(stories.write_stories(7, 30))
    assert list(stories.write_stories(7, 10, start=20)) == counted[20:]
    assert stories.write_story(7, 25) == counted[25]
    assert not {s.text for s in counted} & {s.text for s in stories.write_stories(8, 30)}


def test_stories_are_many(stories: ModuleType, texts: list[str]) -> None:
    told = list(stories.write_stories(3, 1500))
    assert {story.plot for story in told} == set(stories.PLOTS)
    assert len(set(texts)) == len(texts)


def test_stories_are_well_formed(texts: list[str]) -> None:
    for text in texts:
        assert faults(text) == [], text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Ben ran. he fell.", "small letter after a full stop"),
        ('Ben said, "Come.', "quotes"),
        ("Ben ran", "no end"),
        ("{hero} ran.", "slot"),
        ("Ben saw a owl.", "article"),
        ("Ben  ran.", "spaces"),
    ],
)
def test_malformed_stories_are_told_apart(text: str, fault: str) -> None:
    assert fault in faults(text)


def faults(text: str) -> list[str]:
    """What is wrong with a story's form, paragraph by paragraph."""
    found = []
    for paragraph in text.split("\n\n"):
        checks = {
            "slot": re.search(r"[{}\[\]|_]", paragraph),
            "quotes": paragraph.count('"') % 2,
            "no end": not re.search(r'[.!?]"?$', paragraph),
            "no beginning": not re.match(r'"?[A-Z]', paragraph),
            "small letter after a full stop": re.search(r"[.] [a-z]", paragraph),
            "article": re.search(r"\b([Aa]n (?!honest)[^aeiou]|[Aa] [aeiou])", paragraph),
            "spaces": re.search(r"\s\s|\s[.,!?]|^\s|\s$", paragraph),
        }
        found += [name for name, wrong in checks.items() if wrong]
    return found


def test_a_story_keeps_its_hero_and_friend(stories: ModuleType) -> None:
    import story_world

    heroes, friends = story_world.HEROES, story_world.FRIENDS
    kinds = {"boy", "girl", *story_world.TABLES["kind"]}
    alone = {"astray", "learn", "lost", "stuck"}  # their second paragraph is about the hero only
    pronouns_seen = set()
    for story in stories.write_stories(3, 600):
        words = set(re.findall(r"\w+", story.text))
        (hero,) = words & {*heroes["he"], *heroes["she"]}
        assert len(words & {*friends["he"], *friends["she"]}) == (story.plot != "noise")
        assert len(words & kinds) == 1, story.text
        if story.plot in alone:
            said = set(re.findall(r"\w+", story.text.split("\n\n")[1].lower())) & {"he", "she"}
            assert all(hero in heroes[pronoun] for pronoun in said), story.text
            pronouns_seen |= said
    assert pronouns_seen == {"he", "she"}


def test_the_grammar_counts_what_it_draws(
    stories: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    plot = "{A_kind} [ran|fell].\n| {Kind}!\n|\n\n{A_kind}, {name}\n and so on."
    monkeypatch.setattr(stories, "PLOTS", {"only": plot})
    tables = {"kind name": [("owl", "O{kind}"), ("fox", "F")]}
    monkeypatch.setattr(stories, "TABLES", tables)
    told = {(s.text, round(s.nats, 9)) for s in stories.write_stories(0, 200)}
    end = {"owl": "An owl, Oowl and so on.", "fox": "A fox, F and so on."}
    first = {"owl": ["An owl ran.", "An owl fell."], "fox": ["A fox ran.", "A fox fell."]}
    sure = round(math.log(2) + math.log(3), 9)  # an animal, and one of three ways to begin
    expected = {
        *((f"{line}\n\n{end[k]}", round(sure + math.log(2), 9)) for k in end for line in first[k]),
        *((f"{kind.capitalize()}!\n\n{end[kind]}", sure) for kind in end),
        *((f"\n\n{end[kind]}", sure) for kind in end),
    }
    assert told == expected


# -- the folder ------------------------------------------------------------------------------


def test_the_folder_is_whole_and_small() -> None:
    files = {path.name: path.stat().st_size for path in DEMO.iterdir()}
    assert set(files) == FILES
    assert sum(files.values()) <= 3_000_000


def test_the_shape_is_awkward(config: dict[str, Any]) -> None:
    kinds = config["layer_types"]
    assert config["model_type"] == "gemma3_text"
    assert set(kinds) == {"sliding_attention", "full_attention"}
    assert len(kinds) == config["num_hidden_layers"] >= 5
    patterns = [
        ["sliding_attention" if (i + 1) % n else "full_attention" for i in range(len(kinds))]
        for n in range(1, len(kinds) + 1)
    ]
    assert kinds not in patterns
    assert config["sliding_window"] < config["max_position_embeddings"]
    assert 1 < config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["hidden_size"] != config["num_attention_heads"] * config["head_dim"]
    for value in (config["hidden_size"] ** 0.5, config["query_pre_attn_scalar"] ** -0.5):
        assert torch.tensor(value, dtype=torch.bfloat16).item() != value
    assert config["query_pre_attn_scalar"] != config["head_dim"]
    assert config["intermediate_size"] % 32 == 0
    vocab_size = config["vocab_size"]
    assert all(vocab_size % divisor for divisor in range(2, math.isqrt(vocab_size) + 1))


def test_weights_are_bfloat16_and_trained_everywhere(config: dict[str, Any]) -> None:
    checkpoint = Checkpoint(LocalFiles(DEMO))
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    assert "lm_head.weight" not in checkpoint.tensors
    assert config["dtype"] == "bfloat16"
    for name in checkpoint.tensors:
        assert checkpoint.read(name).float().std() > 0.004, f"{name} is hardly trained"


def test_the_tokenizer_gives_back_what_it_reads(
    tokenizer: Tokenizer, texts: list[str], config: dict[str, Any]
) -> None:
    for text in [*texts[:300], "naïve 🦊\n\tTabs  and  spaces ", ""]:
        ids = tokenizer.encode(text)
        assert ids[0] == config["bos_token_id"]
        assert ids.count(config["bos_token_id"]) == 1
        assert tokenizer.encode(text, special=False) == ids[1:]
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<eos>", special=False) == [config["eos_token_id"]]
    assert tokenizer.encode("<pad>", special=False) == [PAD]
    longest = max(len(tokenizer.encode(text)) for text in texts)
    assert longest < config["max_position_embeddings"]
    assert longest > 3 * config["sliding_window"]


def test_the_card_says_how_to_make_it_and_holds_what_was_measured(
    card: str, loaded: LoadedModel, tokenizer: Tokenizer, stories: ModuleType
) -> None:
    told = re.search(r"tools/stories\.py --seed (\d+) --count (\d+)", card)
    made = re.search(r"python (tools/\S+\.py) --steps \d+ --seed (\d+)", card)
    assert told
    assert made
    assert (TOOLS.parent / made[1]).is_file()
    assert made[2] != told[1], "the held-out stories were trained on"
    assert f"{loaded.report.parameters:,} parameters" in card
    held_out = list(stories.write_stories(int(told[1]), int(told[2])))
    nats, num_tokens = held_out_nats(loaded, tokenizer, [story.text for story in held_out])
    num_bytes = sum(len(story.text.encode()) for story in held_out)
    grammar = sum(story.nats for story in held_out)
    assert figure(card, "held-out loss, nats per token") == pytest.approx(
        nats / num_tokens, abs=1e-3
    )
    assert figure(card, "held-out loss, bits per byte") == pytest.approx(
        nats / math.log(2) / num_bytes, abs=1e-3
    )
    assert figure(card, "the grammar's own choices, nats per token") == pytest.approx(
        grammar / num_tokens, abs=1e-4
    )


def figure(card: str, measure: str) -> float:
    (value,) = re.findall(rf"^\| {re.escape(measure)} \| (\S+) \|$", card, re.MULTILINE)
    return float(value)


@torch.inference_mode()
def held_out_nats(loaded: LoadedModel, tokenizer: Tokenizer, texts: list[str]) -> tuple[float, int]:
    """Padded on the right, where a causal model does not look: no mask is needed."""
    (eos,) = tokenizer.encode("<eos>", special=False)
    encoded = [torch.tensor([*tokenizer.encode(text), eos]) for text in texts]
    encoded.sort(key=len)
    nats = 0.0
    for start in range(0, len(encoded), 20):
        ids = torch.nn.utils.rnn.pad_sequence(
            encoded[start : start + 20], batch_first=True, padding_value=-1
        )
        logits = loaded.model(ids[:, :-1].clamp(min=0)).float()
        targets = ids[:, 1:].flatten()
        nats += F.cross_entropy(
            logits.flatten(0, 1), targets, ignore_index=-1, reduction="sum"
        ).item()
    return nats, sum(len(ids) - 1 for ids in encoded)


# -- how it speaks ---------------------------------------------------------------------------


def speak(
    loaded: LoadedModel, tokenizer: Tokenizer, prompts: list[str], **options: Any
) -> list[tuple[str, str | None]]:
    """Each prompt continued, and why it ended."""
    length = loaded.config.max_position_embeddings
    settings = GenerationSettings.read(loaded.files).override(max_new_tokens=length, **options)
    said, ended = list(prompts), [None] * len(prompts)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    for step in generate(loaded.model, ids, settings, context_length=length, tokenizer=tokenizer):
        said[step.row] += step.text
        ended[step.row] = step.finish_reason or ended[step.row]
    return list(zip(said, ended, strict=True))


def test_the_likeliest_story_is_whole(loaded: LoadedModel, tokenizer: Tokenizer) -> None:
    prompts = [PROMPT, "Once upon a time, a shy fox named Lily"]
    for text, ended in speak(loaded, tokenizer, prompts, do_sample=False):
        assert ended == "eos"
        assert faults(text) == [], text
        assert len(text.split("\n\n")) >= 3


def test_sampled_stories_are_whole(loaded: LoadedModel, tokenizer: Tokenizer) -> None:
    import story_world

    names = {name for group in story_world.HEROES.values() for name in group}
    told = speak(loaded, tokenizer, [PROMPT] * 12, seed=5)
    assert len({text for text, _ in told}) == len(told)
    for text, ended in told:
        assert ended == "eos"
        assert faults(text) == [], text
    faithful = [text for text, _ in told if len(names & set(re.findall(r"\w+", text))) == 1]
    assert len(faithful) >= 11, "a model of this size may lose its hero in a story, now and then"


def test_transformers_reads_the_same_tokens(
    tokenizer: Tokenizer, texts: list[str], config: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(DEMO)
    for text in texts[:50]:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    assert theirs.pad_token_id == PAD
    assert theirs.eos_token_id == config["eos_token_id"]


# -- the making ------------------------------------------------------------------------------


def test_no_held_out_story_is_trained_on(
    stories: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import make_demo_checkpoint as making

    monkeypatch.setattr(making, "NUM_STORIES", 12)
    held = [stories.write_story(0, 4), stories.write_story(1, 0)]
    train_text, held_out_text = making.write_texts(tmp_path, 0, held)
    told = [story.text for story in stories.write_stories(0, 12)]
    trained_on, _ = find_texts(str(train_text))
    held_out, _ = find_texts(str(held_out_text))
    assert list(trained_on.documents()) == told[:4] + told[5:]
    assert list(held_out.documents()) == [story.text for story in held]


@pytest.mark.slow
def test_one_command_makes_all_of_it(tmp_path: Path, config: dict[str, Any]) -> None:
    out = tmp_path / "made"
    subprocess.run(
        [sys.executable, TOOLS / "make_demo_checkpoint.py", "--steps", "2", "--out", out],
        check=True,
        capture_output=True,
    )
    assert {path.name for path in out.iterdir()} == FILES
    for name in FILES - {"README.md", "model.safetensors"}:
        assert (out / name).read_bytes() == (DEMO / name).read_bytes(), name
    assert load(out).report.parameters == load(DEMO).report.parameters
    nats = figure((out / "README.md").read_text(encoding="utf-8"), "held-out loss, nats per token")
    assert nats == pytest.approx(math.log(config["vocab_size"]), abs=0.5)
