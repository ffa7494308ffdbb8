"""`generation_config.json`: what is used, what is knowingly passed over, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import GenerationConfig

from portkit.checkpoint import LocalFiles
from portkit.errors import GenerationError
from portkit.generation.settings import GenerationSettings

RELEASED = {
    "google__gemma-3-270m-it": GenerationSettings(
        do_sample=True, top_k=64, top_p=0.95, eos_token_ids=(1, 106)
    ),
    "meta-llama__Llama-3.2-3B": GenerationSettings(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=50, eos_token_ids=(128001,)
    ),
    "HuggingFaceTB__SmolLM3-3B": GenerationSettings(
        do_sample=True, temperature=0.6, top_p=0.95, top_k=50, eos_token_ids=(128012,)
    ),
}


def read(directory, generation=None, config=None, ignore=()) -> GenerationSettings:
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return GenerationSettings.read(LocalFiles(directory), ignore=ignore)


@pytest.mark.parametrize("name", RELEASED)
def test_released_files(name, data_folder):
    files = LocalFiles(data_folder / "configs" / name)
    assert GenerationSettings.read(files) == RELEASED[name]


def test_every_key_is_used(tmp_path):
    assert read(
        tmp_path,
        {
            "do_sample": True,
            "temperature": 0.5,
            "top_k": 3,
            "top_p": 0.25,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "max_new_tokens": 7,
            "max_length": 900,
            "eos_token_id": [3, 4],
            "stop_strings": ["a", "b"],
        },
    ) == GenerationSettings(
        do_sample=True,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        max_new_tokens=7,
        max_length=None,  # max_new_tokens has precedence, as in Transformers
        eos_token_ids=(3, 4),
        stop=("a", "b"),
    )


def test_nothing_said_is_greedy(tmp_path):
    assert read(tmp_path) == GenerationSettings()
    assert read(tmp_path, {}) == read(tmp_path, {"temperature": None, "num_beams": None})
    assert GenerationSettings().do_sample is False
    assert read(tmp_path, {"stop_strings": "END", "max_length": 12}) == GenerationSettings(
        stop=("END",), max_length=12
    )


def test_what_transformers_itself_writes_is_understood(tmp_path):
    GenerationConfig(do_sample=True, top_k=5, eos_token_id=9).save_pretrained(tmp_path)
    assert read(tmp_path) == GenerationSettings(do_sample=True, top_k=5, eos_token_ids=(9,))


def test_every_key_of_transformers_is_known(tmp_path):
    """Each is used, passed over, or named as unsupported; none falls to "does not know"."""
    complaints = []
    for key in GenerationConfig().to_dict():
        try:
            read(tmp_path, {"do_sample": True, key: "nonsense"})
        except GenerationError as error:
            complaints.append(str(error))
    assert len(complaints) > 30
    assert not [complaint for complaint in complaints if "does not know" in complaint]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eos_token_id": 5}, (5,)),
        ({"eos_token_id": [5, 6]}, (5, 6)),
        ({"text_config": {"eos_token_id": 8}}, (8,)),
        ({"eos_token_id": 5, "text_config": {"eos_token_id": 8}}, (5,)),
        ({"eos_token_id": None}, ()),
        ({}, ()),
    ],
)
def test_eos_comes_from_the_config_where_it_is_not_said(config, expected, tmp_path):
    assert read(tmp_path, None, config).eos_token_ids == expected
    assert read(tmp_path, {"top_k": 3}, config).eos_token_ids == expected
    assert read(tmp_path, {"eos_token_id": 77}, config).eos_token_ids == (77,)


def test_options_override_and_none_is_no_option():
    settings = GenerationSettings(do_sample=True, top_k=9, max_length=20, eos_token_ids=(1,))
    assert settings.override(top_k=None, do_sample=None, seed=None) == settings
    assert settings.override(top_k=0, do_sample=False) == replace(
        settings, top_k=0, do_sample=False
    )
    assert settings.override(max_new_tokens=500) == replace(
        settings, max_new_tokens=500, max_length=None
    )
    assert settings.override(eos_token_ids=()).eos_token_ids == ()


@pytest.mark.parametrize(
    "neutral",
    [
        {"num_beams": 1, "num_return_sequences": 1, "early_stopping": False, "length_penalty": 1.0},
        {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0, "penalty_alpha": 0},
        {"no_repeat_ngram_size": 0, "min_length": 0, "guidance_scale": 1, "token_healing": False},
        {"cache_implementation": "hybrid", "transformers_version": "4.55", "use_cache": False},
        {"bos_token_id": 2, "pad_token_id": 0, "_from_model_config": True, "suppress_tokens": []},
    ],
)
def test_what_changes_nothing_is_passed_over(neutral, tmp_path):
    assert read(tmp_path, neutral) == GenerationSettings()


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"num_beams": 4}, "num_beams = 4 is not supported"),
        ({"do_sample": True, "typical_p": 0.9}, "typical_p = 0.9 is not supported"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size = 3 is not supported"),
        ({"suppress_tokens": [1]}, r"suppress_tokens = \[1\] is not supported"),
        ({"min_new_tokens": 5}, "min_new_tokens = 5 is not supported"),
        ({"guidance_scale": 1.5}, "guidance_scale = 1.5 is not supported"),
        ({"chat_format": "x"}, 'chat_format = "x" is a key that portkit does not know'),
    ],
)
def test_what_would_change_the_text_is_refused_by_name(generation, words, tmp_path):
    with pytest.raises(GenerationError, match=words) as caught:
        read(tmp_path, generation)
    *others, key = generation
    assert f"--ignore-config {key}" in str(caught.value)
    expected = GenerationSettings(do_sample="do_sample" in others)
    assert read(tmp_path, generation, ignore=[key]) == expected


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"do_sample": True, "temperature": -1.0}, "temperature must be above 0"),
        ({"do_sample": True, "temperature": "0.6"}, 'temperature must be a number, not "0.6"'),
        ({"do_sample": True, "temperature": True}, "temperature must be a number, not true"),
        ({"do_sample": True, "top_k": -2}, "top_k must be 0"),
        ({"do_sample": True, "top_k": 2.5}, "top_k must be a whole number, not 2.5"),
        ({"do_sample": True, "top_p": -0.1}, "top_p must be from 0 to 1, not -0.1"),
        ({"do_sample": True, "min_p": -0.1}, "min_p must be from 0 to 1, not -0.1"),
        ({"do_sample": True, "min_p": 1.5}, "min_p must be from 0 to 1, not 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_length": "9"}, 'max_length must be a whole number, not "9"'),
        ({"do_sample": 2}, "do_sample must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list of them"),
        ({"eos_token_id": [1, None]}, "eos_token_id must be a token id or a list of them"),
        ({"stop_strings": 3}, "stop_strings must be a string or a list of strings"),
        ({"stop_strings": ["a", ""]}, "a stop string must not be empty"),
        ([1], "generation_config.json of .* must be a JSON object"),
    ],
)
def test_values_out_of_range_are_one_line(generation, words, tmp_path):
    with pytest.raises(GenerationError, match=words) as caught:
        read(tmp_path, generation)
    assert "generation_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_json(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(GenerationError, match="is not JSON"):
        read(tmp_path)


@pytest.mark.parametrize("not_a_number", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_no_field_takes_what_is_no_number(field, not_a_number):
    with pytest.raises(GenerationError, match=field):
        GenerationSettings(**{field: not_a_number})
