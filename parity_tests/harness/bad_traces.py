"""What can be wrong with a trace file: one row each, with the words that are said of it.

A row changes a sound trace, tensors and description, or the bytes of its file. Words are exact up
to the names of files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Described = dict[str, Any]
Tensors = dict[str, Tensor]
AGAIN = "; record it again, or mend what wrote it"
MLP = "model.layers.1.mlp"


@dataclass(frozen=True)
class Bad:
    """A damage, and what is said of it."""

    name: str
    said: str
    change: Callable[[Tensors, Described], object] = lambda *_: None
    spoil: Callable[[bytes], bytes] = lambda raw: raw


def put(**changed: object) -> Callable[[Tensors, Described], None]:
    return lambda _, described: described.update(changed)


def drop(key: str) -> Callable[[Tensors, Described], None]:
    return lambda _, described: described.pop(key)  # type: ignore[no-any-return]


def in_pass(**changed: object) -> Callable[[Tensors, Described], None]:
    return lambda _, described: described["passes"][0].update(changed)


def in_site(number: int, **changed: object) -> Callable[[Tensors, Described], None]:
    return lambda _, described: described["sites"][number].update(changed)


def floor(value: object) -> Callable[[Tensors, Described], None]:
    return put(floors={MLP: value})


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, Described], None]:
    return lambda tensors, _: tensors.__setitem__(name, change(tensors[name]).contiguous())


def _without_site(tensors: Tensors, _: Described) -> None:
    for name in [name for name in tensors if name.endswith(f"/{MLP}")]:
        del tensors[name]


def _twice(_: Tensors, described: Described) -> None:
    described["sites"].append({"name": MLP, "dims": "batch position channel"})


def _not_json(raw: bytes) -> bytes:
    return raw.replace(b'{\\"format\\"', b'<\\"format\\"', 1)


def _no_trace(raw: bytes) -> bytes:
    return raw.replace(b"portkit.trace", b"another.trace", 1)


UNREADABLE = [
    Bad("truncated", "is truncated or no safetensors file (", spoil=lambda raw: raw[:-100]),
    Bad("cut in its header", "is truncated or no safetensors file (", spoil=lambda raw: raw[:500]),
    Bad("empty", "is truncated or no safetensors file (", spoil=lambda _: b""),
    Bad("text", "is truncated or no safetensors file (", spoil=lambda _: b"a text, no trace"),
    Bad(
        "of no trace",
        "is no trace: its metadata has no portkit.trace; docs/traces.md says how one is written",
        spoil=_no_trace,
    ),
    Bad("of no JSON", ": portkit.trace in its metadata is not JSON (", spoil=_not_json),
    Bad(
        "of another format",
        "is a trace of format 2, this portkit reads format 1: record it again, or install the "
        "portkit that wrote it",
        put(format=2),
    ),
    Bad("without a model", f": model is None where text is due{AGAIN}", drop("model")),
    Bad("a dtype that is none", f": dtype is 16 where text is due{AGAIN}", put(dtype=16)),
    Bad(
        "threads in words",
        f": threads is 'one' where a whole number is due{AGAIN}",
        put(threads="one"),
    ),
    Bad("no passes", ": its passes: this is no probe that portkit wrote (", drop("passes")),
    Bad("a pass in words", ": its passes: ", put(passes=["short"])),
    Bad("logits in words", ": its passes: ", in_pass(num_logits="all")),
    Bad(
        "positions of other tokens",
        ": its passes: pass 'short' of the probe: input_ids, positions, attention_mask and",
        in_pass(positions=[[0]]),
    ),
    Bad(
        "a pass with a slash",
        f": a pass is called 'a/b', which holds a slash or worse{AGAIN}",
        in_pass(name="a/b"),
    ),
    Bad(
        "no sites",
        f": sites is no list of names and dims in order of execution{AGAIN}",
        put(sites=[]),
    ),
    Bad(
        "a site without dims",
        ": sites lists {'name': 'model.embed_tokens', 'dims': None}, which has no name and dims",
        in_site(0, dims=None),
    ),
    Bad(
        "tokens of two kinds",
        ": the dims of model.embed_tokens, 'batch position query', have more than one of position "
        f"and query{AGAIN}",
        in_site(0, dims="batch position query"),
    ),
    Bad(
        "a word twice",
        ": the dims of model.embed_tokens, 'batch channel channel', are not words, each there once",
        in_site(0, dims="batch channel channel"),
    ),
    Bad("a site twice", f": lists the site {MLP} twice{AGAIN}", _twice),
    Bad(
        "a site that is missing",
        f": lists the site {MLP} and holds no tensor of it{AGAIN}",
        _without_site,
    ),
    Bad(
        "a tensor of no site",
        ": holds 'short/model.unheard_of', which its passes and sites lack",
        lambda tensors, _: tensors.update({"short/model.unheard_of": torch.ones(1)}),
    ),
    Bad(
        "other dimensions",
        f": short/{MLP} of shape [2, 12, 320, 1] does not fit 'batch position channel': it has 4 "
        f"dimensions, which are not made of these{AGAIN}",
        tensor(f"short/{MLP}", lambda one: one[..., None]),
    ),
    Bad(
        "other rows",
        f": short/{MLP} of shape [3, 12, 320] does not fit 'batch position channel': the pass has "
        f"2 rows{AGAIN}",
        tensor(f"short/{MLP}", lambda one: one[[0, 1, 1]]),
    ),
    Bad(
        "more tokens than were run",
        f": short/{MLP} of shape [2, 24, 320] does not fit 'batch position channel': the pass has "
        f"12 tokens there{AGAIN}",
        tensor(f"short/{MLP}", lambda one: one.repeat(1, 2, 1)),
    ),
    Bad(
        "more tokens than were kept",
        ": short/#logits of shape [2, 12, 509] does not fit 'batch position vocabulary': "
        f"last_tokens is 5{AGAIN}",
        put(last_tokens=5),
    ),
    Bad("no last tokens", ": last_tokens is 0 where a number from 1 on is due", put(last_tokens=0)),
    Bad(
        "a floor of no site",
        ": floors names 'model.unheard_of', which is none of its sites",
        put(floors={"model.unheard_of": {"rms": 1e-3}}),
    ),
    Bad(
        "a floor below zero",
        f": the floor of {MLP} is not made of numbers from 0 on{AGAIN}",
        floor({"rms": -1e-3}),
    ),
    Bad(
        "in floats of one byte",
        f": short/{MLP} is stored as F8_E4M3, which is not compared: cast it{AGAIN}",
        tensor(f"short/{MLP}", lambda one: one.to(torch.float8_e4m3fn)),
    ),
    Bad(
        "in complex numbers",
        f": short/{MLP} is stored as C64, which is not compared: cast it{AGAIN}",
        tensor(f"short/{MLP}", lambda one: one.to(torch.complex64)),
    ),
    Bad(
        "a floor of 400 digits",
        f": the floor of {MLP} is not made of numbers from 0 on{AGAIN}",
        floor({"rms": 10**400}),
    ),
    Bad(
        "a floor whose square is none",
        f": the floor of {MLP} is not made of numbers from 0 on{AGAIN}",
        floor({"rms": 1e200}),
    ),
    Bad("a floor in words", f": the floor of {MLP} is not made of numbers", floor("small")),
    Bad(
        "a floor of other channels",
        f": the floor of {MLP} has 3 channels{AGAIN}",
        floor({"rms": 1e-3, "channels": [1e-3] * 3}),
    ),
]
"""Refused by whatever reads a trace, with exit code 2."""

GOLDEN = [
    Bad(
        "of another model",
        " was recorded of 'other', whose config.json has sha256 abababababab…, and that of ",
        put(model="other", config_sha256="ab" * 32),
    ),
    Bad(
        "in a dtype that is not run",
        " is in 'float8'; the port runs in float32, bfloat16, float16",
        put(dtype="float8"),
    ),
    Bad(
        "with NaN",
        f" holds NaN at {MLP} in short: nothing can be held against it; record a sound model",
        tensor(f"short/{MLP}", lambda one: torch.full_like(one, torch.nan)),
    ),
    Bad(
        "of a larger vocabulary",
        "pass 'short' of the probe: token 509 is outside a vocabulary of 509; choose other tokens",
        in_pass(input_ids=[[509] * 12] * 2),
    ),
    Bad(
        "of other dims",
        ": model.embed_tokens has the dims 'batch position hidden' where the model has 'batch "
        "position channel'; record it again",
        in_site(0, dims="batch position hidden"),
    ),
]
"""Refused by `portkit parity --golden`, with exit code 2."""


def renamed(tensors: Tensors, described: Described) -> None:
    """Every site called as another framework might."""
    for one in described["sites"]:
        one["name"] = f"net.{one['name']}"
    described["floors"] = None
    for name in [*tensors]:
        of, _, site = name.partition("/")
        tensors[f"{of}/net.{site}"] = tensors.pop(name)


def other_pass(tensors: Tensors, described: Described) -> None:
    """The passes called otherwise."""
    text = json.dumps(described["passes"])
    described["passes"] = json.loads(text.replace('"short', '"mine'))
    for name in [name for name in tensors if name.startswith("short")]:
        tensors[name.replace("short", "mine", 1)] = tensors.pop(name)


DIFF = [
    Bad(
        "of another probe",
        " are of different probes: pass 'short' has other input_ids; record both on one (--tokens "
        "FILE)",
        in_pass(input_ids=[[7] * 12] * 2),
    ),
    Bad(
        "at other positions",
        " are of different probes: pass 'short' has other positions; record both on one",
        in_pass(positions=[[*range(1, 13)]] * 2),
    ),
    Bad(
        "with other padding",
        " are of different probes: pass 'short' has other attention_mask; record both on one",
        in_pass(attention_mask=[[0] + [1] * 11] * 2),
    ),
    Bad("of other passes", " have no pass in common: short there, mine here; record", other_pass),
    Bad(
        "of other names",
        " have no site in common: model.embed_tokens, model#cos.full_attention, ",
        renamed,
    ),
]
"""Refused by `portkit diff`, with exit code 2."""
