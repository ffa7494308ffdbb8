"""Which layers slide, where a file says it by a list or by a period."""

from __future__ import annotations

from portkit.config.reader import ConfigReader

_PERIOD, _COPY = "sliding_window_pattern", "_sliding_window_pattern"


def read_sliding_layers(
    reader: ConfigReader, num_layers: int, default_period: int, full: str, sliding: str
) -> tuple[str, ...]:
    """Each layer's type: explicit `layer_types` win; else every `sliding_window_pattern`-th is
    full.

    `_sliding_window_pattern` is a copy that the reference writes and does not read. Where either
    says something else than what holds, the notes tell.
    """

    explicit = reader.words("layer_types", num_layers, (full, sliding))
    period = reader.size(_PERIOD, default_period)
    found = by_period(num_layers, period, full, sliding) if explicit is None else explicit
    source = _PERIOD if explicit is None else "layer_types"
    for key in (_PERIOD, _COPY):
        given = reader.size(key, None)
        if given is not None and by_period(num_layers, given, full, sliding) != found:
            reader.tell(key, f"{source} says which layers slide, and says otherwise")
    return found


def by_period(num_layers: int, period: int, full: str, sliding: str) -> tuple[str, ...]:
    """Every `period`-th layer full, the others sliding."""
    return tuple(sliding if (i + 1) % period else full for i in range(num_layers))
