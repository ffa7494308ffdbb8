"""Reading `config.json` so that nothing in it goes unnoticed.

A family reads the keys it uses through a `ConfigReader`, pins those whose value it could only
ignore, and names those that are bookkeeping. What is left over is refused: a key that nobody read
may be the one that changes the arithmetic. Knows spellings, types and ranges; no family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from portkit.errors import InvalidConfig, UnsupportedConfig

_REQUIRED: Final[Any] = object()
_MAX_SIZE = 2**24  # beyond any released vocabulary or context; a larger number is a mistake
_PUBLISHED = "take the file that was published with the weights"
_MIN_NUMBER, _MAX_NUMBER = 1e-20, 1e20  # likewise; and arithmetic on what is between stays finite

# Written by training and serving code; a forward pass in evaluation mode never depends on them.
_BOOKKEEPING = frozenset(
    (
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "label2id",
        "max_length",
        "min_length",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    )
)

# rope type: the parameters it must have, and those it may have.
_ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings",),
    ),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}
_NEEDS_ORIGINAL_LENGTH = frozenset({"llama3", "yarn"})


class ConfigReader:
    """One JSON object of `config.json`, remembering which keys were read.

    `where` is what messages call it; `ignore` are the keys that the user chose to go on without.
    Reading a key of the wrong type or out of range raises `InvalidConfig`; a value that no port
    computes, `UnsupportedConfig`.
    """

    def __init__(
        self, raw: Mapping[str, Any], where: str = "config.json", ignore: Iterable[str] = ()
    ) -> None:
        self.raw = raw
        self.where = where
        self.ignored = frozenset(ignore) & raw.keys()
        self._ignore = frozenset(ignore)
        self._read: set[str] = set()
        self.choices: dict[str, tuple[str, ...]] = {}
        """The words that a key may hold, of each key that holds words; sections add theirs."""

    # -- values ------------------------------------------------------------------------------

    def size(
        self, key: str, default: Any = _REQUIRED, *, minimum: int = 1, maximum: int = _MAX_SIZE
    ) -> Any:
        """An integer within the bounds; `default` (None: optional) where absent or null."""
        value = self._value(key)
        if value is None:
            return self._default(key, default)
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

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
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
        if value is not None and not any(value == one for one in allowed):
            choice = " or ".join(repr(one) for one in allowed) or "null"
            raise UnsupportedConfig(
                f"{self.where}: {key} is {_short(value)}; supported: {choice} ({because})"
            )

    def bookkeeping(self, *keys: str) -> None:
        """Name keys that describe something other than the language model's arithmetic."""
        self._read.update(keys)

    def section(self, key: str) -> ConfigReader:
        """A nested object, read by a reader of its own."""
        value = self._value(key)
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        reader = ConfigReader(value, f"{self.where}, {key}", self._ignore)
        reader.choices = self.choices
        return reader

    def finish(self) -> None:
        """Refuse what is left: a key that nobody read."""
        self.pin("quantization_config", because="no port of a quantised checkpoint exists yet")
        self.pin("auto_map", because="the checkpoint brings its own code, which is never run")
        self.pin("is_encoder_decoder", False, because="only decoders are ported")
        self.pin("pruned_heads", {}, because="pruned heads change the shapes")
        left = self.raw.keys() - self._read - _BOOKKEEPING - self._ignore
        if left:
            named = ", ".join(f"{key} = {_short(self.raw[key])}" for key in sorted(left)[:3])
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise UnsupportedConfig(
                f"{self.where}: not understood: {named}{more}; if it cannot change the logits, "
                f"go on with --ignore-config {min(left)}"
            )

    # -- rotary embeddings ---------------------------------------------------------------------

    def rope(self, default_theta: float, max_position_embeddings: int) -> dict[str, Any]:
        """The rotary parameters of a model with one kind of layer, in the canonical spelling.

        `rope_scaling` wins over `rope_parameters` where both are given; theta is taken from inside,
        then from `rope_theta`, then from `default_theta`.
        """
        self._pin_partial_rotation()
        outer = self._value("rope_theta")
        newer, older = self._object("rope_parameters"), self._object("rope_scaling")
        given = older or newer
        theta = default_theta if outer is None else outer
        return self.rope_parameters(given, "rope parameters", theta, max_position_embeddings)

    def rope_by_layer_type(
        self,
        default_thetas: Mapping[str, float],
        legacy_theta_keys: Mapping[str, str],
        scaled: str,
        max_position_embeddings: int,
    ) -> dict[str, dict[str, Any]]:
        """The rotary parameters of each layer type, in the canonical spelling.

        Newer files nest `rope_parameters` by layer type; older ones have a theta of its own key for
        each type, and a `rope_scaling` that holds for the layer type `scaled` alone.
        """
        self._pin_partial_rotation()
        nested, scaling = self._object("rope_parameters"), self._object("rope_scaling")
        legacy = {kind: self._value(key) for kind, key in legacy_theta_keys.items()}
        if not nested.keys() <= default_thetas.keys():
            raise InvalidConfig(
                f"{self.where}: rope_parameters must be nested by layer type "
                f"({', '.join(default_thetas)}); a flat one would be silently without effect"
            )
        if nested and scaling:
            raise InvalidConfig(
                f"{self.where}: rope_scaling and rope_parameters are both given; keep one"
            )
        found = {}
        for kind, default_theta in default_thetas.items():
            theta = default_theta if legacy[kind] is None else legacy[kind]
            given = nested.get(kind, scaling if kind == scaled else {})
            where = f"rope parameters of {kind}"
            found[kind] = self.rope_parameters(given, where, theta, max_position_embeddings)
        return found

    def rope_parameters(
        self, given: Any, what: str, theta: Any, max_position_embeddings: int
    ) -> dict[str, Any]:
        """One set of rotary parameters, checked: known type, nothing missing, nothing unread."""
        if not isinstance(given, Mapping):
            raise InvalidConfig(f"{self.where}: {what} must be an object, not {_short(given)}")
        reader = ConfigReader({"rope_theta": theta, **given}, f"{self.where}, {what}", self._ignore)
        for key in ("rope_type", "type"):
            reader.pin(key, *_ROPE_TYPES, because="no other rotation is ported")
        named = {reader._value(key) for key in ("rope_type", "type")} - {None} or {"default"}
        if len(named) > 1:
            raise InvalidConfig(
                f"{reader.where}: rope_type and type contradict each other; keep one"
            )
        rope_type = named.pop()
        required, optional = _ROPE_TYPES[rope_type]
        found: dict[str, Any] = {"rope_type": rope_type, "rope_theta": reader.number("rope_theta")}
        for key in (*required, *optional):
            if key == "truncate":
                found[key] = reader.flag(key, True)
            elif key == "original_max_position_embeddings":
                found[key] = reader.size(key, None)
            else:
                found[key] = reader.number(key, _REQUIRED if key in required else None)
        if rope_type in _NEEDS_ORIGINAL_LENGTH:
            found["original_max_position_embeddings"] = (
                found["original_max_position_embeddings"] or max_position_embeddings
            )
        if found["rope_theta"] <= 1:
            raise reader._wrong("rope_theta", found["rope_theta"], "above 1")
        if rope_type == "llama3" and found["low_freq_factor"] >= found["high_freq_factor"]:
            raise reader._wrong(
                "low_freq_factor", found["low_freq_factor"], "below high_freq_factor"
            )
        reader.pin("partial_rotary_factor", 1.0, because="every channel of a head is rotated")
        reader.finish()
        return found

    def _pin_partial_rotation(self) -> None:
        self.pin("partial_rotary_factor", 1.0, because="every channel of a head is rotated")

    # -- whole object --------------------------------------------------------------------------

    def contradiction(self, what: str) -> InvalidConfig:
        """The error to raise where keys that are each well-formed do not go together."""
        return InvalidConfig(f"{self.where}: {what}")

    # -- plumbing ------------------------------------------------------------------------------

    def _value(self, key: str) -> Any:
        self._read.add(key)
        return None if key in self._ignore else self.raw.get(key)

    def _object(self, key: str) -> Mapping[str, Any]:
        value = self._value(key)
        if value is not None and not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return value or {}

    def _default(self, key: str, default: Any) -> Any:
        if default is _REQUIRED:
            raise InvalidConfig(f"{self.where}: {key} is missing; {_PUBLISHED}")
        return default

    def _wrong(self, key: str, value: Any, wanted: str) -> InvalidConfig:
        return InvalidConfig(f"{self.where}: {key} must be {wanted}, not {_short(value)}")


def check_heads(
    where: str, num_attention_heads: int, num_key_value_heads: int, head_dim: int
) -> None:
    """Query heads must share key heads evenly, and rotation pairs channels."""
    if num_attention_heads % num_key_value_heads:
        raise InvalidConfig(
            f"{where}: num_attention_heads {num_attention_heads} is not a multiple of "
            f"num_key_value_heads {num_key_value_heads}; {_PUBLISHED}"
        )
    if num_attention_heads * head_dim > _MAX_SIZE:
        raise InvalidConfig(
            f"{where}: num_attention_heads {num_attention_heads} times head_dim {head_dim} must be "
            f"at most {_MAX_SIZE}; {_PUBLISHED}"
        )
    if head_dim % 2:
        raise InvalidConfig(
            f"{where}: head_dim {head_dim} is odd, and rotation pairs channels; {_PUBLISHED}"
        )


def default_head_dim(where: str, hidden_size: int, num_attention_heads: int) -> int:
    """`hidden_size / num_attention_heads`, for a file without `head_dim`."""
    if hidden_size % num_attention_heads:
        raise InvalidConfig(
            f"{where}: hidden_size {hidden_size} is not a multiple of num_attention_heads "
            f"{num_attention_heads}, and head_dim is not given; {_PUBLISHED}"
        )
    return hidden_size // num_attention_heads


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
