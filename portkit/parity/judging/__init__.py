"""Local errors, the truth in float64, the floor, and what follows from them."""
