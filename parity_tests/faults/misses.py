"""Why some planted faults are missed: what is known of each, in one sentence."""

from __future__ import annotations

NOT_NAMED: dict[str, str] = {
    "rope.theta": "a base of 10,000 for the full layers is also the local layers' table",
    "rope.yarn_truncate": "Gemma's reference takes no notice of `truncate` by layer type: it "
    "cannot be made to do what the port did",
    "attention.window_pattern_shifted": "at its first site, a layer's tables, it is what the "
    "exchange of two layer types is",
    "norm.epsilon (by a ten-thousandth)": "no porter's value: the catalogue tries the usual ones",
}
"""By planting: caught and placed, and yet another cause is told, or none."""
