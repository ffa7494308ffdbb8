"""A checkpoint's own chat template: a conversation becomes the text that its model was tuned on.

Knows where a template is kept and what templates expect of their surroundings. A template is code
from a stranger: it runs in Jinja's immutable sandbox, which keeps it from Python's objects, from
files and from ranges beyond 100,000; how long it computes within that is not limited.

Source: "Chat templates" in the documentation of Transformers, whose rendering this equals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from portkit.checkpoint import Files
from portkit.errors import TokenizerError
from portkit.json_reading import read_text
from portkit.tokenizer import Tokenizer

_FILE = "chat_template.jinja"

Message = Mapping[str, Any]
"""One turn: `role` ("system", "user", "assistant", "tool"), `content`, and what else it knows."""


class ChatTemplate:
    """The templates of one checkpoint by name, "default" and maybe others; `open` reads them."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def open(cls, files: Files, tokenizer: Tokenizer) -> ChatTemplate:
        """Read `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`.

        Raises TokenizerError where there is neither.
        """
        stored: Any = tokenizer.config.get("chat_template")
        if files.has(_FILE):
            stored = read_text(files.path(_FILE), f"{_FILE} of {files.origin}", TokenizerError)
        if isinstance(stored, str):
            return cls({"default": stored}, tokenizer.special_tokens)
        if not isinstance(stored, list):
            raise TokenizerError(
                f"{files.origin} has no chat template: give plain text without --chat, or use an "
                "instruction-tuned checkpoint"
            )
        try:
            sources = {str(entry["name"]): str(entry["template"]) for entry in stored}
        except (TypeError, KeyError) as error:
            raise TokenizerError(
                f"chat_template in tokenizer_config.json of {files.origin} is a list, but not of "
                "objects with a name and a template: repair the file"
            ) from error
        return cls(sources, tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as text, special tokens and all: encode it with `special=False`.

        `tools` are function descriptions (JSON schema); `variables` are the template's own switches
        (`enable_thinking=False`). Raises TokenizerError where the template refuses the
        conversation, is broken, or does what the sandbox forbids.
        """
        source = self._source(with_tools=bool(tools))
        context = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            template = _environment().from_string(source)
            return template.render({**context, **self._special_tokens, **variables})
        except Exception as error:  # a stranger's code may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise TokenizerError(
                f"the chat template cannot render this conversation ({reason}): change the "
                "messages, or give plain text without --chat"
            ) from error

    def _source(self, *, with_tools: bool) -> str:
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self._sources:
                return self._sources[name]
        raise TokenizerError(
            f"none of the chat templates ({', '.join(sorted(self._sources))}) is called 'default': "
            "give plain text without --chat"
        )


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words and prints them as is."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it as an instance's attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses what Jinja's own only hides: an attribute out of bounds would read as undefined."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(
            f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe"
        )


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it; Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002  (templates may name it)
    return datetime.now().strftime(format)
