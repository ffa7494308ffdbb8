"""Served in a limited child by the tests: says what it is told, or ends its process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def answerer() -> Callable[[dict[str, Any]], Any]:
    """What answers in the child."""

    def answer(request: dict[str, Any]) -> Any:
        if "end" in request:
            os._exit(request["end"])
        return request["say"]

    return answer
