"""The subject, what is held to be right, known by running it: its sites, and its traits."""
