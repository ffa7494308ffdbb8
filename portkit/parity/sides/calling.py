"""How a foreign callable is called: what it is given, under which names, and what it gives back.

Arguments go by name: portkit's own (`positions`, `cache`), or those of a model of Hugging Face
(`position_ids`, `past_key_values`, `cache_params`). A table of pairs may say it in one line,
`takes = input_ids as tokens, past as start_pos`; what nobody can know is asked for. Knows
signatures, and what others raise in a line; judges nothing.
"""

from __future__ import annotations

import inspect
import re
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from portkit.errors import PortError

ARGUMENTS = ("input_ids", "positions", "attention_mask", "cache")
"""What a callable is given, by place where it says nothing of its arguments."""
PAST = "past"
"""How many tokens stand before the pass: for whoever keeps its cache within."""
WITHIN = "cache within"
"""It keeps what it has seen in its own modules."""
_SPELLINGS = {
    "input_ids": ("input_ids", "tokens", "token_ids", "idx"),
    "positions": ("positions", "position_ids"),
    "attention_mask": ("attention_mask",),
    "cache": ("cache", "past_key_values", "cache_params", "kv_cache", "past_kv"),
}
_OF_HUGGING_FACE = {"position_ids", "past_key_values", "cache_params"}
_TAKEN = re.compile(r"(input_ids|positions|attention_mask|cache|past)(?:\s+as\s+([A-Za-z_]\w*))?")
_LIBRARIES = (str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"))
_OURS = str(Path(__file__).parents[2])
_ASK = "say it in a line of the table of pairs (--sites), such as"


@dataclass(frozen=True)
class Answer:
    """What a call gave back."""

    logits: Any
    cache: Any


@dataclass(frozen=True)
class Calling:
    """How one callable is called."""

    names: Mapping[str, str | None]
    """What it is given, and what the callable calls it; None: by place, in this order."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    """Arguments of its own that keep their defaults."""
    keeps_within: bool = False
    """What it has seen is kept in its modules, and goes on from there."""

    def takes(self, what: str) -> bool:
        return what in self.names

    def __call__(self, call: Callable[..., Any], values: Mapping[str, Any]) -> Answer:
        args = [values[what] for what, name in self.names.items() if name is None]
        named = {name: values[what] for what, name in self.names.items() if name is not None}
        with as_no_grad():
            return answer(call(*args, **named, **self.constants))


def calling(
    call: Callable[..., Any],
    origin: str,
    takes: str | None = None,
    inputs: Collection[str] | None = None,
) -> Calling:
    """How `call` is called. `takes`: what its user says of it; `inputs`: names of all that it is
    given. Raises `PortError`.
    """
    parameters = _parameters(call)
    if inputs is not None:
        return _by_inputs(inputs, takes, parameters, origin)
    if takes is not None:
        return _as_told(takes, parameters, origin)
    if parameters is None:  # something built in
        return Calling(dict.fromkeys(ARGUMENTS))
    kinds = {one.kind for one in parameters}
    own = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    if not own and inspect.Parameter.VAR_POSITIONAL in kinds:
        return Calling(dict.fromkeys(ARGUMENTS))
    names = _matched(own)
    of_hugging_face = bool(_OF_HUGGING_FACE & {*names.values()})
    unknown = [one for one in own if one.name not in names.values()]
    lacking = [one.name for one in unknown if one.default is one.empty]
    if "input_ids" not in names or lacking:
        raise PortError(_question(origin, own, names, lacking))
    if inspect.Parameter.VAR_KEYWORD in kinds and not of_hugging_face:
        names |= {what: what for what in ARGUMENTS if what not in names}
    constants = {"use_cache": True} if any(one.name == "use_cache" for one in unknown) else {}
    left = () if of_hugging_face else tuple(one.name for one in unknown)
    return Calling(_placed(names, own), constants, left)


def named(call: Callable[..., Any]) -> tuple[str, ...]:
    """The names that a callable gives to what it takes, whatever else it swallows."""
    return tuple(
        one.name
        for one in _parameters(call) or ()
        if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    )


def _by_inputs(
    inputs: Collection[str],
    takes: str | None,
    parameters: list[inspect.Parameter] | None,
    origin: str,
) -> Calling:
    if takes is not None:
        raise PortError(f"takes = {takes}: of named inputs a port is given all, by those names")
    kinds = {one.kind for one in parameters or ()}
    takes_any = parameters is None or inspect.Parameter.VAR_KEYWORD in kinds
    names = [one.name for one in parameters or ()]
    for name in inputs:
        if name not in names and not takes_any:
            raise PortError(
                f"{origin} takes ({', '.join(names)}) and no {name}: of named inputs it is given "
                "all, by those names"
            )
    return Calling(dict.fromkeys(inputs))


def answer(output: Any) -> Answer:
    """Logits and cache of what was returned: a pair, an object or mapping that names them."""
    if isinstance(output, Mapping):
        return Answer(output.get("logits"), _first(output.get, _SPELLINGS["cache"]))
    if isinstance(output, tuple) and not hasattr(output, "logits"):
        return Answer(*output) if len(output) == 2 else Answer(output, None)
    if hasattr(output, "logits"):
        return Answer(
            output.logits, _first(lambda name: getattr(output, name, None), _SPELLINGS["cache"])
        )
    return Answer(output, None)


@contextmanager
def as_no_grad() -> Iterator[None]:
    """Have `inference_mode` in the callable be no more than the `no_grad` that it runs under.

    The same numbers; but casts could not be seen there, and its tensors not be written to later.
    """
    kind = torch.inference_mode
    before = kind.__enter__, kind.__exit__
    kind.__enter__, kind.__exit__ = (lambda _: None), (lambda *_: None)  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = before  # type: ignore[method-assign]


def said(error: BaseException) -> str:
    """An error in one line: its kind, what it says first and last, and where it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " … ".join(f"{one:.200}" for one in dict.fromkeys((*lines[:1], *lines[-1:])))
    kind = type(error).__name__
    return (f"{kind}: {told}" if told else kind) + _place(error)


def _place(error: BaseException) -> str:
    """` (port.py, line 12: return x @ y)`: the innermost line that is no library's."""
    if isinstance(error, SyntaxError):
        return f" ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if not one.filename.startswith((*_LIBRARIES, _OURS, "<"))]
    if not (own or frames):
        return ""
    last = (own or frames)[-1]
    line = f": {last.line:.100}" if last.line else ""
    return f" ({last.filename}, line {last.lineno}{line})"


def is_harness(error: BaseException) -> bool:
    """Whether code of the harness raised it, in a hook of the callable's modules."""
    frames = list(traceback.walk_tb(error.__traceback__))
    module = str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""
    return module.startswith("portkit.parity.") and not module.endswith((".precision", ".once"))


def _parameters(call: Callable[..., Any]) -> list[inspect.Parameter] | None:
    function = getattr(call, "_orig_mod", call)
    function = function.forward if isinstance(function, nn.Module) else function
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def _placed(names: Mapping[str, str], own: list[inspect.Parameter]) -> dict[str, str | None]:
    """The same in the order in which they stand, without the names of what goes by place alone."""
    places = [one.name for one in own]
    nameless = {one.name for one in own if one.kind is one.POSITIONAL_ONLY}
    in_order = sorted(names.items(), key=lambda it: places.index(it[1]) if it[1] in places else 99)
    return {what: None if name in nameless else name for what, name in in_order}


def _matched(own: list[inspect.Parameter]) -> dict[str, str]:
    """What is given under which of its names; the first may be called anything, and is tokens."""
    found: dict[str, str] = {}
    for what, spellings in _SPELLINGS.items():
        name = next((one.name for one in own if one.name in spellings), None)
        if name is not None:
            found[what] = name
    for first in own[:1] if "input_ids" not in found else ():
        if first.default is first.empty and first.name not in found.values():
            found["input_ids"] = first.name
    return found


def _question(
    origin: str, own: list[inspect.Parameter], names: Mapping[str, str], lacking: list[str]
) -> str:
    what = " and ".join(lacking) or "where tokens go"
    known = [one if one == name else f"{one} as {name}" for one, name in names.items()]
    free = (one for one in ARGUMENTS if one not in names)
    asked = [f"{one} as {name}" for one, name in zip(free, lacking, strict=False)]
    example = ", ".join([*known, *asked]) or "input_ids as tokens"
    return (
        f"{origin} takes ({', '.join(one.name for one in own)}), and {what} may be anything: "
        f"{_ASK} takes = {example}"
    )


def _as_told(takes: str, parameters: list[inspect.Parameter] | None, origin: str) -> Calling:
    """By the line of a table: this and nothing else is given."""
    names: dict[str, str] = {}
    within = False
    for part in filter(None, map(str.strip, takes.split(","))):
        read = _TAKEN.fullmatch(part)
        if part == WITHIN:
            within = True
        elif read is None or read[1] in names:
            raise PortError(
                f"takes = {takes}: {part!r:.60} is none of {', '.join((*ARGUMENTS, PAST))} (each "
                f"once, and `as` its name there) or {WITHIN}"
            )
        else:
            names[read[1]] = read[2] or read[1]
    if "input_ids" not in names:
        raise PortError(f"takes = {takes}: input_ids is not among it")
    within |= PAST in names and "cache" not in names
    kinds = {one.name: one.kind for one in parameters or ()}
    if all(kind is inspect.Parameter.VAR_POSITIONAL for kind in kinds.values()):
        return Calling(dict.fromkeys(names), keeps_within=within)
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds.values()
    for name in names.values():
        if name not in kinds and not takes_any:
            raise PortError(f"takes = {takes}: {origin} has no {name}: ({', '.join(kinds)})")
    return Calling(_placed(names, parameters or []), keeps_within=within)


def _first(get: Callable[[str], Any], names: tuple[str, ...]) -> Any:
    return next((one for name in names if (one := get(name)) is not None), None)
