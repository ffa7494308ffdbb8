"""How text is generated: `generation_config.json`, overridden by whoever asks.

Knows which of that file's keys are used, which change nothing here, and which would change the text
in a way that portkit does not offer: those are refused by name. Knows no model and no tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from portkit.checkpoint import Files
from portkit.errors import GenerationError
from portkit.json_reading import read_object

_FILE = "generation_config.json"

# Other ways to the same text (caches, drafts, compilation), what is reported beside it, notes of
# whoever wrote the file, and what only beam search reads.
_BOOKKEEPING = frozenset(
    {
        "transformers_version",
        "_from_model_config",
        "trust_remote_code",
        "bos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "prefill_chunk_size",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "low_memory",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "speculation_type",
        "use_mtp",
        "renormalize_logits",
        "remove_invalid_values",  # there are none: a model that says NaN is an error here
        "early_stopping",
        "length_penalty",
        "num_beam_groups",
        "diversity_penalty",
    }
)

# What changes the text unless it has one of these values.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "typical_p": (1.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "dola_layers": (),
    "token_healing": (False,),
    "max_time": (),
}

_DRAWING = frozenset(
    {"temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"}
)
"""Only sampling reads these."""
_SEARCHING = frozenset({"penalty_alpha"})
"""Only greedy decoding reads these."""

_KEYS = {
    "eos_token_ids": ("eos_token_id",),
    "stop": ("stop_strings",),
    "max_new_tokens": ("max_new_tokens", "max_length"),
}
"""Which keys a field replaces that has another name or more to say."""

_MOST = 1e300
"""A number of more digits is no float."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class GenerationSettings:
    """Everything besides model and prompt that decides the text.

    The filters apply in this order: repetition penalty (sampling or not), and then, only where
    `do_sample` is true: temperature, top-k, top-p, min-p. Each has a value that switches it off.

    do_sample           draw the next token; False takes the likeliest
    temperature         > 0; 1 is off
    top_k               keep the k likeliest; 0 is off. The reference's default is 50, and so ours
    top_p               keep the likeliest that hold this much probability, 0 to 1; 1 is off
    min_p               keep what is at least this likely, relative to the likeliest; 0 is off
    repetition_penalty  > 0; 1 is off, above makes tokens that occurred less likely
    max_new_tokens      tokens at most, per prompt
    max_length          tokens at most, prompt included; None is no limit
    eos_token_ids       a token that ends its row
    stop                texts that end their row; what is returned ends before them
    seed                row i of a batch draws from a generator of its own, seeded `seed + i`

    Raises GenerationError for values outside these ranges.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 200
    max_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            0 < self.temperature < inf,
            f"temperature must be above 0 and finite, not {self.temperature}: for the likeliest "
            "token each time do not sample (--greedy)",
        )
        _require(self.top_k >= 0, f"top_k must be 0 (off) or more, not {self.top_k}")
        _require(0 <= self.top_p <= 1, f"top_p must be from 0 to 1, not {self.top_p}")
        _require(0 <= self.min_p <= 1, f"min_p must be from 0 to 1, not {self.min_p}")
        _require(
            0 < self.repetition_penalty < inf,
            "repetition_penalty must be above 0 and finite (1 is off), not "
            f"{self.repetition_penalty}",
        )
        _require(
            self.max_new_tokens > 0, f"max_new_tokens must be at least 1, not {self.max_new_tokens}"
        )
        _require(all(self.stop), "a stop string must not be empty: leave it out")
        _require(0 <= self.seed < 2**63, f"seed must be from 0 to 2**63 - 1, not {self.seed}")

    @classmethod
    def read(
        cls,
        files: Files,
        *,
        ignore: Collection[str] = (),
        say: Say = lambda _: None,
        **options: Any,
    ) -> GenerationSettings:
        """What `generation_config.json` says; of a checkpoint without one, the defaults.

        `options` are fields, as `override` takes them. What they replace is not looked at, nor are
        keys in `ignore`, nor, as in Transformers, numbers of sampling where nothing is drawn. An
        EOS that the file does not name is looked up in `config.json`. `say` gets a line where a
        file is taken as it is meant and Transformers takes it otherwise.

        Raises GenerationError for a value out of range, a key that portkit does not offer, and a
        key that it does not know.
        """
        given = {field: value for field, value in options.items() if value is not None}
        unread = {*ignore, *(key for field in given for key in _KEYS.get(field, (field,)))}
        raw = _read_object(files, _FILE) if files.has(_FILE) else {}
        raw = {key: value for key, value in raw.items() if value is not None and key not in unread}
        if "eos_token_id" not in raw and "eos_token_ids" not in given:
            raw |= _eos_of_config(files, say)
        try:
            found = _fields(raw, given.get("do_sample"), say)
        except GenerationError as error:
            raise GenerationError(f"{_FILE} of {files.origin}: {error}") from error
        return cls().override(**found).override(**given)

    def override(self, **options: Any) -> GenerationSettings:
        """The same with the given fields changed; an option that is None was not given.

        `max_new_tokens` lifts a `max_length` that was set before it. Raises as the class does.
        """
        given = {field: value for field, value in options.items() if value is not None}
        if "max_new_tokens" in given:
            given["max_length"] = None
        return replace(self, **given)


def _fields(raw: Mapping[str, Any], do_sample: bool | None, say: Say) -> dict[str, Any]:
    """The fields that the file's keys give, each checked.

    `do_sample` is what was asked for, whatever the file says; None where nothing was.
    """
    fields: dict[str, Any] = {}
    if do_sample is None:
        do_sample = fields["do_sample"] = _samples(raw, say)
    unread = {"do_sample", *_BOOKKEEPING, *(_SEARCHING if do_sample else _DRAWING)}
    raw = {key: value for key, value in raw.items() if key not in unread}
    for key, value in _as_meant(raw, say).items():
        try:
            if key in _READERS:
                read = _READERS[key](key, value)
                fields |= read
                GenerationSettings(**read)  # raises
            elif value not in _NEUTRAL.get(key, ()):
                known = (
                    "is not supported" if key in _NEUTRAL else "is a key that portkit does not know"
                )
                raise GenerationError(f"{key} = {json.dumps(value):.60} {known}")
        except GenerationError as error:
            raise GenerationError(f"{error}; --ignore-config {key} goes on without it") from error
    return fields


def _samples(raw: Mapping[str, Any], say: Say) -> bool:
    """Whether the file means to draw: a temperature of 0 means that it does not."""
    said = raw.get("do_sample", False)
    _require(
        said in (0, 1) and isinstance(said, int),
        f"do_sample must be true or false, not {json.dumps(said):.60}: give --sample or --greedy",
    )
    if said and raw.get("temperature") == 0:
        say("a temperature of 0 is greedy decoding; Transformers refuses it beside do_sample")
        return False
    return bool(said)


def _as_meant(raw: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Numbers of sampling that others write for "off", as it is written here."""
    meant = dict(raw)
    if raw.get("top_k") == -1:
        say("a top_k of -1 is off, as other engines have it; Transformers refuses it")
        meant["top_k"] = 0
    if isinstance(raw.get("top_p"), int | float) and 1 < raw["top_p"] < inf:
        meant["top_p"] = 1.0  # as in Transformers
    return meant


def _read_object(files: Files, name: str) -> dict[str, Any]:
    what = f"{name} of {files.origin}"
    return read_object(files.path(name), what, GenerationError, "fetch it again or repair it")


def _eos_of_config(files: Files, say: Say) -> dict[str, Any]:
    """`eos_token_id` of `config.json`, where a multimodal checkpoint may keep it with the text."""
    config = _read_object(files, "config.json") if files.has("config.json") else {}
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("eos_token_id") is not None:
            found = part["eos_token_id"]
            if files.has(_FILE):
                say(
                    f"{_FILE} names no EOS: text ends at config.json's eos_token_id "
                    f"{json.dumps(found)}, where Transformers goes on"
                )
            return {"eos_token_id": found}
    return {}


def _number(key: str, value: Any) -> dict[str, float]:
    _require(
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST,
        f"{key} must be a number, not {json.dumps(value):.60}",
    )
    return {key: float(value)}


def _count(key: str, value: Any) -> dict[str, int]:
    _require(
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63,
        f"{key} must be a whole number, not {json.dumps(value):.60}",
    )
    return {key: int(value)}


def _strings(key: str, value: Any) -> dict[str, tuple[str, ...]]:
    strings = (value,) if isinstance(value, str) else tuple(value) if type(value) is list else ()
    _require(
        bool(strings) and all(isinstance(string, str) for string in strings),
        f"{key} must be a string or a list of strings",
    )
    return {"stop": strings}


def _token_ids(key: str, value: Any) -> dict[str, tuple[int, ...]]:
    ids = value if isinstance(value, list) else [value]
    _require(
        all(
            isinstance(token_id, int | float)
            and not isinstance(token_id, bool)
            and abs(token_id) < 1 << 63
            and token_id == token_id // 1
            for token_id in ids
        ),
        f"{key} must be a token id or a list of them, not {json.dumps(value):.60}",
    )
    return {"eos_token_ids": tuple(map(int, ids))}


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise GenerationError(message)


_READERS: Mapping[str, Callable[[str, Any], dict[str, Any]]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), _number),
    **dict.fromkeys(("top_k", "max_new_tokens", "max_length"), _count),
    "stop_strings": _strings,
    "eos_token_id": _token_ids,
}
"""From a key and its value to the field that it gives."""
