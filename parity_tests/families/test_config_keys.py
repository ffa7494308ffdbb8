"""Every key absent, null, at its default and at another value: what is taken computes as the
reference does, in every bit, and what is refused is said by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from parity_tests.families.config_rows import (
    DUAL_CHUNKS,
    FAMILIES,
    GONE,
    REFUSED,
    SIZES,
    TAKEN,
    TAKEN_BY_ALL,
    YARN,
    Raw,
)
from portkit.config import ConfigReader
from portkit.config.everywhere import FREE, LACKED, PINNED, SETTINGS
from portkit.errors import InvalidConfig, PortkitError, UnsupportedConfig
from portkit.parity.reference import by_name
from portkit.registry import architecture_of

PROMPT = torch.tensor([[5, 9, 2, 33, 17, 8, 41, 60, 1, 12, 30, 7, 7, 21, 44, 59, 3, 28]])
DEFAULTS_OF_TRANSFORMERS_4: Raw = {
    **SETTINGS,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "max_length": 20,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "task_specific_params": None,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "torchscript": False,
    "use_bfloat16": False,
}


def config_of(family: str, key: str, value: Any) -> Raw:
    raw = {"model_type": family, **FAMILIES[family], key: value}
    if value is GONE:
        del raw[key]
    return raw


def rows(table: Mapping[str, Mapping[str, tuple[Any, ...]]]) -> Iterator[Any]:
    for family, keys in table.items():
        for key, values in keys.items():
            for value in values:
                shown = "absent" if value is GONE else value
                yield pytest.param(family, key, value, id=f"{family}: {key} {shown!r:.40}")


def by_turns(grid: Iterable[Any]) -> list[Any]:
    """Each value with one family, the families taking turns; all others are slow."""
    every, families = list(grid), list(FAMILIES)
    num_values = len(every) // len(families)
    return [
        row
        if row.values[0] == families[place % num_values % len(families)]
        else pytest.param(*row.values, id=row.id, marks=pytest.mark.slow)
        for place, row in enumerate(every)
    ]


def the_reference(raw: Raw) -> nn.Module:
    """With random weights, of norms and biases too."""
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(
        deepcopy(raw)
    )  # which it changes
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model: nn.Module = auto.from_config(config, attn_implementation="sdpa").eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0.4 if "norm" in name else 0.0, 0.3)
    return model


@torch.no_grad()
def both(raw: Raw) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Our logits, the reference's by the same weights, and what our reader has to say."""
    reference, architecture, reader = the_reference(raw), architecture_of(raw), ConfigReader(raw)
    port = architecture.build(read(reader), "sdpa").eval()
    held = dict(reference.named_parameters())
    given = by_name(held, dict(port.named_parameters()))
    assert given.keys() == dict(port.named_parameters()).keys()
    sizes = [sum(one.numel() for one in side.parameters()) for side in (port, reference)]
    assert sizes[0] == sizes[1]
    for name, parameter in port.named_parameters():
        parameter.copy_(given[name])
    return port(PROMPT), reference(input_ids=PROMPT, use_cache=False).logits, reader.notes


def refusal(raw: Raw) -> str:
    with pytest.raises((UnsupportedConfig, InvalidConfig)) as refused:
        read(ConfigReader(raw))
    return str(refused.value)


def read(reader: ConfigReader) -> Any:
    config = architecture_of(reader.raw).read_config(reader)
    reader.finish()
    return config


@pytest.mark.parametrize(
    ("family", "key", "value"), by_turns(rows(dict.fromkeys(FAMILIES, TAKEN_BY_ALL)))
)
def test_what_every_family_takes_is_exact(family: str, key: str, value: Any) -> None:
    ours, theirs, _ = both(config_of(family, key, value))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("family", "key", "value"), [*rows(TAKEN)])
def test_what_a_family_takes_is_exact(family: str, key: str, value: Any) -> None:
    ours, theirs, _ = both(config_of(family, key, value))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("family", "key", "value"), [*rows(REFUSED)])
def test_what_a_family_refuses_is_said_by_name(family: str, key: str, value: Any) -> None:
    message = refusal(config_of(family, key, value))
    assert "\n" not in message
    assert key in message
    if not isinstance(value, dict):
        assert str(value) in message


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_4_wrote_into_every_config_is_taken_whole(family: str) -> None:
    raw = {"model_type": family, **FAMILIES[family]}
    assert len(DEFAULTS_OF_TRANSFORMERS_4) > 40
    plain, _, _ = both(raw)
    ours, theirs, notes = both({**DEFAULTS_OF_TRANSFORMERS_4, **raw})
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, plain)
    assert notes == ()


def test_each_of_them_is_refused_at_a_value_that_would_count() -> None:
    for key, default in SETTINGS.items():
        other = 7 if not isinstance(default, bool) else not default
        message = refusal(config_of("llama", key, other))
        assert message.endswith(f"--ignore-config {key}")
    for key, (allowed, _) in PINNED.items():
        if key not in ("is_decoder", "quantization_config"):
            other = allowed != (True,)
            assert f"{key} is {other}" in refusal(config_of("llama", key, other))


def test_no_key_stands_in_two_tables() -> None:
    lacked = [key for keys in LACKED.values() for key in keys]
    every = [*FREE, *PINNED, *SETTINGS, *lacked]
    assert len(every) == len(set(every))


def test_a_number_is_no_flag() -> None:
    assert "num_beams = True" in refusal(config_of("llama", "num_beams", True))
    assert "use_mrope is 0" in refusal(config_of("llama", "use_mrope", 0))


@pytest.mark.parametrize(
    ("family", "key", "value", "words"),
    [
        ("qwen3", "rope_scaling", {**YARN, "attn_factor": 0.8}, "rope_scaling.attn_factor = 0.8"),
        ("qwen2", "dual_chunk_attention_config", DUAL_CHUNKS, "dual_chunk_attention_config = {"),
        ("gemma3_text", "_sliding_window_pattern", 3, "sliding_window_pattern says which"),
        ("cohere2", "_sliding_window_pattern", 3, "_sliding_window_pattern = 3"),
        ("gemma3_text", "original_max_position_embeddings", 16, "each layer type says its own"),
    ],
)
def test_what_has_no_effect_is_told(family: str, key: str, value: Any, words: str) -> None:
    ours, theirs, (note,) = both(config_of(family, key, value))
    assert torch.equal(ours, theirs)
    assert words in note
    assert "no effect, as in the reference" in note
    assert both({"model_type": family, **FAMILIES[family]})[2] == ()


def test_a_pattern_and_a_list_that_disagree_are_told() -> None:
    raw = config_of("gemma3_text", "layer_types", ["full_attention"] * 7)
    ours, theirs, (note,) = both({**raw, "sliding_window_pattern": 2})
    assert torch.equal(ours, theirs)
    assert "sliding_window_pattern = 2" in note
    assert "layer_types says which layers slide" in note
    agreeing = ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]
    assert both({**raw, "layer_types": agreeing, "sliding_window_pattern": 2})[2] == ()


def test_all_keys_that_are_left_are_named_at_once_wherever_they_stand() -> None:
    raw = {
        "model_type": "llama",
        **SIZES,
        "unheard_of": 1,
        "temperature": 0.6,
        "rope_scaling": {**YARN, "alpha": 2.0},
    }
    message = refusal(raw)
    assert "unheard_of = 1, temperature = 0.6, rope_scaling.alpha = 2.0" in message
    keys = message.rpartition("--ignore-config ")[2]
    assert keys == "unheard_of,temperature,rope_scaling.alpha"
    reader = ConfigReader(raw, ignore=keys.split(","))
    read(reader)
    assert reader.ignored == {"unheard_of", "temperature", "rope_scaling.alpha"}
    by_itself = ConfigReader(raw, ignore=["unheard_of", "temperature", "alpha"])
    read(by_itself)
    assert by_itself.ignored == reader.ignored


def test_text_names_in_a_wrong_place_are_refused() -> None:
    raw = {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", **FAMILIES["gemma3_text"]},
        "vision_config": {},
        "rms_norm_eps": 1e-5,
        "query_pre_attn_scalar": 64,
    }
    message = refusal(raw)
    assert message.endswith("--ignore-config rms_norm_eps,query_pre_attn_scalar")


def test_a_comparison_of_two_families_can_fail() -> None:
    with pytest.raises((AssertionError, PortkitError)):
        both({"model_type": "qwen3", **SIZES, "is_causal": False})
