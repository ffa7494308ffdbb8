"""The fast path: a model's decode step, taken from its own code, with static caches."""
