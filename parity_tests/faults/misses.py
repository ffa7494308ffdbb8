"""Why some planted faults are not named: what is known of each, in one clause."""

from __future__ import annotations

NOT_NAMED: dict[str, str] = {
    "rope.theta": "a base of 10,000 for the full layers is also the local layers' table",
    "attention.norm_after_rotation": "its first site is the norm's input, where the catalogue has "
    "no edit; it has one of the query behind it",
    "attention.window_pattern_shifted": "of the one layer where it shows first, the two are the "
    "same mistake",
    "rope.shifted_by_a_layer": "of the one layer where it shows first it is the same mistake as a "
    "layer that does not rotate, or rotates",
    "norm.pre_for_post (pre)": "its first site is a norm's input, and the sum that is given to it "
    "here is none of the catalogue's",
    "norm.pre_for_post (post)": "its first site lacks the residual as well: of that site alone "
    "both are true",
    "norm.epsilon (by a ten-thousandth)": "in float32 the epsilon was not read off what the port "
    "computes",
}
"""By planting: caught and placed, and yet another cause is told, or none."""
