"""Reading `config.json` so that nothing in it goes unnoticed.

A family reads the keys it uses through a `ConfigReader`, pins those whose value it could only
ignore, and names those that are bookkeeping. What is left over is refused: a key that nobody read
may be the one that changes the arithmetic.
"""

from portkit.config.heads import check_heads, default_head_dim, read_attention_bias
from portkit.config.layers import by_period, read_sliding_layers
from portkit.config.reader import MAX_SIZE, ConfigReader
from portkit.config.rope import read_rope, read_rope_by_layer_type

__all__ = [
    "MAX_SIZE",
    "ConfigReader",
    "by_period",
    "check_heads",
    "default_head_dim",
    "read_attention_bias",
    "read_rope",
    "read_rope_by_layer_type",
    "read_sliding_layers",
]
