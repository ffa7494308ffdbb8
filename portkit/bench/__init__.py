"""How fast, against whom, against which ceiling, and whether the tokens are still the same."""
