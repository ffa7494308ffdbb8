"""Chat templates: rendered text equal to Transformers', and a hostile template gets nowhere."""

from __future__ import annotations

import json
import shutil
from datetime import datetime

import pytest
from transformers import AutoTokenizer

from parity_tests.generation.specimens import write_tokenizer
from portkit.checkpoint import LocalFiles
from portkit.errors import TokenizerError
from portkit.generation.chat import ChatTemplate
from portkit.tokenizer import Tokenizer

USER = {"role": "user", "content": "hi <é> & 'you'"}
CALL = {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells <the> weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CONVERSATIONS = {
    "user": [USER],
    "system": [{"role": "system", "content": "Be brief.\n"}, USER],
    "thought": [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!"},
        {"role": "user", "content": "  and?  "},
        {"role": "assistant", "content": "Well.", "reasoning_content": "because"},
    ],
    "tools": [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": CALL}],
        },
        {"role": "tool", "content": '{"°C": 21}'},
        {"role": "tool", "content": "and sun"},
        {"role": "assistant", "content": "21 degrees"},
        {"role": "user", "content": "thanks"},
    ],
}
SWITCHES = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": True, "enable_thinking": False},
    {"add_generation_prompt": True, "tools": [TOOL]},
]


def ours(directory) -> ChatTemplate:
    files = LocalFiles(directory)
    return ChatTemplate.open(files, Tokenizer.open(files))


@pytest.fixture(scope="module")
def qwen3(data_folder, tmp_path_factory):
    """Transformers' own, and the template as both places keep it, with the tokenizer."""
    published, saved = data_folder / "tokenizers" / "qwen3", tmp_path_factory.mktemp("qwen3")
    reference = AutoTokenizer.from_pretrained(published)
    reference.save_pretrained(saved)
    kept_beside = ours(saved)
    (saved / "chat_template.jinja").unlink()
    shutil.copy(published / "tokenizer_config.json", saved)
    kept_in_config = ours(saved)
    return reference, (kept_beside, kept_in_config), Tokenizer.open(LocalFiles(saved))


@pytest.mark.parametrize("switches", SWITCHES, ids=["prompt", "whole", "unthinking", "tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_qwen3_template(conversation, switches, qwen3):
    reference, templates, tokenizer = qwen3
    messages = CONVERSATIONS[conversation]
    theirs = reference.apply_chat_template(messages, tokenize=False, **switches)
    assert messages[0]["content"] in theirs
    for template in templates:
        assert template.render(messages, **switches) == theirs
    ids = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **switches)
    assert tokenizer.encode(theirs, special=False) == ids


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ nonesuch }}",
        "{{ image_token }}|{{ tools }}|{{ documents }}|{{ add_generation_prompt }}",
        "{{ add_bos_token }}|{{ chat_template }}",
        "{{ messages[0].content }}\n  {% if true %}\n  X\n  {% endif %}\n Y\n",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}"
        "{% if i == 5 %}{% break %}{% endif %}{% endfor %}",
        "{{ messages|tojson }}|{{ messages|tojson(indent=2) }}|"
        "{{ messages|tojson(ensure_ascii=True) }}|"
        "{{ messages|tojson(sort_keys=True, separators=(',', ':')) }}",
        "{% generation %}{% set x = 1 %}A{% endgeneration %}[{{ x }}]",
        "{% set y = 2 %}{% for m in messages %}{% generation %}{{ m.content }}{{ y }}"
        "{{ loop.index }}{% endgeneration %}{% endfor %}",
        "{% macro say(m) %}{{ m.content|trim|upper }}{% endmacro %}{{ say(messages[0]) }}",
        "{{ messages[0]['content'].split('&')[0].strip() }}{{ messages[0].get('name', 'none') }}",
    ],
)
def test_what_templates_expect_around_them(template, tmp_path):
    extra = {"image_token": "<img>"}
    write_tokenizer(tmp_path, chat_template=template, extra_special_tokens=extra)
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template([USER], tokenize=False)
    assert ours(tmp_path).render([USER], add_generation_prompt=False) == theirs != ""


def test_the_date_of_today(tmp_path):
    write_tokenizer(tmp_path, chat_template="{{ strftime_now('%Y') }} {{ strftime_now('%d %b') }}")
    before, text, after = datetime.now(), ours(tmp_path).render([USER]), datetime.now()
    assert text in (before.strftime("%Y %d %b"), after.strftime("%Y %d %b"))


def test_the_file_beside_wins_over_the_config(tmp_path):
    write_tokenizer(tmp_path, chat_template="config")
    (tmp_path / "chat_template.jinja").write_text("file é", encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template([USER], tokenize=False)
    assert ours(tmp_path).render([USER]) == theirs == "file é"


def test_named_templates(tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write_tokenizer(tmp_path, chat_template=named)
    template, reference = ours(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for tools in (None, [TOOL]):
        theirs = reference.apply_chat_template([USER], tools=tools, tokenize=False)
        assert template.render([USER], tools=tools) == theirs == ("T" if tools else "D")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template: give plain text"),
        (17, "has no chat template: give plain text"),
        ([{"name": "rag", "template": "R"}], r"none of the chat templates \(rag\)"),
        (["default"], "not of objects with a name and a template"),
        ([{"name": "default"}], "not of objects with a name and a template"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('roles\nmust alternate') }}", "TemplateError: roles must alternate"),
        ("{{ nonesuch.attribute }}", "'nonesuch' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_one_line(template, words, tmp_path):
    write_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(TokenizerError, match=words) as caught:
        ours(tmp_path).render([USER])
    assert "\n" not in str(caught.value)
    assert "--chat" in str(caught.value) or "repair the file" in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{x.__class__}'.format_map({'x': ''}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__.os.popen('true').read() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'other'}) }}",
        "{{ messages.clear() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{{ range(100001) | list }}",
    ],
)
def test_a_hostile_template_is_stopped(template, tmp_path):
    write_tokenizer(tmp_path, chat_template=template)
    messages = [dict(USER)]
    with pytest.raises(TokenizerError, match="cannot render this conversation") as caught:
        ours(tmp_path).render(messages)
    assert "\n" not in str(caught.value)
    assert messages == [USER]


def test_json_is_not_escaped_for_html(tmp_path):
    write_tokenizer(tmp_path, chat_template="{{ messages | tojson }}")
    text = ours(tmp_path).render([USER])
    assert text == json.dumps([USER], ensure_ascii=False)
    assert "<é> & 'you'" in text
