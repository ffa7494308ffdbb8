"""The ports: one file a family, each read from top to bottom as its paper reads.

A config that would fill half of it has a file beside, `FAMILY_config.py`.
"""
