"""Readers of foreign checkpoint formats, one file a format; each writes the Hugging Face layout."""
