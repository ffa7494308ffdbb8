"""The keys that stand in the config of any family, and the values under which ignoring them is
right. Knows no family: what a family lacks it says itself, by the names of `LACKED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

Pinned = Mapping[str, tuple[tuple[Any, ...], str]]
"""By key: the values under which ignoring it is right, beside null, and why others are not."""

FREE: Final = frozenset(
    (
        # Where a file is from, and who wrote it.
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "finetuning_task",
        "model_type",
        "name_or_path",
        "task_specific_params",
        "tokenizer_class",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        # How it is held and run: the numbers are the same, or the kernel's that is asked for.
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_implementation",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "tf_legacy_loss",
        "torch_dtype",
        "torchscript",
        "use_bfloat16",
        "use_cache",
        # What is returned beside the logits.
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "return_dict",
        "return_dict_in_generate",
        # Of training alone.
        "attention_dropout",
        "embd_pdrop",
        "gradient_checkpointing",
        "initializer_range",
        "resid_pdrop",
        "router_aux_loss_coef",
        # Of classifiers.
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        # Tokens that only whoever makes a prompt, or ends one, asks for.
        "bos_token_id",
        "decoder_start_token_id",
        "eos_token_id",
        "max_length",
        "pad_token_id",
        "sep_token_id",
    )
)
"""Ignored whatever they hold: a forward pass in evaluation mode does not depend on them."""

_DECODER = "only decoders are ported"
PINNED: Final[Pinned] = {
    "add_cross_attention": ((False,), _DECODER),
    "auto_map": (
        (),
        "the checkpoint brings its own code, which is never run; without it: "
        "--ignore-config auto_map",
    ),
    "cross_attention_hidden_size": ((), _DECODER),
    "is_causal": ((True,), "the port is causal"),
    "is_decoder": ((False, True), _DECODER),
    "is_encoder_decoder": ((False,), _DECODER),
    "per_layer_config": (({},), "layers that differ from each other are a family's own"),
    "prefix": (("",), "nothing is put before a prompt"),
    "pruned_heads": (({},), "pruned heads change the shapes"),
    "quantization_config": ((), "no port of a quantised checkpoint exists yet"),
    "tie_encoder_decoder": ((False,), _DECODER),
}

SETTINGS: Final[Mapping[str, Any]] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "suppress_tokens": None,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
}
"""Of generation, with the values that older writers put into every config. No logit depends on
them; but another value is meant for what is generated, which `generation_config.json` alone says.
"""

LACKED: Final[Mapping[str, Pinned]] = {
    "windows": {
        "sliding_window": ((), "no layer slides"),
        "use_sliding_window": ((False,), "no layer slides"),
    },
    "layer types": {"layer_types": ((), "all layers are alike")},
    "head norms": {"use_qk_norm": ((False,), "queries and keys are not normalised")},
    "neighbouring pairs": {
        "rope_interleaved": ((False,), "the halves of a head are paired"),
    },
    "several positions": {"use_mrope": ((False,), "positions are one number a token")},
    "biases of the feed-forward": {"mlp_bias": ((False,), "feed-forwards have no biases")},
    "shared experts": {
        "shared_expert_intermediate_size": ((0,), "no expert is shared by all tokens"),
    },
    "slices": {"pretraining_tp": ((1,), "projections are not sliced")},
    "caps": {
        "attn_logit_softcapping": ((), "scores are not capped"),
        "final_logit_softcapping": ((), "logits are not capped"),
    },
    "bidirectional layers": {"use_bidirectional_attention": ((False,), "the port is causal")},
}
"""What a family may lack, and the keys by which a file can say so."""
