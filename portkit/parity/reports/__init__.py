"""A result in words, in plain values, and as pages."""
