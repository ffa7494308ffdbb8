"""Recordings of one side as files, and proofs against them."""
