"""Why some planted faults are not named: what is known of each, in one clause."""

from __future__ import annotations

NOT_NAMED: dict[str, str] = {}
"""By planting: caught and placed, and yet another cause is told, or none."""
