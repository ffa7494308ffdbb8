"""One JSON object of `config.json`, and which of its keys were asked for.

Knows types and ranges, how keys that were left over are refused, and which of them are told; no
family, and no key but those of the tables in `everywhere.py`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from portkit.config.everywhere import FREE, LACKED, PINNED, SETTINGS, Pinned
from portkit.errors import InvalidConfig, UnsupportedConfig

REQUIRED: Final[Any] = object()
MAX_SIZE = 2**24  # beyond any released vocabulary or context; a larger number is a mistake
PUBLISHED = "take the file that was published with the weights"
_MIN_NUMBER, _MAX_NUMBER = 1e-20, 1e20  # likewise; and arithmetic on what is between stays finite


class ConfigReader:
    """One JSON object of `config.json`, remembering which keys were read.

    `where` is what messages call it; `ignore` are the keys that the user chose to go on without,
    by themselves or with the objects that they are in (`rope_scaling.factor`). Reading a key of the
    wrong type or out of range raises `InvalidConfig`; a value that no port computes,
    `UnsupportedConfig`.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        where: str = "config.json",
        ignore: Iterable[str] = (),
        path: str = "",
    ) -> None:
        self.raw = raw
        self.where = where
        self._ignore = frozenset(ignore)
        self._path = path
        self._read: set[str] = set()
        self._told: list[str] = []
        self._sections: list[ConfigReader] = []
        self.choices: dict[str, tuple[str, ...]] = {}
        """The words that a key may hold, of each key that holds words; sections add theirs."""

    @property
    def ignored(self) -> frozenset[str]:
        """The keys that are there and that the user chose to go on without, sections' included."""
        own = {self._path + key for key in self.raw if self._is_ignored(key)}
        return frozenset(own.union(*(section.ignored for section in self._sections)))

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever loads the checkpoint should know, sections' included."""
        return tuple(note for reader in self._all() for note in reader._told)

    # -- values ------------------------------------------------------------------------------

    def size(
        self,
        key: str,
        default: Any = REQUIRED,
        *,
        null: Any = REQUIRED,
        minimum: int = 1,
        maximum: int = MAX_SIZE,
    ) -> Any:
        """An integer within the bounds; `default` (None: optional) where absent.

        Null is `null` where that is given, else silence like an absent key.
        """
        value = self._value(key)
        if value is None:
            says_null = key in self.raw and not self._is_ignored(key)
            has_meaning = says_null and null is not REQUIRED
            return null if has_meaning else self._default(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "an integer")
        if not minimum <= value <= maximum:
            raise self._wrong(key, value, f"between {minimum} and {maximum}")
        return value

    def padding_row(self, vocab_size: int, default: int | None = None) -> int | None:
        """`pad_token_id` as a row of the embedding, which gets no gradient; None: there is none.

        A negative one counts from the end. `default` is what the family takes where the key is
        absent; null says that there is none.
        """
        value = self._value("pad_token_id")
        if value is None:
            value = None if "pad_token_id" in self.raw else default
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise self._wrong("pad_token_id", value, "an integer")
        if value is None or not -vocab_size <= value < vocab_size:
            return None  # no row of this embedding
        return value % vocab_size

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A number above zero, as a float; `default` where the key is absent or null."""
        value = self._value(key)
        if value is None:
            return self._default(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        if not _MIN_NUMBER <= value <= _MAX_NUMBER:
            raise self._wrong(key, value, f"between {_MIN_NUMBER:g} and {_MAX_NUMBER:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; `default` where the key is absent or null."""
        value = self._value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def switch(self, key: str, default: bool) -> bool:
        """A boolean that some files write as a number: any but zero is true."""
        value = self._value(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value != 0
        return self.flag(key, default)

    def words(self, key: str, length: int, allowed: Sequence[str]) -> tuple[str, ...] | None:
        """A list of `length` words out of `allowed`, or None where the key is absent or null."""
        self.choices[key] = tuple(allowed)
        value = self._value(key)
        if value is None:
            return None
        self._each(key, value, length)
        for word in value:
            if word not in allowed:
                raise UnsupportedConfig(
                    f"{self.where}: {key} holds {_short(word)}; supported: {', '.join(allowed)}"
                )
        return tuple(value)

    def sizes(self, key: str, length: int) -> tuple[int, ...]:
        """A size for each of `length` layers: a list of so many, or one integer for all."""
        value = self._value(key)
        if not isinstance(value, list):
            return (self.size(key),) * length
        return tuple(map(self._each(key, value, length).size, map(str, range(length))))

    def fractions(self, key: str, length: int) -> tuple[float, ...] | None:
        """A list of `length` numbers from 0 up to 1, without it; None where absent or null."""
        value = self._value(key)
        if value is None:
            return None
        self._each(key, value, length)
        for one in value:
            if isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one < 1:
                raise self._wrong(f"each of {key}", one, "a number from 0 up to, without, 1")
        return tuple(map(float, value))

    def _each(self, key: str, value: Any, length: int) -> ConfigReader:
        """A reader of a list's elements, whose keys are their places."""
        if not isinstance(value, list) or len(value) != length:
            raise self._wrong(key, value, f"a list of {length}, one for each layer")
        return ConfigReader(
            dict(zip(map(str, range(length)), value, strict=True)), f"{self.where}, {key}"
        )

    def layers(self, key: str, num_layers: int) -> frozenset[int] | None:
        """A list of layers by number, or None where the key is absent or null."""
        value = self._value(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(one) is int for one in value):
            raise self._wrong(key, value, "a list of layer numbers")
        if beyond := [one for one in value if not 0 <= one < num_layers]:
            raise self.contradiction(
                f"{key} names layer {beyond[0]}, and there are {num_layers}, from 0 on"
            )
        return frozenset(value)

    def bits(self, key: str, num_layers: int) -> tuple[bool, ...] | None:
        """A list with 0 or 1 for each layer, or None where the key is absent, null or empty."""
        value = self._value(key)
        if value is None or value == []:
            return None
        if (
            not isinstance(value, list)
            or len(value) != num_layers
            or any(one not in (0, 1) for one in value)
        ):
            raise self._wrong(key, value, f"a list of {num_layers}, 0 or 1 for each layer")
        return tuple(map(bool, value))

    def pin(self, key: str, *allowed: Any, because: str) -> None:
        """Refuse any value but those under which leaving the key out of the port is right."""
        value = self._value(key)
        if value is not None and not _is_one_of(value, allowed):
            choice = " or ".join(repr(one) for one in allowed) or "null"
            raise UnsupportedConfig(
                f"{self.where}: {key} is {_short(value)}; supported: {choice} ({because})"
            )

    def word(self, key: str, *allowed: str, because: str) -> str | None:
        """One of the words, or None where the key is absent or null."""
        self.pin(key, *allowed, because=because)
        value: str | None = self._value(key)
        return value

    def lacks(self, *features: str) -> None:
        """Pin the keys by which a file can say that it has what the family lacks (`LACKED`)."""
        for feature in features:
            self._pin_all(LACKED[feature])

    def told(self, key: str, because: str) -> None:
        """Name a key that has no effect whatever it holds; if it is there, the notes say so."""
        if self._value(key) is not None:
            self.tell(key, because)

    def tell(self, key: str, what: str) -> None:
        """Note of a key that is there: it is not what is computed, nor by the reference."""
        value = _short(self.raw[key])
        self._told.append(
            f"config.json: {self._path}{key} = {value} has no effect, as in the reference: {what}"
        )

    def bookkeeping(self, *keys: str) -> None:
        """Name keys that describe something other than the language model's arithmetic."""
        self._read.update(keys)

    def section(self, key: str) -> ConfigReader:
        """A nested object, read by a reader of its own."""
        return self._nested(key)

    def optional_section(self, key: str) -> ConfigReader | None:
        """The same; None where the key is absent, null or an empty object."""
        value = self._value(key)
        return None if value is None or value == {} else self._nested(key)

    def _nested(self, key: str) -> ConfigReader:
        value = self._value(key)
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        path = f"{self._path}{key}."
        reader = ConfigReader(value, f"{self.where}, {key}", self._ignore, path)
        reader.choices = self.choices
        self._sections.append(reader)
        return reader

    def finish(self) -> None:
        """Refuse what is left, here and in the sections: keys that nobody read, all at once."""
        left: dict[str, Any] = {}
        for reader in self._all():
            reader._pin_all({key: how for key, how in PINNED.items() if key not in reader._read})
            left |= reader._left()
        if left:
            named = ", ".join(f"{path} = {_short(value)}" for path, value in left.items())
            can = "it cannot change" if len(left) == 1 else "none of them can change"
            keys = shlex.quote(",".join(left))
            raise UnsupportedConfig(
                f"{self.where}: not understood: {named}; if {can} the logits, "
                f"go on with --ignore-config {keys}"
            )

    # -- whole object --------------------------------------------------------------------------

    def contradiction(self, what: str) -> InvalidConfig:
        """The error to raise where keys that are each well-formed do not go together."""
        return InvalidConfig(f"{self.where}: {what}")

    # -- plumbing ------------------------------------------------------------------------------

    def _value(self, key: str) -> Any:
        self._read.add(key)
        return None if self._is_ignored(key) else self.raw.get(key)

    def _is_ignored(self, key: str) -> bool:
        return key in self._ignore or self._path + key in self._ignore

    def _all(self) -> Iterator[ConfigReader]:
        """This reader and those of all sections."""
        yield self
        for section in self._sections:
            yield from section._all()

    def _pin_all(self, pinned: Pinned) -> None:
        for key, (allowed, because) in pinned.items():
            self.pin(key, *allowed, because=because)

    def _left(self) -> dict[str, Any]:
        """The keys that nobody read, by their paths, but for those that any config may hold."""
        return {
            self._path + key: value
            for key, value in self.raw.items()
            if not (key in self._read or key in FREE or self._is_ignored(key))
            and not (key in SETTINGS and (value is None or _is_one_of(value, [SETTINGS[key]])))
        }

    def _default(self, key: str, default: Any) -> Any:
        if default is REQUIRED:
            raise InvalidConfig(f"{self.where}: {key} is missing; {PUBLISHED}")
        return default

    def _wrong(self, key: str, value: Any, wanted: str) -> InvalidConfig:
        return InvalidConfig(f"{self.where}: {key} must be {wanted}, not {_short(value)}")


def _is_one_of(value: Any, allowed: Iterable[Any]) -> bool:
    """By value; but true is not 1, nor false 0."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
