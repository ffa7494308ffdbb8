"""`record`: how a foreign port makes points of its own code sites of a comparison.

Knows whether somebody listens, and nothing else: a port that calls it can be shipped as it is.
Imports neither torch nor the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Listener = Callable[[str, "Tensor"], "Tensor"]
_LISTENED_TO: list[None] = []
"""Empty outside of comparisons. A compiler can follow a list, and no context variable."""
_LISTENER: ContextVar[Listener | None] = ContextVar("portkit.parity.record", default=None)


def record(name: str, tensor: Tensor) -> Tensor:
    """Make `tensor` a site while a comparison runs; go on with what is returned.

        query = record("#query", query)  # (batch, heads, tokens, head_dim), rotated

    `name`: a site as the reports spell it, `model.layers.3.self_attn#query`; or what comes behind
    the module that runs, where that is paired with one of the reference's: `#query` within its
    attention, `.input_layernorm` within its layer. The tensor has the reference's dimensions;
    those at the end may be one, as heads and channels. A comparison may return another tensor, the
    reference's; outside of one it is always `tensor` itself. Raises `SiteError` in a comparison
    where there is no such site.
    """
    if not _LISTENED_TO:
        return tensor
    listener = _LISTENER.get()
    return tensor if listener is None else listener(name, tensor)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have `record` call `listener` (name, tensor) within, in this thread."""
    token = _LISTENER.set(listener)
    _LISTENED_TO.append(None)
    try:
        yield
    finally:
        _LISTENED_TO.pop()
        _LISTENER.reset(token)
