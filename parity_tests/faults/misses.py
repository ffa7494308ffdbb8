"""Why some planted faults are not named: what is known of each, in one clause."""

from __future__ import annotations

NOT_NAMED: dict[str, str] = {
    "experts.normalised": "a softmax over all experts, of which the chosen are made to sum to one, "
    "is the softmax over the chosen",
    "mlp.gelu_exact": "behind sparse gates, in bfloat16, no hypothesis comes near; in float32 it "
    "is named",
    "altup.correction_without_one": "the factors without 1 are near 0 here, as if nothing were "
    "corrected",
}
"""By planting: caught and placed, and yet another cause is told, or none."""
