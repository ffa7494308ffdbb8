"""Encoding and decoding against Transformers; streaming against decoding at once."""

from __future__ import annotations

import json
import random

import pytest
from transformers import AutoTokenizer

from parity_tests.checkpoints import VOCABULARY
from parity_tests.generation.specimens import BACKENDS, write_tokenizer
from portkit.checkpoint import LocalFiles
from portkit.errors import TokenizerError
from portkit.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Once upon a time",
    "  two spaces, a\ttab\nand a newline \n",
    "naïve 日本語 😀👩‍👧 e\u0301",
    "<bos>spelled out<eos> and <unk>",
    "don't . stop , here !",
    "<0xE2> is no byte",
]


@pytest.fixture(params=BACKENDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(kind, tmp_path) -> Tokenizer:
    return Tokenizer.open(LocalFiles(write_tokenizer(tmp_path, kind)))


@pytest.mark.parametrize("bos", [True, False])
def test_ids_and_text_equal_those_of_transformers(kind, bos, tmp_path):
    ours = Tokenizer.open(LocalFiles(write_tokenizer(tmp_path, kind, bos=bos)))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, special=False) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.bos_id == theirs.bos_token_id == 2


def test_the_qwen3_tokenizer(data_folder, tmp_path):
    theirs = AutoTokenizer.from_pretrained(data_folder / "tokenizers" / "qwen3")
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.open(LocalFiles(tmp_path))
    story = (data_folder / "text" / "tinystories-v2-gpt4-sample.txt").read_text()[:20_000]
    for text in [*TEXTS, story, "<|im_start|>user\n<think>1 2 345</think><|im_end|>"]:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert streamed(ours, ids) == ours.decode(ids)
    assert ours.bos_id is None


@pytest.mark.parametrize(
    ("in_file", "config", "expected"),
    [
        (False, {"add_bos_token": True}, []),  # the file decides, as it does for Transformers
        (False, {}, []),
        (True, {"add_bos_token": True}, [2]),
        (True, {"add_bos_token": False}, [2]),
    ],
)
def test_the_file_alone_adds_bos(in_file, config, expected, tmp_path):
    tokenizer = Tokenizer.open(LocalFiles(write_tokenizer(tmp_path, bos=in_file, **config)))
    body = tokenizer.encode("Once", special=False)
    assert tokenizer.encode("Once") == expected + body
    assert tokenizer.encode("") == expected


def test_a_tokenizer_without_config_knows_no_special_roles(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.open(LocalFiles(tmp_path))
    assert (tokenizer.bos_id, tokenizer.special_tokens) == (None, {})
    assert tokenizer.decode(tokenizer.encode("Once")) == "Once"


def test_special_tokens_are_read_in_both_spellings(tmp_path):
    named = {"eos_token": {"content": "<eos>", "special": True}, "pad_token": None}
    extra = {"extra_special_tokens": {"image_token": "<img>"}, "add_bos_token": False}
    tokenizer = Tokenizer.open(LocalFiles(write_tokenizer(tmp_path, **named, **extra)))
    assert tokenizer.special_tokens == {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "image_token": "<img>",
    }


def test_truncation_and_padding_of_the_file_do_not_cut_a_prompt(tmp_path):
    write_tokenizer(tmp_path, bos=False)
    whole = Tokenizer.open(LocalFiles(tmp_path)).encode("Once upon a time")
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    state["padding"] = {
        "strategy": {"Fixed": 40},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    assert Tokenizer.open(LocalFiles(tmp_path)).encode("Once upon a time") == whole
    assert len(whole) > 2


def streamed(tokenizer: Tokenizer, ids: list[int], after: list[int] = ()) -> str:
    stream = tokenizer.stream(after)
    return "".join([*map(stream.push, ids), stream.finish()])


def test_streamed_text_of_any_ids_is_the_text_of_all_of_them(kind, tokenizer):
    draw = random.Random(3)
    broken = 0
    for _ in range(400):
        ids = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 24))]
        after = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(6))]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
        whole = tokenizer.decode(after + ids)
        assert streamed(tokenizer, ids, after) == whole[len(tokenizer.decode(after)) :]
        broken += "\ufffd" in whole
    assert broken > 100 or kind == "metaspace"  # the ids were nasty enough


def test_characters_come_whole_and_at_once(tokenizer):
    text = "Once naïve 日本語 😀 upon a time"
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in tokenizer.encode(text, special=False)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text, special=False))
    assert len([piece for piece in pieces if piece]) > 5  # not all kept for the end


def test_half_a_character_is_kept_until_it_is_certain(tmp_path):
    tokenizer = Tokenizer.open(LocalFiles(write_tokenizer(tmp_path, "byte_level", bos=False)))
    euro = tokenizer.encode("€")
    assert len(euro) == 3
    stream = tokenizer.stream()
    assert [stream.push(token_id) for token_id in euro] == ["", "", "€"]
    assert [stream.push(token_id) for token_id in euro[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"


def test_garbage_is_not_kept_back_for_ever(tmp_path):
    tokenizer = Tokenizer.open(LocalFiles(write_tokenizer(tmp_path, "byte_level", bos=False)))
    continuation = tokenizer.encode("€")[1]  # alone it begins nothing
    stream = tokenizer.stream()
    pieces = [stream.push(continuation) for _ in range(5)]
    assert pieces == ["", *["\ufffd"] * 4]
    assert stream.finish() == "\ufffd"


def test_a_bad_byte_spoils_its_whole_run_so_the_run_waits(tmp_path):
    tokenizer = Tokenizer.open(LocalFiles(write_tokenizer(tmp_path, "gemma", bos=False)))
    euro, letter = tokenizer.encode("€"), tokenizer.encode("O")
    assert len(euro) == 3
    bad = tokenizer.encode("€")[:1]
    good, spoiled = tokenizer.stream(), tokenizer.stream()
    assert [good.push(i) for i in euro + letter] == ["", "", "", "€O"]
    assert [spoiled.push(i) for i in euro + bad + letter] == ["", "", "", "", "\ufffd" * 4 + "O"]


def test_the_first_word_keeps_its_space_behind_a_prompt_only(tmp_path):
    tokenizer = Tokenizer.open(LocalFiles(write_tokenizer(tmp_path, "llama2")))
    prompt, both = tokenizer.encode("Once"), tokenizer.encode("Once upon")
    new = both[len(prompt) :]
    assert both[: len(prompt)] == prompt
    assert streamed(tokenizer, new, after=prompt) == " upon"
    assert streamed(tokenizer, new) == tokenizer.decode(new) == "upon"
    assert streamed(tokenizer, new, after=[tokenizer.bos_id]) == "upon"


def test_special_and_unknown_ids_have_no_text(tokenizer):
    once = tokenizer.encode("Once", special=False)
    ids = [2, VOCABULARY + 5, *once, 0, 1, VOCABULARY + 5]
    assert streamed(tokenizer, ids) == tokenizer.decode(ids) == tokenizer.decode(once)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, "has no tokenizer.json: have Transformers write one"),
        ("tokenizer.json", "{", "tokenizer.json of .* cannot be read"),
        (
            "tokenizer.json",
            '{"model": {"type": "Nonesuch"}}',
            "tokenizer.json of .* cannot be read",
        ),
        ("tokenizer_config.json", "{", "tokenizer_config.json of .* is not JSON"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json of .* must be a JSON object"),
    ],
)
def test_a_bad_file_is_one_line_with_the_way_out(name, content, words, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=words) as caught:
        Tokenizer.open(LocalFiles(tmp_path))
    assert "\n" not in str(caught.value)


def test_text_that_is_no_unicode_is_refused(tokenizer):
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        tokenizer.encode("\udcff")
