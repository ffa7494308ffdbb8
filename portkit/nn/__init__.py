"""Leaf mathematics that the families share: numbers and tensors in, tensors out; no family's name."""
