"""A chat template is run: Jinja's immutable sandbox, in a limited child.

The sandbox keeps a template from Python's objects, from files and from ranges beyond 100,000; the
child, from computing and from growing without end. Knows what templates expect of their
surroundings; knows no checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def answerer() -> Callable[[dict[str, Any]], Any]:
    """What answers in the child: a template and its variables to the text that it gives."""

    def answer(request: dict[str, Any]) -> str:
        return _environment().from_string(request["source"]).render(request["variables"])

    return answer


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
