"""A config with one field moved: the nearest values that a port could have read in its place.

Rules go by a value's type: a number to the next, a flag to the other, a word to another that may
stand there, a list by layer shifted by one, what is off to the least that it could be. Rotary
parameters are fields of their own. Knows no family, and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_type_hints

from portkit.nn.rope import RopeParameters, of_another_type

STEP = 1 + 1 / 64
"""Two of bfloat16's steps: no rounding undoes it."""
_LEAST: Mapping[type, Any] = {float: 1.0, int: 2}
"""What an absent number could be."""


@dataclass(frozen=True)
class Neighbour:
    """A config of which one field has another value."""

    config: Any
    was: Any
    becomes: Any

    @property
    def said(self) -> str:
        """`24 read as 25`; of a list the first layer whose value is another."""
        if isinstance(self.was, tuple):
            pairs = enumerate(zip(self.was, self.becomes, strict=True))
            layer, (was, becomes) = next(each for each in pairs if each[1][0] != each[1][1])
            return f"{was!r} of layer {layer} read as {becomes!r}"
        return f"{_short(self.was)} read as {_short(self.becomes)}"


@dataclass(frozen=True)
class Move:
    """One way in which a field can be wrong: neighbours, the nearest first."""

    field: str
    """`rope_parameters.full_attention.factor`"""
    neighbours: tuple[Neighbour, ...]
    """None: no rule knows another value."""

    @property
    def top(self) -> str:
        """The field of the config that it is, or is a part of."""
        return self.field.partition(".")[0]


@dataclass(frozen=True)
class _Place:
    """A value within a config, and the config that has another there."""

    path: str
    value: Any
    hint: Any
    words: tuple[str, ...]
    put: Callable[[Any], Any]


def moves(config: Any, choices: Mapping[str, tuple[str, ...]]) -> Iterator[Move]:
    """All moves of all fields of a family's config; `choices`: the words that some may hold."""
    for place in _places(config, choices):
        for others in _moved(place.value, place.hint, place.words):
            found = (Neighbour(place.put(other), place.value, other) for other in others)
            yield Move(place.path, tuple(found))


def _places(config: Any, choices: Mapping[str, tuple[str, ...]]) -> Iterator[_Place]:
    hints = get_type_hints(type(config))
    for one in fields(config):
        name, value = one.name, getattr(config, one.name)

        def put(other: Any, name: str = name) -> Any:
            return replace(config, **{name: other})

        if isinstance(value, RopeParameters):
            yield from _of_rotation(name, value, put)
        elif isinstance(value, Mapping) and _are_rotations(value):
            for key, rope in value.items():

                def put_for(other: Any, key: str = key, all_: Any = value, put: Any = put) -> Any:
                    return put({**all_, key: other})

                yield from _of_rotation(f"{name}.{key}", rope, put_for)
        else:
            yield _Place(name, value, hints[name], choices.get(name, ()), put)


def _of_rotation(path: str, rope: RopeParameters, put: Callable[[Any], Any]) -> Iterator[_Place]:
    """The rotary parameters that are given."""
    hints, other_type = get_type_hints(RopeParameters), of_another_type(rope)
    for one in fields(rope):
        name, value = one.name, getattr(rope, one.name)

        def put_in(other: Any, name: str = name) -> Any:
            return put(other_type if name == "rope_type" else replace(rope, **{name: other}))

        if value is not None:
            words = (other_type.rope_type,) if name == "rope_type" else ()
            yield _Place(f"{path}.{name}", value, hints[name], words, put_in)


def _moved(value: Any, hint: Any, words: tuple[str, ...]) -> Iterator[list[Any]]:
    if isinstance(value, tuple):
        yield from _moved_list(value, hint, words)
    elif isinstance(value, frozenset):
        yield [value ^ {0}]  # of layers: whether the first is one of them
    else:
        yield _nearest(value, hint, words)


def _moved_list(value: tuple[Any, ...], hint: Any, words: tuple[str, ...]) -> Iterator[list[Any]]:
    """By layer: the order shifted by one, and each number moved wherever it stands."""
    shifted = (*value[1:], *value[:1])
    numbers = [one for one in dict.fromkeys(value) if one and type(one) in (int, float)]
    if shifted != value:
        yield [shifted]
    for one in numbers:
        nearest = _nearest(one, hint, words)
        yield [tuple(other if x == one else x for x in value) for other in nearest]
    if shifted == value and not numbers:
        yield [(other, *value[1:]) for other in _nearest(value[0], hint, words)]


def _nearest(value: Any, hint: Any, words: tuple[str, ...]) -> list[Any]:
    if value is None:
        inner = next((one for one in get_args(hint) if get_args(one)), hint)
        return [least for kind, least in _LEAST.items() if kind in get_args(inner)]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, 2 * value, value // 2]
    if isinstance(value, float):
        return [value * STEP, value / STEP, 2 * value, value / 2] if value else [STEP - 1]
    return [word for word in words if word != value]


def _are_rotations(values: Mapping[str, Any]) -> bool:
    return all(isinstance(one, RopeParameters) for one in values.values())


def _short(value: Any) -> str:
    """A value as a line has room for it."""
    text = repr(sorted(value)) if isinstance(value, frozenset) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
