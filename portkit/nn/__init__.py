"""Leaf mathematics that the families share: numbers and tensors in, tensors out."""
