"""The table of bad input, second part: a config.json that is damaged, incomplete or not understood.

The rows for required fields are made from what each family's own reader asks for. A row's words
are those without which the one line would not help: what is wrong, its value, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from parity_tests.engine.damage import (
    CONFIG,
    CONFIGS,
    GONE,
    Case,
    Damage,
    config,
    cut,
    link,
    put,
    remove,
)
from portkit.config import ConfigReader
from portkit.registry import architecture_of

AGAIN = "fetch the checkpoint again"
NAN, INFINITY = float("nan"), float("inf")


class Asked(ConfigReader):
    """Notes which keys a family's reader requires, by dotted path."""

    def __init__(self, raw: Mapping[str, Any], section: str, required: dict[str, str]) -> None:
        super().__init__(raw)
        self._section, self.required = section, required

    def size(self, key: str, *default: Any, **bounds: int) -> Any:
        if not default:
            self.required[self._section + key] = "an integer"
        return super().size(key, *default, **bounds)

    def sizes(self, key: str, length: int) -> tuple[int, ...]:
        found = super().sizes(key, length)
        self.required[self._section + key] = "a size for each layer"
        return found

    def number(self, key: str, *default: Any) -> Any:
        if not default:
            self.required[self._section + key] = "a number"
        return super().number(key, *default)

    def section(self, key: str) -> ConfigReader:
        self.required[self._section + key] = "an object"
        return Asked(self.raw[key], f"{key}.", self.required)


def required_fields(model_type: str) -> dict[str, str]:
    """What the family's reader asks for without a default, and what it must be."""
    reader = Asked(CONFIGS[model_type], "", {})
    architecture_of(CONFIGS[model_type]).read_config(reader)
    return reader.required


WRONG: dict[str, dict[str, tuple[object, ...]]] = {
    "an integer": {
        "must be an integer": ("24", 24.0, True, [24], {}),
        "must be between": (0, -1, 2**40, 10**400),
    },
    "a size for each layer": {
        "must be an integer": ("24", 24.0, True, {}),
        "must be a list of 2": ([24], [24, 24, 24]),
        "must be between": (0, -1, 2**40, 10**400),
    },
    "a number": {
        "must be a number": ("1.5", True, [1.5], {}),
        "must be between": (0, -1.0, NAN, INFINITY, 10**400),
    },
    "an object": {"must be an object": ("x", 1, True, [1], None)},
}


def required_field_cases() -> Iterator[Case]:
    for model_type in CONFIGS:
        for path, kind in required_fields(model_type).items():
            key = path.rpartition(".")[2]
            if kind != "an object":
                for value in (GONE, None):
                    name = "is missing" if value is GONE else "is null"
                    words = (CONFIG, f"{key} is missing", "published with the weights")
                    yield Case(f"{path} {name}", config({path: value}), words, base=model_type)
            for wanted, values in WRONG[kind].items():
                for value in values:
                    words = (CONFIG, f"{key} {wanted}", f"not {value!r:.40}")
                    name = f"{path} = {value!r:.20}"
                    yield Case(name, config({path: value}), words, base=model_type)


def rope(**given: object) -> Damage:
    return config({"rope_scaling": given})


LLAMA3 = CONFIGS["llama"]["rope_scaling"]
YARN = {"rope_type": "yarn", "factor": 8.0}

CONFIG_FILE = [
    Case("config absent", remove(CONFIG), ("{folder}", CONFIG, "give the folder")),
    Case("config empty", cut(CONFIG, 0), (CONFIG, "is not JSON", AGAIN)),
    Case("config cut off", cut(CONFIG, -1), (CONFIG, "is not JSON", AGAIN)),
    Case("config binary", put(CONFIG, b"\xff\x00{}"), (CONFIG, "is not UTF-8 text", AGAIN)),
    Case(
        "config nested without end",
        put(CONFIG, b"[" * 99999),
        (CONFIG, "nests more than 64", AGAIN),
    ),
    Case("config a list", put(CONFIG, [{}]), (CONFIG, "must be a JSON object", "list", AGAIN)),
    Case("config a word", put(CONFIG, "llama"), (CONFIG, "must be a JSON object", "str", AGAIN)),
    Case("config a folder", link(CONFIG, "."), ("{folder}", CONFIG, "give the folder")),
    Case(
        "config says it twice",
        put(CONFIG, b'{"hidden_size": 24, "hidden_size": 32}'),
        (CONFIG, "hidden_size twice", AGAIN),
    ),
    Case(
        "disk refuses to read the config",
        link(CONFIG, "/proc/self/mem"),
        (f"{CONFIG} cannot be read (Input/output error)", "permissions and disk"),
        needs_proc=True,
    ),
]

CONFIG_VALUES = [
    Case(
        "model_type missing",
        config({"model_type": GONE}),
        ("model_type is missing", "llama, llama4"),
    ),
    Case("model_type a list", config({"model_type": ["llama"]}), ("model_type", "not a word")),
    Case(
        "model_type unknown",
        config({"model_type": "gpt2"}),
        ("'gpt2'", "supported", "llama, llama4"),
    ),
    Case(
        "unknown key that matters",
        config({"attention_multiplier": 0.5}),
        ("not understood", "attention_multiplier = 0.5", "--ignore-config attention_multiplier"),
    ),
    Case(
        "unknown key of the text model",
        config({"text_config.attn_scale": 0.5}),
        ("text_config.attn_scale = 0.5", "--ignore-config text_config.attn_scale"),
        base="gemma3",
    ),
    Case("other activation", config({"hidden_act": "gelu"}), ("hidden_act", "'gelu'", "'silu'")),
    Case("own code", config({"auto_map": {"AutoModel": "x.Y"}}), ("auto_map", "never run")),
    Case("encoder", config({"is_encoder_decoder": True}), ("is_encoder_decoder", "True", "False")),
    Case(
        "quantised",
        config({"quantization_config": {"quant_method": "gptq"}}),
        ("quantization_config", "gptq", "take the unquantised repository"),
    ),
    Case("dtype not computed in", config({"dtype": "float64"}), ("'float64'", "with --dtype")),
    Case("dtype a number", config({"torch_dtype": 16}), ("'16'", "bfloat16", "with --dtype")),
    Case(
        "query heads not shared evenly",
        config({"num_key_value_heads": 3}),
        ("num_attention_heads 4", "not a multiple", "num_key_value_heads 3", "published with"),
    ),
    Case(
        "hidden size not divided by heads",
        config({"head_dim": GONE, "num_attention_heads": 7}),
        ("hidden_size 24", "not a multiple", "num_attention_heads 7", "head_dim", "published"),
    ),
    Case("odd head", config({"head_dim": 7}), ("head_dim 7 is odd", "published with")),
    Case("head of no channel", config({"head_dim": 0}), ("head_dim must be between 1", "not 0")),
    Case(
        "heads absurd together",
        config({"num_attention_heads": 2**24, "head_dim": 2**24}),
        ("num_attention_heads 16777216 times head_dim 16777216", "at most"),
    ),
    Case("eps of nothing", config({"rms_norm_eps": 0}), ("rms_norm_eps must be between", "not 0")),
    Case("eps NaN", config({"rms_norm_eps": NAN}), ("rms_norm_eps must be between", "not nan")),
    Case("eps infinite", config({"rms_norm_eps": INFINITY}), ("rms_norm_eps", "not inf")),
    Case("eps absurd", config({"rms_norm_eps": 10**400}), ("rms_norm_eps must be", "not 1000")),
    Case(
        "eps a word", config({"rms_norm_eps": "1e-5"}), ("rms_norm_eps must be a number", "'1e-5'")
    ),
    Case(
        "bias a word", config({"attention_bias": "no"}), ("attention_bias must be true or", "'no'")
    ),
    Case("rope type unknown", rope(rope_type="ntk"), ("rope_type", "'ntk'", "supported", "'yarn'")),
    Case("rope type of old unknown", rope(type="ntk"), ("type", "'ntk'", "supported", "'linear'")),
    Case("rope type a list", rope(rope_type=["yarn"]), ("rope_type", "['yarn']", "supported")),
    Case("rope types differ", rope(**YARN, type="linear"), ("rope_type", "type", "keep one")),
    Case("rope a list", config({"rope_scaling": []}), ("rope_scaling must be an object", "[]")),
    Case("rope a word", config({"rope_parameters": "yarn"}), ("rope_parameters must be", "'yarn'")),
    Case("rope without its factor", rope(rope_type="linear"), ("factor is missing", "published")),
    Case("rope with a key too many", rope(**YARN, alpha=1.0), ("alpha = 1.0", "--ignore-config")),
    Case("rope factor of nothing", rope(**{**YARN, "factor": 0.0}), ("factor must be", "not 0.0")),
    Case("rope theta one", rope(**YARN, rope_theta=1), ("rope_theta must be above 1", "not 1.0")),
    Case("rope theta absurd", config({"rope_theta": 1e300}), ("rope_theta must be", "not 1e+300")),
    Case(
        "rope factors crossed",
        rope(**{**LLAMA3, "high_freq_factor": 0.5}),
        ("low_freq_factor must be at most high_freq_factor", "not 1.0"),
    ),
    Case(
        "rotation in part", config({"partial_rotary_factor": 0.5}), ("partial_rotary_factor", "0.5")
    ),
    Case(
        "rope flat",
        config({"rope_parameters": {"rope_type": "linear", "factor": 8.0}}),
        ("rope_parameters", "nested by layer type", "full_attention"),
        base="gemma3_text",
    ),
    Case(
        "rope twice",
        config({"rope_scaling": YARN, "rope_parameters": {"full_attention": YARN}}),
        ("rope_scaling and rope_parameters", "keep one"),
        base="gemma3_text",
    ),
    Case(
        "rope of a layer type a list",
        config({"rope_parameters": {"full_attention": []}}),
        ("rope_parameters: full_attention must be an object", "[]"),
        base="gemma3_text",
    ),
]
