"""How text is generated: `generation_config.json`, overridden by whoever asks.

Knows which of that file's keys are used, which change nothing here, and which would change the text
in a way that portkit does not offer: those are refused by name. Knows no model and no tensor.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from portkit.checkpoint import Files
from portkit.errors import GenerationError

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
        "early_stopping",
        "length_penalty",
    }
)

# What changes the text unless it has one of these values.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0.0,),
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
    "remove_invalid_values": (False,),
    "dola_layers": (),
    "token_healing": (False,),
    "max_time": (),
}

_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
_COUNTS = ("top_k", "max_new_tokens", "max_length")


@dataclass(frozen=True)
class GenerationSettings:
    """Everything besides model and prompt that decides the text.

    The filters apply in this order: repetition penalty (sampling or not), and then, only where
    `do_sample` is true: temperature, top-k, top-p, min-p. Each has a value that switches it off.

    do_sample           draw the next token; False takes the likeliest
    temperature         > 0; 1 is off
    top_k               keep the k likeliest; 0 is off. The reference's default is 50, and so ours
    top_p               keep the likeliest that hold this much probability, 0 < p <= 1; 1 is off
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
        _require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
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
    def read(cls, files: Files, *, ignore: Collection[str] = ()) -> GenerationSettings:
        """What `generation_config.json` says; of a checkpoint without one, the defaults.

        An EOS that it does not name is looked up in `config.json`. Keys in `ignore` do not count.
        Raises GenerationError for a value out of range, a key that portkit does not offer, and a
        key that it does not know.
        """
        raw = _read_object(files, _FILE) if files.has(_FILE) else {}
        raw = {key: value for key, value in raw.items() if value is not None and key not in ignore}
        try:
            _refuse_unsupported(raw)
            given: dict[str, Any] = {key: _number(raw, key) for key in _NUMBERS if key in raw}
            given |= {key: _count(raw, key) for key in _COUNTS if key in raw}
            if "do_sample" in raw:
                _require(isinstance(raw["do_sample"], bool), "do_sample must be true or false")
                given["do_sample"] = raw["do_sample"]
            if "stop_strings" in raw:
                given["stop"] = _strings(raw["stop_strings"])
            if "eos_token_id" not in raw:
                raw |= _eos_of_config(files)
            given["eos_token_ids"] = _token_ids(raw.get("eos_token_id", []))
            return cls().override(**given)
        except GenerationError as error:
            raise GenerationError(f"{_FILE} of {files.origin}: {error}") from error

    def override(self, **options: Any) -> GenerationSettings:
        """The same with the given fields changed; an option that is None was not given.

        `max_new_tokens` lifts a `max_length` that was set before it. Raises as the class does.
        """
        given = {field: value for field, value in options.items() if value is not None}
        if "max_new_tokens" in given:
            given["max_length"] = None
        return replace(self, **given)


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    used = {*_NUMBERS, *_COUNTS, "do_sample", "stop_strings", "eos_token_id"}
    for key, value in raw.items():
        if key in used or key in _BOOKKEEPING or value in _NEUTRAL.get(key, ()):
            continue
        known = "is not supported" if key in _NEUTRAL else "is a key that portkit does not know"
        raise GenerationError(
            f"{key} = {json.dumps(value)} {known}: --ignore-config {key} goes on without it"
        )


def _read_object(files: Files, name: str) -> dict[str, Any]:
    try:
        raw = json.loads(files.path(name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise GenerationError(
            f"{name} of {files.origin} is not JSON ({error}): fetch it again or repair it"
        ) from error
    if not isinstance(raw, dict):
        raise GenerationError(f"{name} of {files.origin} is not a JSON object: fetch it again")
    return raw


def _eos_of_config(files: Files) -> dict[str, Any]:
    """`eos_token_id` of `config.json`, where a multimodal checkpoint may keep it with the text."""
    config = _read_object(files, "config.json") if files.has("config.json") else {}
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("eos_token_id") is not None:
            return {"eos_token_id": part["eos_token_id"]}
    return {}


def _number(raw: Mapping[str, Any], key: str) -> float:
    value = raw[key]
    _require(
        isinstance(value, int | float) and not isinstance(value, bool),
        f"{key} must be a number, not {json.dumps(value)}",
    )
    return float(value)


def _count(raw: Mapping[str, Any], key: str) -> int:
    value = raw[key]
    _require(
        isinstance(value, int) and not isinstance(value, bool),
        f"{key} must be a whole number, not {json.dumps(value)}",
    )
    return int(value)


def _strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value) if type(value) is list else ()
    _require(
        bool(strings) and all(isinstance(string, str) for string in strings),
        "stop_strings must be a string or a list of strings",
    )
    return strings


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    _require(
        all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids),
        f"eos_token_id must be a token id or a list of them, not {json.dumps(value)}",
    )
    return tuple(ids)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise GenerationError(message)
