"""What lies beside a tokenizer.json: ids, text, roles and rendered chats equal Transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from parity_tests.generation.specimens import NAMED, write_tokenizer
from portkit.checkpoint import LocalFiles
from portkit.errors import CheckpointError, TokenizerError
from portkit.generation.chat import ChatTemplate
from portkit.tokenizer import Tokenizer

END = "<|im_end|>"
TEXT = f"Once {END} upon<new> a <bos> time <img> x <A><B><C>  <old> <eos>hi"
ROLES = ("bos", "eos", "unk", "pad", "cls", "image")
TEMPLATE = "|".join(f"{{{{ {role}_token }}}}" for role in ROLES) + "{{ messages[0].content }}"
HI = [{"role": "user", "content": f"hi{END}"}]
SIZE = 289
"""Of the specimen's vocabulary: the next id."""


def token(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": content, **plain, "special": special, **flags}


def typed(content: str, **flags: bool) -> dict[str, Any]:
    """As a tokenizer_config.json has it where a role is an object."""
    return {"__type": "AddedToken", **token(content, **flags)}


def decoder(*tokens: tuple[int, dict[str, Any]], **others: Any) -> dict[str, Any]:
    return {**NAMED, "added_tokens_decoder": {str(number): one for number, one in tokens}, **others}


CASES: dict[str, dict[str, Any]] = {
    "nothing beside": {},
    "roles in the map alone": {"config": {}, "map": NAMED},
    "roles in the map, as objects": {"config": {}, "map": {k: token(v) for k, v in NAMED.items()}},
    "the map before the config": {"map": {**NAMED, "eos_token": "<unk>", "bos_token": "<pad>"}},
    "the map fills a null": {"config": {**NAMED, "eos_token": None}, "map": {"eos_token": "<unk>"}},
    "the map's own roles": {"map": {"cls_token": "<pad>", "image_token": "<unk>"}},
    "the map is not read beside a decoder": {
        "config": decoder((SIZE, token(END))),
        "map": {**NAMED, "eos_token": "<unk>"},
    },
    "more special tokens in the map": {"map": {"additional_special_tokens": ["<A>", "<B>"]}},
    "more special tokens": {"config": {**NAMED, "additional_special_tokens": ["<A>", "<B>"]}},
    "more special tokens, under both names": {
        "config": {
            **NAMED,
            "additional_special_tokens": ["<A>"],
            "extra_special_tokens": ["<B>", typed("<C>", rstrip=True)],
        }
    },
    "more special tokens, in both files": {
        "config": {**NAMED, "additional_special_tokens": ["<A>"]},
        "map": {"additional_special_tokens": ["<B>"]},
    },
    "special tokens with names": {
        "config": {**NAMED, "extra_special_tokens": {"image_token": "<img>", "other": "<A>"}}
    },
    "special tokens with names in the map": {
        "map": {"extra_special_tokens": {"image_token": "<img>"}}
    },
    "a role with a new token": {"config": {**NAMED, "eos_token": "<new>"}},
    "a role with a new token, with flags": {
        "config": {**NAMED, "eos_token": typed("<new>", rstrip=True)}
    },
    "a role with a new token, in the map": {"config": {}, "map": {"eos_token": "<new>"}},
    "a role with a new token, in the map with flags": {
        "map": {"eos_token": token("<new>", rstrip=True, normalized=True)}
    },
    "a role with an ordinary word": {"config": {**NAMED, "eos_token": "e"}},
    "a role without a text": {"config": {**NAMED, "pad_token": ""}},
    "a role of the file's own": {"config": {**NAMED, "image_token": "<img>", "zeta_token": "<A>"}},
    "a decoder": {"config": decoder((SIZE, token(END)))},
    "a decoder, not special": {"config": decoder((SIZE, token(END, special=False)))},
    "a decoder that says little": {"config": decoder((SIZE, {"content": END}))},
    "a decoder that strips": {"config": decoder((SIZE, token(END, lstrip=True, rstrip=True)))},
    "a decoder out of order": {"config": decoder((SIZE + 1, token(END)), (SIZE, token("<new>")))},
    "a decoder with a gap": {"config": decoder((SIZE + 7, token(END)))},
    "a decoder with an id that is taken": {"config": decoder((5, token(END)))},
    "a decoder that changes flags": {"config": decoder((1, token("<eos>", rstrip=True)))},
    "a decoder, a role not special": {"config": decoder((1, token("<eos>", special=False)))},
    "a decoder, an ordinary word": {"config": decoder((40, token("e")))},
    "a decoder and roles": {
        "config": decoder((SIZE, token(END)), eos_token="<new>", image_token="<img>")
    },
    "a decoder of nothing": {"config": decoder(), "map": {"eos_token": "<unk>"}},
    "added tokens": {"added": {END: SIZE + 1, "<new>": SIZE, "<eos>": 1}},
    "added tokens with a gap": {"added": {END: SIZE + 4}},
    "added tokens that are a role": {"added": {END: SIZE}, "map": {"eos_token": END}},
    "added tokens are not read beside a decoder": {
        "config": decoder((SIZE, token("<new>"))),
        "added": {END: SIZE + 1},
    },
    "everything": {
        "config": {**NAMED, "eos_token": "<new>", "image_token": "<img>"},
        "map": {"cls_token": "<B>", "additional_special_tokens": ["<A>"]},
        "added": {END: SIZE},
    },
}


def write(folder: Path, case: dict[str, Any], **settings: Any) -> LocalFiles:
    write_tokenizer(folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **case.get("config", NAMED), **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for key, name in (("map", "special_tokens_map.json"), ("added", "added_tokens.json")):
        if key in case:
            (folder / name).write_text(json.dumps(case[key]))
    return LocalFiles(folder)


@pytest.mark.parametrize("name", CASES)
def test_ids_roles_and_chats_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    files = write(tmp_path, CASES[name], chat_template=TEMPLATE)
    ours, theirs = Tokenizer.open(files), AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(TEXT).input_ids
    assert ours.encode(TEXT) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    for number, one in theirs.added_tokens_decoder.items():
        assert ours.encode(one.content, special=False) == [number]
        assert ours.has_text(number) != one.special
    rendered = ChatTemplate.open(files, ours).render(HI, add_generation_prompt=False)
    assert rendered == theirs.apply_chat_template(HI, tokenize=False)
    assert ours.special_tokens == theirs.special_tokens_map


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"config": {"added_tokens_decoder": []}}, "added_tokens_decoder in tokenizer_config.json"),
        ({"config": {"added_tokens_decoder": {"x": token("<A>")}}}, "which tokens have which ids"),
        ({"config": {"added_tokens_decoder": {"9": {}}}}, "which tokens have which ids"),
        ({"added": {END: "x"}}, "added_tokens.json of"),
        ({"map": []}, "special_tokens_map.json of"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    case: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.open(write(tmp_path, case))
    assert words in str(caught.value)


def test_a_pointer_in_the_place_of_a_tokenizer_is_called_one(tmp_path: Path) -> None:
    files = write(tmp_path, {})
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(CheckpointError, match=rf"{name} is a git-lfs pointer .*git lfs pull"):
            Tokenizer.open(files)


PLACES: dict[str, tuple[object, dict[str, str]]] = {
    "config": ("one", {}),
    "by name": ({"default": "one", "tool_use": "two"}, {}),
    "as a list": ([{"name": "default", "template": "one"}], {}),
    "file before config": ("other", {"chat_template.jinja": "one"}),
    "files": (
        None,
        {"chat_template.jinja": "one", "additional_chat_templates/tool_use.jinja": "two"},
    ),
}
TOOL = {"type": "function", "function": {"name": "f", "description": "g", "parameters": {}}}


@pytest.mark.parametrize("place", PLACES)
def test_templates_are_found_where_transformers_finds_them(place: str, tmp_path: Path) -> None:
    stored, beside = PLACES[place]
    files = write(tmp_path, {}, **({"chat_template": stored} if stored else {}))
    for name, text in beside.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = ChatTemplate.open(files, Tokenizer.open(files))
    for tools in (None, [TOOL]):
        expected = theirs.apply_chat_template(HI, tools=tools, tokenize=False)
        assert ours.render(HI, tools=tools) == expected
        assert expected == ("two" if tools and "two" in str(PLACES[place]) else "one")


@pytest.mark.parametrize("place", ["added", "decoder", "special"])
def test_what_is_plain_is_looked_for_in_normalised_text(place: str, tmp_path: Path) -> None:
    """Where the normaliser has put another character for a space."""
    write_tokenizer(tmp_path, "gemma")
    number = Tokenizer.open(LocalFiles(tmp_path)).vocab_size
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}
    if place == "added":
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<a b>": number}))
    else:
        one = {"content": "<a b>", "special": place == "special"}
        config["added_tokens_decoder"] = {str(number): one}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.open(LocalFiles(tmp_path))
    for text in ("x<a▁b>y", "x<a b>y"):
        assert ours.encode(text) == theirs(text).input_ids
    assert (number in ours.encode("x<a▁b>y")) == (place != "special")
