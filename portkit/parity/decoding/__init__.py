"""The decode-equivalence matrix."""
