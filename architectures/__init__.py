"""The ports: one file a family, each read from top to bottom as its paper reads."""
