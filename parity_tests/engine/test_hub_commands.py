"""`portkit inspect` and `portkit load` with a Hub id: what they fetch, and what they say if not.

The Hub is the local stand-in; the commands run as processes, as a person runs them.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from parity_tests.engine.hub_server import NOWHERE, HubServer, environment, fill_cache

CONFIG = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 320,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, np.ndarray]:
    shapes = {"model.embed_tokens.weight": (257, 320), "model.norm.weight": (320,)}
    for layer in range(2):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (320,),
                "post_attention_layernorm": (320,),
                "self_attn.q_proj": (120, 320),
                "self_attn.k_proj": (24, 320),
                "self_attn.v_proj": (24, 320),
                "self_attn.o_proj": (320, 120),
                "mlp.gate_proj": (192, 320),
                "mlp.up_proj": (192, 320),
                "mlp.down_proj": (320, 192),
            }.items()
        }
    draw = np.random.default_rng(7)
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


TENSORS = tensors()
NUM_PARAMETERS = sum(tensor.size for tensor in TENSORS.values())


def checkpoint() -> dict[str, bytes]:
    """Two shards and their index, among the other files that repositories hold."""
    shard_of = {name: SHARDS["layers.1" in name] for name in TENSORS}
    shards = {
        shard: save({name: tensor for name, tensor in TENSORS.items() if shard_of[name] == shard})
        for shard in SHARDS
    }
    index = {"metadata": {}, "weight_map": shard_of}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        INDEX: json.dumps(index).encode(),
        **shards,
        "README.md": b"#",
        "tokenizer.json": b"{}",
        "pytorch_model.bin": b"\0" * 1000,
    }


FILES = checkpoint()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("org/tiny", FILES)
        yield server


def portkit(
    *arguments: str, endpoint: str, home: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "portkit", *arguments],
        env=environment(endpoint, home, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_inspect_reads_the_config_and_the_headers(hub: HubServer, tmp_path: Path) -> None:
    done = portkit("inspect", "org/tiny", "--json", endpoint=hub.url, home=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts["parameters"] == NUM_PARAMETERS
    assert facts["tensors"] == len(TENSORS)
    assert facts["stored_bytes"] == 4 * NUM_PARAMETERS
    served = {name: hub.served_bytes(name) for name in FILES}
    assert served == dict.fromkeys(FILES, 0) | {
        "config.json": len(FILES["config.json"]),
        INDEX: len(FILES[INDEX]),
        SHARDS[0]: 100_000,
        SHARDS[1]: 100_000,
    }
    assert all(len(FILES[shard]) > 600_000 for shard in SHARDS)
    cached = sorted(path.name for path in tmp_path.rglob("snapshots/*/*"))
    assert cached == ["config.json", INDEX]


def test_load_fetches_what_it_reads(hub: HubServer, tmp_path: Path) -> None:
    done = portkit("load", "org/tiny", "--check", "--json", endpoint=hub.url, home=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["parameters"] == NUM_PARAMETERS
    assert report["tensors"] == len(TENSORS)
    assert report["sha256"] == {name: hashlib.sha256(FILES[name]).hexdigest() for name in SHARDS}
    cached = {path.name: path.read_bytes() for path in tmp_path.rglob("snapshots/*/*")}
    assert cached == {name: FILES[name] for name in ("config.json", INDEX, *SHARDS)}


IN_ONE_PROCESS = """
import contextlib, io, json, sys
from portkit.cli import main

said = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as exit_:
            asked = "huggingface_hub" in sys.modules
            said.append([exit_.code, out.getvalue(), err.getvalue(), asked])
print(json.dumps(said))
"""


def in_one_process(
    *commands: list[str], endpoint: str, home: Path, **more: str
) -> list[tuple[int, str, str, bool]]:
    """Of each command: exit code, stdout, stderr, whether huggingface_hub is imported by now."""
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS, json.dumps(commands)],
        env=environment(endpoint, home, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [tuple(one) for one in json.loads(done.stdout)]


def test_each_refusal_is_one_line_and_exit_code_2(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/gated", FILES, gated=True)
    hub.add("org/cut", FILES | {SHARDS[1]: FILES[SHARDS[1]][:200]})
    hub.add("org/less", {name: content for name, content in FILES.items() if name != SHARDS[1]})
    hub.add("org/text", {"README.md": b""})
    expected = {
        ("inspect", "./org/tiny"): "is neither a folder nor a Hub repository",
        ("inspect", "org/absent"): "neither a folder here nor a repository on",
        ("load", "org/gated"): f"accept its licence at {hub.url}/org/gated",
        ("load", "org/tiny", "--revision", "v9"): "org/tiny has no revision 'v9': give",
        ("load", "org/text"): "org/text has no config.json",
        ("load", "org/cut"): f"{SHARDS[1]} of org/cut is truncated",
        ("load", "org/less"): f"{INDEX} names {SHARDS[1]}, which org/less lacks",
    }
    said = in_one_process(*map(list, expected), endpoint=hub.url, home=tmp_path)
    for (code, out, err, _), words in zip(said, expected.values(), strict=True):
        assert (code, out) == (2, "")
        assert err.startswith("portkit: error: ")
        assert words in err
        assert err.count("\n") == 1
    assert not any(path.suffix == ".safetensors" for path in tmp_path.rglob("*"))


def test_folders_and_caches_without_a_hub(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    some = {"config.json": FILES["config.json"]}
    fill_cache(tmp_path, "org/whole", FILES)
    fill_cache(tmp_path, "org/single", some)
    fill_cache(tmp_path, "org/sharded", some | {name: FILES[name] for name in (INDEX, SHARDS[0])})
    local, whole, single, sharded = in_one_process(
        ["load", str(folder), "--json"],
        ["load", "org/whole", "--json"],
        ["load", "org/single"],
        ["load", "org/sharded"],
        endpoint=NOWHERE,
        home=tmp_path,
        HF_HUB_OFFLINE="1",
    )
    assert [local[0], whole[0], single[0], sharded[0]] == [0, 0, 2, 2]
    assert [local[3], whole[3]] == [False, True]
    assert json.loads(local[1]) | {"seconds": 0} == json.loads(whole[1]) | {"seconds": 0}
    assert json.loads(local[1])["parameters"] == NUM_PARAMETERS
    for (_, out, err, _), repo_id in ((single, "org/single"), (sharded, "org/sharded")):
        assert out == ""
        assert err.startswith("portkit: error: ")
        assert f"{repo_id} (its cached files only: HF_HUB_OFFLINE is set)" in err
        assert err.count("\n") == 1
    assert SHARDS[1] in sharded[2]


def test_a_noted_commit_may_end_in_a_newline(tmp_path: Path) -> None:
    """As where a person wrote it; Transformers reads such a cache."""
    single = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": save(TENSORS)}
    folder = fill_cache(tmp_path, "org/tiny", single)
    command = [sys.executable, "-m", "portkit", "load", "org/tiny", "--check", "--json"]
    environ = environment(NOWHERE, tmp_path, HF_HUB_OFFLINE="1")
    printed = []
    for ending in ("", "\n", "\r\n"):
        (folder / "refs" / "main").write_bytes(b"c" * 40 + ending.encode())
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        printed.append(json.loads(done.stdout)["sha256"])
    digest = hashlib.sha256(single["model.safetensors"]).hexdigest()
    assert printed == [{"model.safetensors": digest}] * 3
