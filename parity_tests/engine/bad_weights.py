"""The table of bad input, first part: weights that are damaged, foreign, or do not fit.

A row's words are those without which the one line would not help: what is wrong, and what to do.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from parity_tests.engine.damage import (
    GONE,
    INDEX,
    PICKLE,
    SHARDS,
    WEIGHTS,
    Case,
    config,
    cut,
    entry,
    grow,
    header_bytes,
    link,
    malicious,
    nothing,
    pickle,
    put,
    remove,
    rename,
    several,
    shard_map,
    tensors,
    with_options,
)

ROUTER = "model.layers.1.mlp.gate.weight"
STACKED = "model.layers.1.feed_forward.experts.gate_up_proj"
LLAMA4_ROUTER = "model.layers.1.feed_forward.router.weight"
SHARED = "model.layers.1.feed_forward.shared_expert.up_proj.weight"
BIAS = "model.layers.1.self_attn.k_proj.bias"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
NORM, HEAD, GATE = "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.gate_proj.weight"
AGAIN = "fetch the checkpoint again"
NAN, INFINITY = float("nan"), float("inf")


def flat(*values: float) -> torch.Tensor:
    return torch.tensor(values).repeat(24)[:24]


ALLOWED = with_options("--allow-pickle")
CHECKED = with_options("--check", "--json")
EXPORT = with_options("--export", "{parent}/copy")

FILES = [
    Case("truncated", cut(WEIGHTS, -1), (WEIGHTS, "truncated", AGAIN)),
    Case("truncated in the header", cut(WEIGHTS, 100), (WEIGHTS, "file of 100", AGAIN)),
    Case("truncated in the length", cut(WEIGHTS, 7), (WEIGHTS, "7 bytes long", AGAIN)),
    Case("empty", cut(WEIGHTS, 0), (WEIGHTS, "0 bytes long", AGAIN)),
    Case("too long", grow(WEIGHTS, 1), (WEIGHTS, "longer than its header", AGAIN)),
    Case(
        "header longer than the file",
        put(WEIGHTS, b"\xff" * 8 + b"{}"),
        (WEIGHTS, str(2**64 - 1), "file of 10", AGAIN),
    ),
    Case("header is not JSON", header_bytes(lambda raw: b"?" + raw[1:]), ("is not JSON", AGAIN)),
    Case("header is a list", header_bytes(b"[]"), ("must be a JSON object", "list")),
    Case(
        "header in UTF-16",
        header_bytes(lambda raw: raw.decode().encode("utf-16")),
        (WEIGHTS, "its header is not UTF-8 text", AGAIN),
    ),
    Case("entry is no object", header_bytes(b'{"a": 7}'), ("entry for a", "7", AGAIN)),
    Case("entry lacks the shape", header_bytes(b'{"a": {"dtype": "F32"}}'), ("for a",)),
    Case("unknown dtype", entry(NORM, {"dtype": "F33"}), (NORM, "'F33'", "supported: F64, F32")),
    Case("shape and bytes differ", entry(NORM, {"shape": [23]}), (NORM, "[23] in F32", AGAIN)),
    Case("shape of fractions", entry(NORM, {"shape": [24.0]}), (NORM, "[24.0] in F32", AGAIN)),
    Case("shape is infinite", entry(NORM, {"shape": [INFINITY]}), (NORM, "[inf]", AGAIN)),
    Case("shape below zero", entry(NORM, {"shape": [-6, -4]}), (NORM, "[-6, -4]", AGAIN)),
    Case("shape is absurd", entry(NORM, {"shape": [10**4000]}), (NORM, "10000", AGAIN)),
    Case(
        "tensors share bytes",
        entry(NORM, {"data_offsets": [0, 96]}),
        (WEIGHTS, "begins at byte", "is due", AGAIN),
    ),
    Case(
        "name that a terminal obeys",
        entry(NORM, {}, rename_to="\x1b]0;owned\x07"),
        (WEIGHTS, r"'\x1b]0;owned\x07'", "do not trust"),
    ),
    Case(
        "same tensor twice",
        header_bytes(lambda raw: raw.replace(b'"lm_head.weight"', f'"{NORM}"'.encode())),
        (WEIGHTS, f"{NORM} twice", AGAIN),
    ),
    Case("no weights", remove(WEIGHTS), ("{folder}", WEIGHTS, INDEX, "fetch the weights")),
    Case("dangling link", link(WEIGHTS, "blob"), ("{folder}", WEIGHTS, "fetch the weights")),
    Case(
        "disk refuses to read the weights",
        link(WEIGHTS, "/proc/self/mem"),
        (f"{WEIGHTS} cannot be read (Input/output error)", "permissions and disk"),
        needs_proc=True,
    ),
    Case(
        "inspect: truncated",
        cut(WEIGHTS, -1),
        (WEIGHTS, "truncated", AGAIN),
        arguments=("inspect", "{folder}"),
    ),
]

TENSORS = [
    Case("missing", tensors({NORM: GONE}), ("1 missing", NORM), code=1),
    Case("unexpected", tensors({"extra": torch.ones(2)}), ("1 unexpected", "extra"), code=1),
    Case("wrong shape", tensors({NORM: torch.ones(23)}), (NORM, "[23]", "[24]"), code=1),
    Case(
        "all at once",
        tensors({NORM: GONE, HEAD: torch.ones(31, 23), "extra": torch.ones(2)}),
        ("1 missing", NORM, "1 unexpected", "extra", HEAD, "[31, 23]", "[31, 24]"),
        code=1,
    ),
    Case(
        "wrong shape, only planned",
        tensors({NORM: torch.ones(24, 1)}),
        (NORM, "[24, 1]", "[24]"),
        code=1,
        arguments=with_options("--dry-run"),
    ),
    Case("wrong dtype", tensors({NORM: torch.ones(24).long()}), (NORM, "I64", "F32"), code=1),
    Case(
        "one-byte floats",
        tensors({NORM: torch.ones(24).to(torch.float8_e4m3fn)}),
        (NORM, "F8_E4M3", "supported", "quantised?"),
        code=1,
    ),
    Case(
        "tied copy of another shape",
        several(config({"tie_word_embeddings": True}), tensors({HEAD: torch.ones(30, 24)})),
        (HEAD, "[30, 24]", "[31, 24]"),
        code=1,
    ),
    Case(
        "tied copy of another dtype",
        several(config({"tie_word_embeddings": True}), tensors({HEAD: torch.ones(31, 24).int()})),
        (HEAD, "I32", "supported"),
        code=1,
    ),
    Case("bias missing", tensors({BIAS: GONE}), ("1 missing", BIAS), 1, "qwen2"),
    Case("expert missing", tensors({EXPERT: GONE}), ("1 missing", EXPERT), 1, "qwen3_moe"),
    Case(
        "expert too many",
        tensors({EXPERT.replace(".2.", ".3."): torch.ones(32, 24)}),
        ("1 unexpected", EXPERT.replace(".2.", ".3.")),
        1,
        "qwen3_moe",
    ),
    Case(
        "expert transposed",
        tensors({EXPERT: torch.ones(24, 32)}),
        (EXPERT, "[24, 32]", "[32, 24]"),
        1,
        "qwen3_moe",
    ),
    Case(
        "router of more experts",
        tensors({ROUTER: torch.ones(4, 24)}),
        (ROUTER, "[4, 24]", "[3, 24]"),
        1,
        "qwen3_moe",
    ),
    Case(
        "sparse layer said to be dense",
        config({"mlp_only_layers": [0, 1]}),
        ("3 missing: model.layers.1.mlp.gate_proj.weight", "10 unexpected", "mlp.experts.0"),
        1,
        "qwen3_moe",
    ),
    Case(
        "experts as another family stores them",
        tensors({STACKED: torch.ones(3, 64, 24)}),
        (STACKED, "[3, 64, 24]", "[3, 24, 64]"),
        1,
        "llama4_text",
    ),
    Case(
        "experts fewer than the config's",
        tensors({STACKED: torch.ones(2, 24, 64)}),
        (STACKED, "[2, 24, 64]", "[3, 24, 64]"),
        1,
        "llama4_text",
    ),
    Case(
        "router of fewer experts than there are",
        tensors({LLAMA4_ROUTER: torch.ones(2, 24)}),
        (LLAMA4_ROUTER, "[2, 24]", "[3, 24]"),
        1,
        "llama4_text",
    ),
    Case(
        "stacked experts missing",
        tensors({STACKED: GONE}),
        ("1 missing", STACKED),
        1,
        "llama4_text",
    ),
    Case(
        "sparse layer said to be dense, experts stacked",
        config({"moe_layers": []}),
        ("3 missing: model.layers.1.feed_forward.gate_proj.weight", "unexpected", "experts"),
        1,
        "llama4_text",
    ),
    Case(
        "shared expert missing",
        tensors({SHARED: GONE}),
        ("1 missing", SHARED),
        1,
        "llama4_text",
    ),
    Case(
        "NaN",
        tensors({NORM: flat(1, NAN, 1)}),
        (NORM, "8 values", "of 24", AGAIN),
        1,
        "llama",
        CHECKED,
    ),
    Case("infinity", tensors({NORM: flat(1, -INFINITY)}), (NORM, "12 values"), 1, "llama", CHECKED),
    Case(
        "NaN, nothing exported",
        tensors({NORM: flat(NAN)}),
        (NORM, "24 values"),
        code=1,
        arguments=(*CHECKED, *EXPORT[2:]),
    ),
    Case(
        "not the promised digest",
        several(rename(WEIGHTS, "0" * 64), link(WEIGHTS, "0" * 64)),
        (WEIGHTS, "sha256", "0" * 64, AGAIN),
        code=1,
        arguments=CHECKED,
    ),
]

_SHARDED = [
    Case(
        "tensor in two shards",
        tensors({NORM: torch.ones(24)}, SHARDS[1]),
        (NORM, *SHARDS, AGAIN),
    ),
    Case("../", shard_map({NORM: f"../{SHARDS[0]}"}), (INDEX, f"../{SHARDS[0]}", "leaves")),
    Case("sub/../..", shard_map({NORM: "sub/../../x.safetensors"}), (INDEX, "leaves", "not trust")),
    Case("absolute", shard_map({NORM: "/x.safetensors"}), (INDEX, "'/x.safetensors'", "leaves")),
    Case(
        "drive letter", shard_map({NORM: "c:x.safetensors"}), (INDEX, "'c:x.safetensors'", "leaves")
    ),
    Case(
        "backslashes", shard_map({NORM: r"..\x.safetensors"}), (INDEX, "leaves", "do not trust it")
    ),
    Case("missing shard", remove(SHARDS[1]), (INDEX, SHARDS[1], "{folder} lacks", AGAIN)),
    Case("truncated shard", cut(SHARDS[1], -4), (SHARDS[1], "truncated", AGAIN)),
    Case("empty shard", cut(SHARDS[0], 0), (SHARDS[0], "0 bytes long", AGAIN)),
    Case(
        "stored, not listed, unknown",
        tensors({"extra": torch.ones(2)}, SHARDS[0]),
        ("1 unexpected: extra", INDEX, "does not list", AGAIN),
        code=1,
    ),
    Case(
        "listed, not stored, needed",
        tensors({GATE: GONE}, SHARDS[1]),
        (f"1 missing: {GATE}", f"{INDEX} lists what no shard holds: {GATE}", AGAIN),
        code=1,
    ),
    Case("shard is a number", shard_map({NORM: 7}), (INDEX, "names 7", AGAIN)),
    Case(
        "shard is a list", shard_map({NORM: [SHARDS[0]]}), (INDEX, f"names ['{SHARDS[0]}']", AGAIN)
    ),
    Case("shard without a name", shard_map({NORM: ""}), (INDEX, "names ''", AGAIN)),
    Case(
        "shard with a name too long",
        several(shard_map({NORM: "x" * 300 + ".safetensors"}), remove(SHARDS[0])),
        (INDEX, SHARDS[0], AGAIN),
    ),
    Case("shard is a pickle", shard_map({NORM: PICKLE}), (INDEX, PICKLE, "no .safetensors file")),
    Case("index without a map", put(INDEX, {"metadata": {}}), (INDEX, "weight_map", AGAIN)),
    Case("index maps a list", put(INDEX, {"weight_map": [NORM]}), (INDEX, "weight_map", AGAIN)),
    Case("index maps nothing", put(INDEX, {"weight_map": {}}), (INDEX, "weight_map", AGAIN)),
    Case("index is not JSON", cut(INDEX, -1), (INDEX, "is not JSON", AGAIN)),
    Case("index is a list", put(INDEX, []), (INDEX, "must be a JSON object", "list", AGAIN)),
]
SHARDED = [replace(case, base="sharded") for case in _SHARDED]

_PICKLES = [
    Case("not allowed", nothing, ("{folder}", "pickle", "safetensors", "--allow-pickle --export")),
    Case("inspected", nothing, ("pickle", "run code"), arguments=("inspect", "{folder}")),
    Case("under another name", rename(PICKLE, WEIGHTS), (WEIGHTS, "no safetensors file", AGAIN)),
    Case("malicious, not allowed", malicious, ("pickle", "can run code")),
    Case("malicious", malicious, (PICKLE, "posix.system", "safetensors"), arguments=ALLOWED),
    Case("empty", cut(PICKLE, 0), (PICKLE, "damaged", "safetensors"), arguments=ALLOWED),
    Case("truncated", cut(PICKLE, -9), (PICKLE, "damaged", "safetensors"), arguments=ALLOWED),
    Case("a list", pickle(list), (PICKLE, "map names to tensors"), arguments=ALLOWED),
    Case("nested", pickle(lambda t: {"state": t}), (PICKLE, "state"), arguments=ALLOWED),
    Case(
        "nameless",
        pickle(lambda t: {**t, 7: t[NORM]}),
        (PICKLE, "7, which is no name"),
        arguments=ALLOWED,
    ),
    Case(
        "sparse",
        pickle(lambda t: {**t, NORM: t[NORM].to_sparse()}),
        (PICKLE, NORM, "no plain tensor", "safetensors"),
        arguments=ALLOWED,
    ),
    Case(
        "without values",
        pickle(lambda t: {**t, NORM: t[NORM].to("meta")}),
        (PICKLE, NORM, "no plain tensor", "safetensors"),
        arguments=ALLOWED,
    ),
]
PICKLES = [replace(case, base="pickled") for case in _PICKLES]
