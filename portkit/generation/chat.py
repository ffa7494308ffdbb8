"""A checkpoint's own chat template: a conversation becomes the text that its model was tuned on.

Knows where a template is kept, and what it is given. A template is code from a stranger: how it is
run, `rendering` knows.

Source: "Chat templates" in the documentation of Transformers, whose rendering this equals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from portkit.checkpoint import Files
from portkit.confined import Confined, Exhausted, Refused
from portkit.errors import TokenizerError
from portkit.json_reading import read_text
from portkit.tokenizer import Tokenizer

_FILES = {
    "default": "chat_template.jinja",
    "tool_use": "additional_chat_templates/tool_use.jinja",
}
_RENDERING = "portkit.generation.rendering"

Message = Mapping[str, Any]
"""One turn: `role` ("system", "user", "assistant", "tool"), `content`, and what else it knows."""


class ChatTemplate:
    """The templates of one checkpoint by name, "default" and maybe others; `open` reads them."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._child = Confined(_RENDERING)

    @classmethod
    def open(cls, files: Files, tokenizer: Tokenizer) -> ChatTemplate:
        """Read `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`; and the
        template for tools that may lie beside either.

        Raises TokenizerError where there is neither.
        """
        stored: Any = tokenizer.config.get("chat_template")
        beside = {
            name: read_text(files.path(file), f"{file} of {files.origin}", TokenizerError)
            for name, file in _FILES.items()
            if files.has(file)
        }
        if beside or isinstance(stored, str):
            # Files come instead of what the config says, not beside it.
            return cls(beside or {"default": stored}, tokenizer.special_tokens)
        if isinstance(stored, Mapping):
            stored = [{"name": name, "template": one} for name, one in stored.items()]
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
        given = {**context, **self._special_tokens, **variables}
        try:
            text: str = self._child.ask({"source": source, "variables": given})
        except (Refused, Exhausted, TypeError) as error:  # the last of what is no plain value
            raise TokenizerError(
                f"the chat template cannot render this conversation ({error}): change the "
                "messages, or give plain text without --chat"
            ) from None
        return text

    def _source(self, *, with_tools: bool) -> str:
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self._sources:
                return self._sources[name]
        raise TokenizerError(
            f"none of the chat templates ({', '.join(sorted(self._sources))}) is called 'default': "
            "give plain text without --chat"
        )
