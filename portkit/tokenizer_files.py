"""What lies beside a `tokenizer.json` and has a say in it: roles of tokens, and tokens to be added.

Knows `tokenizer_config.json`, and `special_tokens_map.json` and `added_tokens.json`, which older
tools wrote: they count where the first has no `added_tokens_decoder`, and then the map comes before
the config. So it is in Transformers, as measured: its tokens are added in the order that is kept
here, and what is new gets the next id, whatever the file says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from portkit.checkpoint import Files
from portkit.errors import TokenizerError
from portkit.json_reading import read_object

CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_DECODER = "added_tokens_decoder"
_FIRST = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")

Token = dict[str, Any]
"""A token's `content`, the flags of the tokenizers library, and whether it `replaces` one."""


@dataclass(frozen=True)
class Beside:
    """All that is said beside a `tokenizer.json`."""

    config: Mapping[str, Any]
    roles: Mapping[str, str]
    """`{"bos_token": "<bos>", …}`."""
    added: tuple[Token, ...]
    """In the order in which they are added where they are not there yet."""


def read_beside(files: Files) -> Beside:
    """Read those of the files that there are. Raises TokenizerError."""
    config, older = _read(files, CONFIG), {}
    if not (is_new := config.get(_DECODER) is not None):
        older = _read(files, _MAP)
    settings = {**config, **older}
    extra = _extra(config) or _extra(older)
    named = {
        role: value
        for role, value in {**settings, **(extra if isinstance(extra, dict) else {})}.items()
        if role.endswith("_token") or (isinstance(extra, dict) and role in extra)
    }
    order = [*(role for role in _FIRST if role in named), *(r for r in named if r not in _FIRST)]
    special = [named[role] for role in order if _content(named[role])]
    special += extra if isinstance(extra, list) else []
    contents = {_content(one) for one in special}
    stored = _decoded(config[_DECODER], files) if is_new else _listed(_read(files, _ADDED), files)
    roles = {role: text for role, value in named.items() if (text := _content(value)) is not None}
    added = [
        {**token, "special": token["special"] or token["content"] in contents} for token in stored
    ]
    return Beside(settings, roles, (*added, *_as_special(special)))


def _read(files: Files, name: str) -> dict[str, Any]:
    if not files.has(name):
        return {}
    what = f"{name} of {files.origin}"
    return read_object(files.path(name), what, TokenizerError, "fetch it again or repair it")


def _extra(settings: Mapping[str, Any]) -> list[Any] | dict[str, Any] | None:
    """Special tokens without a role in a list, or with one of the file's own choice by name."""
    found = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    return found if isinstance(found, list | dict) else None


def _content(value: object) -> str | None:
    """The text of a token that is given as one, or as an object."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _as_special(tokens: list[Any]) -> Iterator[Token]:
    for one in tokens:
        if content := _content(one):
            flags = one if isinstance(one, Mapping) else {}
            given = {flag: bool(flags.get(flag, False)) for flag in _FLAGS}
            yield {**given, "content": content, "special": True, "replaces": False}


def _decoded(decoder: object, files: Files) -> list[Token]:
    """Tokens of `added_tokens_decoder`, by their ids."""
    if not isinstance(decoder, dict):
        raise _malformed(f"{_DECODER} in {CONFIG}", files)
    tokens = []
    for number, one in decoder.items():
        content = _content(one) if isinstance(one, dict) else None
        if content is None or not number.isdecimal():
            raise _malformed(f"{_DECODER} in {CONFIG}", files)
        flags = {flag: bool(one.get(flag, False)) for flag in _FLAGS}
        flags["normalized"] = bool(one.get("normalized", not flags["special"]))
        tokens.append((int(number), {**flags, "content": content, "replaces": True}))
    return [token for _, token in sorted(tokens, key=lambda pair: pair[0])]


def _listed(ids: Mapping[str, Any], files: Files) -> list[Token]:
    """Tokens of `added_tokens.json`, by their ids; none of them stands for nothing by itself."""
    if not all(isinstance(number, int) for number in ids.values()):
        raise _malformed(_ADDED, files)
    plain = dict.fromkeys(_FLAGS, False) | {"normalized": True, "replaces": False}
    return [{**plain, "content": content} for content in sorted(ids, key=ids.__getitem__)]


def _malformed(what: str, files: Files) -> TokenizerError:
    return TokenizerError(
        f"{what} of {files.origin} does not say which tokens have which ids: fetch it again"
    )
