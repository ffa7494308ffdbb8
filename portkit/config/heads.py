"""What heads must be like: how they share keys, how wide they are, whether they have biases."""

from __future__ import annotations

from portkit.config.reader import MAX_SIZE, PUBLISHED, ConfigReader
from portkit.errors import InvalidConfig


def check_heads(
    where: str, num_attention_heads: int, num_key_value_heads: int, head_dim: int
) -> None:
    """Query heads must share key heads evenly, and rotation pairs channels."""
    if num_attention_heads % num_key_value_heads:
        raise InvalidConfig(
            f"{where}: num_attention_heads {num_attention_heads} is not a multiple of "
            f"num_key_value_heads {num_key_value_heads}; {PUBLISHED}"
        )
    if num_attention_heads * head_dim > MAX_SIZE:
        raise InvalidConfig(
            f"{where}: num_attention_heads {num_attention_heads} times head_dim {head_dim} must be "
            f"at most {MAX_SIZE}; {PUBLISHED}"
        )
    if head_dim % 2:
        raise InvalidConfig(
            f"{where}: head_dim {head_dim} is odd, and rotation pairs channels; {PUBLISHED}"
        )


def default_head_dim(where: str, hidden_size: int, num_attention_heads: int) -> int:
    """`hidden_size / num_attention_heads`, for a file without `head_dim`."""
    if hidden_size % num_attention_heads:
        raise InvalidConfig(
            f"{where}: hidden_size {hidden_size} is not a multiple of num_attention_heads "
            f"{num_attention_heads}, and head_dim is not given; {PUBLISHED}"
        )
    return hidden_size // num_attention_heads


def read_attention_bias(reader: ConfigReader) -> bool:
    """Whether attention's projections have biases; `qkv_bias`, where it stands too, agrees."""
    has_bias = reader.flag("attention_bias", False)
    reader.pin("qkv_bias", has_bias, because="attention_bias says whether there are biases")
    return has_bias
