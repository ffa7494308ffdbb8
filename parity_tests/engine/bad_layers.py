"""The table of bad input, third part: what only some families can get wrong in a config.json.

Lists that contradict counts, layers that depend on others, switches under which a family would
compute something else. A row's words are those without which the one line would not help.
"""

from __future__ import annotations

from parity_tests.engine.damage import Case, config

KINDS = {"layer_types": ["full_attention", "sliding_attention"]}

FAMILY_VALUES = [
    Case(
        "too few layer types",
        config({"layer_types": ["full_attention"]}),
        ("layer_types must be a list of 2", "['full_attention']"),
        base="gemma3_text",
    ),
    Case(
        "layer type unknown",
        config({"layer_types": ["full_attention", "chunked_attention"]}),
        ("layer_types", "'chunked_attention'", "supported", "sliding_attention"),
        base="qwen3",
    ),
    Case(
        "layer types against the switch",
        config({"layer_types": ["sliding_attention"] * 2}),
        ("layer_types", "sliding", "use_sliding_window is false"),
        base="qwen3",
    ),
    Case(
        "layer types without a window",
        config({"use_sliding_window": True, "sliding_window": None, **KINDS}),
        ("layer_types", "sliding_window null"),
        base="qwen3",
    ),
    Case(
        "biases that are always there",
        config({"attention_bias": False}),
        ("attention_bias", "False", "supported: True"),
        base="qwen2",
    ),
    Case(
        "rotating layers that are not counted",
        config({"no_rope_layers": [1]}),
        ("no_rope_layers must be a list of 2", "[1]"),
        base="smollm3",
    ),
    Case(
        "layer types where one window counts",
        config({"layer_types": ["sliding_attention"] * 2}),
        ("layer_types", "sliding_window alone"),
        base="mistral",
    ),
    Case(
        "window that sees nothing",
        config({"sliding_window": 1}),
        ("sliding_window must be between 2", "not 1"),
        base="mistral",
    ),
    Case(
        "sliding layers without a window",
        config({**KINDS, "sliding_window": None}),
        ("layer_types names sliding layers", "sliding_window is null"),
        base="smollm3",
    ),
    Case(
        "more layers share keys than there are",
        config({"num_kv_shared_layers": 2}),
        ("num_kv_shared_layers 2 leaves none", "num_hidden_layers 2"),
        base="gemma3n_text",
    ),
    Case(
        "a layer shares keys that no layer has",
        config({"num_kv_shared_layers": 1, **KINDS}),
        ("layer_types", "sliding_attention layer shares keys", "first 1 layers"),
        base="gemma3n_text",
    ),
    Case(
        "too few widths",
        config({"intermediate_size": [32]}),
        ("intermediate_size must be a list of 2, one for each layer", "[32]"),
        base="gemma3n_text",
    ),
    Case(
        "a width that is none",
        config({"intermediate_size": [32, "32"]}),
        ("intermediate_size", "1 must be an integer", "not '32'"),
        base="gemma3n_text",
    ),
    Case(
        "too few sparsities",
        config({"activation_sparsity_pattern": [0.5] * 3}),
        ("activation_sparsity_pattern must be a list of 2", "one for each layer"),
        base="gemma3n_text",
    ),
    Case(
        "everything sparse",
        config({"activation_sparsity_pattern": [0.5, 1.0]}),
        ("each of activation_sparsity_pattern", "up to, without, 1", "not 1.0"),
        base="gemma3n_text",
    ),
    Case(
        "no such stream",
        config({"altup_active_idx": 4}),
        ("altup_active_idx 4", "altup_num_inputs 4", "count from 0"),
        base="gemma3n_text",
    ),
    Case(
        "a padding token without a row",
        config({"pad_token_id": 29}),
        ("pad_token_id 29 has no row", "31", "29 tokens"),
        base="gemma3n_text",
    ),
    Case(
        "quantised model of several streams",
        config({"quantization_config": {"quant_method": "awq"}}),
        ("quantization_config", "awq", "take the unquantised repository"),
        base="gemma3n_text",
    ),
    Case(
        "more experts chosen than there are",
        config({"num_experts_per_tok": 4}),
        ("num_experts_per_tok 4", "num_experts 3"),
        base="qwen3_moe",
    ),
    Case(
        "experts counted twice",
        config({"num_local_experts": 4}),
        ("num_experts 3", "num_local_experts 4", "keep one"),
        base="qwen3_moe",
    ),
    Case(
        "dense layer that there is not",
        config({"mlp_only_layers": [0, 2]}),
        ("mlp_only_layers names layer 2", "there are 2"),
        base="qwen3_moe",
    ),
    Case(
        "dense layers no list of numbers",
        config({"mlp_only_layers": [False, True]}),
        ("mlp_only_layers must be a list of layer numbers", "[False, True]"),
        base="qwen3_moe",
    ),
    Case(
        "layers that are not parallel",
        config({"use_parallel_block": False}),
        ("use_parallel_block", "False", "supported: True"),
        base="cohere2",
    ),
    Case(
        "two periods of layer types",
        config({"sliding_window_pattern": 4, "layer_switch": 2}),
        ("layer_switch is 2", "sliding_window_pattern", "published with the weights"),
        base="cohere2",
    ),
    Case(
        "more layer types than layers",
        config({"layer_types": ["full_attention"] * 3}),
        ("layer_types must be a list of 2", "one for each layer"),
        base="cohere2",
    ),
    Case(
        "no window",
        config({"sliding_window": 0}),
        ("sliding_window must be between 2", "not 0"),
        base="cohere2",
    ),
    Case(
        "logits without a scale",
        config({"logit_scale": 0}),
        ("logit_scale must be between", "not 0"),
        base="cohere2",
    ),
    Case(
        "quantised parallel model",
        config({"quantization_config": {"quant_method": "bitsandbytes"}}),
        ("quantization_config", "bitsandbytes", "take the unquantised repository"),
        base="cohere2",
    ),
    Case(
        "layer with experts that there is not",
        config({"moe_layers": [1, 3]}),
        ("moe_layers names layer 3", "there are 2"),
        base="llama4_text",
    ),
    Case(
        "rotating layers for another number of layers",
        config({"no_rope_layers": [1, 1, 1, 0]}),
        ("no_rope_layers must be a list of 2", "[1, 1, 1, 0]"),
        base="llama4_text",
    ),
    Case(
        "rotating layers by their numbers",
        config({"no_rope_layers": [1, 3]}),
        ("no_rope_layers must be a list of 2, 0 or 1 for each layer", "[1, 3]"),
        base="llama4_text",
    ),
    Case(
        "interval that the reference does not read",
        config({"nope_layer_interval": 3}),
        ("nope_layer_interval is 3", "supported: 4"),
        base="llama4_text",
    ),
    Case(
        "chosen experts that there are not",
        config({"num_experts_per_tok": 4}),
        ("num_experts_per_tok 4", "num_local_experts 3"),
        base="llama4_text",
    ),
    Case(
        "chunks without a length",
        config({"attention_chunk_size": None}),
        ("attention_chunk_size is null", "chunked_attention", "layer_types"),
        base="llama4_text",
    ),
    Case(
        "temperature a word",
        config({"text_config.attn_temperature_tuning": "yes"}),
        ("attn_temperature_tuning must be true or false", "'yes'"),
        base="llama4",
    ),
    Case(
        "quantised experts",
        config({"quantization_config": {"quant_method": "compressed-tensors"}}),
        ("quantization_config", "compressed-tensors", "take the unquantised repository"),
        base="llama4",
    ),
    Case(
        "window of one",
        config({"sliding_window": 1}),
        ("sliding_window must be between 2", "not 1"),
        base="gemma3_text",
    ),
]
