"""Files from a Hub: against a local stand-in, and against cache folders laid out as the Hub's are.

Each scenario is a process of its own, which answers in JSON. Nothing here reaches further than
127.0.0.1.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from parity_tests.engine.hub_server import (
    NOWHERE,
    PRELUDE,
    HubServer,
    answer,
    environment,
    fill_cache,
)
from portkit.errors import HubError
from portkit.hub import RemoteFiles, is_repository_id


def safetensors(num_tensors: int = 40, tensor_bytes: int = 25_000) -> tuple[bytes, bytes]:
    """A whole file, and the header in it."""
    tensors = {
        f"model.layers.{i}.weight": {
            "dtype": "U8",
            "shape": [tensor_bytes],
            "data_offsets": [i * tensor_bytes, (i + 1) * tensor_bytes],
        }
        for i in range(num_tensors)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    body = bytes(i % 251 for i in range(tensor_bytes)) * num_tensors
    return len(header).to_bytes(8, "little") + header + body, header


WEIGHTS, HEADER = safetensors()
FILES = {"config.json": b'{"model_type": "tiny"}', "model.safetensors": WEIGHTS}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("org/tiny", FILES)
        yield server


def test_repository_ids_are_told_from_paths() -> None:
    ids = ["gpt2", "google/gemma-3-270m", "Qwen/Qwen3-0.6B", "a/b_c.d"]
    others = ["", ".", "..", "./gpt2", "/models/x", "a/b/c", "a--b", "x.git", "a b", "-x/y", "~/m"]
    assert [text for text in ids + others if is_repository_id(text)] == ids
    with pytest.raises(HubError, match=r"^'\./missing' is neither a folder nor a Hub repository: "):
        RemoteFiles("./missing")


def test_all_files_are_of_the_commit_that_was_first_seen(hub: HubServer, tmp_path: Path) -> None:
    first = hub.repositories["org/tiny"].refs["main"]
    code = """
import urllib.request
files = RemoteFiles("org/tiny")
out["config"] = files.path("config.json").read_text()
urllib.request.urlopen(ENDPOINT + "/push")
out["commit"] = files.commit
out["has"] = [files.has("model.safetensors"), files.has("tokenizer.json")]
out["header"] = files.header("model.safetensors").decode()
path = files.path("model.safetensors")
out["path"], out["blob"] = str(path), str(path.resolve())
out["missing"] = refusal(files.path, "tokenizer.json")
"""
    newer = {"config.json": b"{}", "model.safetensors": b"", "tokenizer.json": b"{}"}
    hub.on_push = lambda: hub.push("org/tiny", newer)
    got = answer(f"ENDPOINT = {hub.url!r}\n{code}", hub.url, tmp_path)
    folder = tmp_path / "hub" / "models--org--tiny"
    assert hub.repositories["org/tiny"].refs["main"] != first
    assert got["commit"] == first
    assert got["config"] == FILES["config.json"].decode()
    assert got["has"] == [True, False]
    assert got["header"] == HEADER.decode()
    assert got["path"] == str(folder / "snapshots" / first / "model.safetensors")
    assert Path(str(got["blob"])).parent == folder / "blobs"
    assert Path(str(got["path"])).read_bytes() == WEIGHTS
    assert (folder / "refs" / "main").read_text() == first
    assert str(got["missing"]).startswith("HubError: the Hub repository org/tiny has no file tok")


def test_a_header_costs_its_own_bytes(hub: HubServer, tmp_path: Path) -> None:
    code = """
files = RemoteFiles("org/tiny")
out["has"] = [files.has("model.safetensors") for _ in range(3)]
out["has_not"] = [files.has("model.safetensors.index.json") for _ in range(3)]
out["bytes"] = files.num_bytes("model.safetensors")
out["header"] = files.header("model.safetensors").decode()
"""
    assert answer(code, hub.url, tmp_path) == {
        "has": [True] * 3,
        "has_not": [False] * 3,
        "bytes": len(WEIGHTS),
        "header": HEADER.decode(),
    }
    assert hub.asked("model.safetensors.index.json") == ["HEAD model.safetensors.index.json"]
    assert hub.asked("model.safetensors") == [
        "HEAD model.safetensors",
        "GET model.safetensors",  # answered with the way to the storage
        "GET model.safetensors",
    ]
    assert hub.requests[-1].range == "bytes=0-99999"
    assert hub.served_bytes("model.safetensors") == 100_000 < len(WEIGHTS) // 10
    assert not list(tmp_path.rglob("model.safetensors"))


def test_headers_of_every_kind(hub: HubServer, tmp_path: Path) -> None:
    long, long_header = safetensors(num_tensors=2000, tensor_bytes=10)
    exact, exact_header = safetensors(num_tensors=1, tensor_bytes=10)
    absurd = (10**15).to_bytes(8, "little") + b"{" * 30
    files = {
        "config.json": b"{}",
        "long.safetensors": long,
        "exact.safetensors": exact[: 8 + len(exact_header)],
        "empty.safetensors": b"",
        "short.safetensors": b"\x03\0\0",
        "absurd.safetensors": absurd,
        "cut.safetensors": exact[: 8 + len(exact_header) - 1],
        "long-cut.safetensors": long[: 8 + len(long_header) - 1],
    }
    hub.add("org/kinds", files)
    code = f"""
files = RemoteFiles("org/kinds")
for name in {sorted(set(files) - {"config.json"})!r}:
    out[name.removesuffix(".safetensors")] = refusal(lambda: files.header(name).decode())
"""
    remote = answer(code, hub.url, tmp_path)
    fill_cache(tmp_path / "other", "org/kinds", files)
    cached = answer(code, NOWHERE, tmp_path / "other", HF_HUB_OFFLINE="1")
    not_one = (
        "CheckpointError: {}.safetensors of org/kinds is no safetensors file "
        "(it has {}); fetch it again"
    )
    truncated = (
        "CheckpointError: {}.safetensors of org/kinds is truncated: "
        "its header should have {} bytes, the file has {} in all; fetch it again"
    )
    assert len(long_header) > 100_000 - 8
    assert remote == {
        "long": f"no error, but {long_header.decode()!r}",
        "exact": f"no error, but {exact_header.decode()!r}",
        "empty": not_one.format("empty", "0 bytes in all"),
        "short": not_one.format("short", "3 bytes in all"),
        "absurd": not_one.format("absurd", f"a header of {10**15}"),
        "cut": truncated.format("cut", len(exact_header), 7 + len(exact_header)),
        "long-cut": truncated.format("long-cut", len(long_header), 7 + len(long_header)),
    }
    assert cached == remote


def test_a_server_without_ranges_is_left_early(hub: HubServer, tmp_path: Path) -> None:
    huge, header = safetensors(num_tensors=100, tensor_bytes=1_000_000)
    hub.add("org/huge", {"config.json": b"{}", "model.safetensors": huge})
    hub.ignores_range = True
    code = 'out["header"] = RemoteFiles("org/huge").header("model.safetensors").decode()'
    assert answer(code, hub.url, tmp_path)["header"] == header.decode()
    # What the system's socket buffers took in before the connection was closed.
    assert hub.served_bytes("model.safetensors") < len(huge) // 5


def test_tokens_reach_the_hub_and_nobody_else(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/private", FILES, token="hf_secret")
    code = """
files = RemoteFiles("org/private")
out["header"] = files.header("model.safetensors").decode()
out["weights"] = files.path("model.safetensors").stat().st_size
"""
    got = answer(code, hub.url, tmp_path, HF_TOKEN="hf_secret")
    assert got == {"header": HEADER.decode(), "weights": len(WEIGHTS)}
    for request in hub.requests:
        secret = None if request.path.startswith("/storage/") else "Bearer hf_secret"
        assert request.authorization == secret


def test_a_cut_download_goes_on_where_it_stopped(hub: HubServer, tmp_path: Path) -> None:
    weights, _ = safetensors(num_tensors=12, tensor_bytes=1 << 20)
    hub.add("org/large", {"config.json": b"{}", "model.safetensors": weights})
    hub.cuts_at_bytes = 11 << 20
    code = 'out["path"] = str(RemoteFiles("org/large").path("model.safetensors"))'
    assert Path(str(answer(code, hub.url, tmp_path)["path"])).read_bytes() == weights
    # It is written in pieces of 10 MiB: the first is kept.
    assert hub.requests[-1].range == f"bytes={10 << 20}-"
    assert hub.served_bytes("model.safetensors") == len(weights) + (1 << 20)


@pytest.mark.parametrize("more", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["down", "offline"])
def test_without_network_the_cache_answers(more: dict[str, str], tmp_path: Path) -> None:
    fill_cache(tmp_path, "org/tiny", FILES)
    half = fill_cache(tmp_path, "org/half", {"config.json": b"{}", "tokenizer.json": b"{}"})
    (half / "blobs" / f"{7:064x}.incomplete").write_bytes(WEIGHTS[:1000])
    code = f"""
for revision in (None, "main", {"c" * 40!r}):
    files = RemoteFiles("org/tiny", revision)
    out[str(revision)] = [
        files.commit,
        files.has("model.safetensors"),
        files.has("model.safetensors.index.json"),
        files.header("model.safetensors").decode(),
        files.num_bytes("model.safetensors"),
        files.path("config.json").read_text(),
    ]
files = RemoteFiles("org/half")
out["origin"] = [files.origin, files.has("config.json") and files.origin]
out["half"] = [files.has("model.safetensors"), refusal(files.path, "model.safetensors"),
               refusal(files.header, "model.safetensors")]
out["branch"] = refusal(RemoteFiles("org/tiny", "dev").path, "config.json")
out["unknown"] = refusal(RemoteFiles("org/unknown").has, "config.json")
"""
    got = answer(code, NOWHERE, tmp_path, **more)
    config = FILES["config.json"].decode()
    whole = ["c" * 40, True, False, HEADER.decode(), len(WEIGHTS), config]
    assert [got[revision] for revision in ("None", "main", "c" * 40)] == [whole] * 3

    cache = tmp_path / "hub"
    holds = ", which holds only config.json, tokenizer.json of it (an interrupted download?)"
    if more:
        message = (
            "HubError: HF_HUB_OFFLINE is set and {} of {} is not in the cache at "
            f"{cache}{{}}: unset HF_HUB_OFFLINE and run again to fetch it"
        )
    else:
        message = (
            f"HubError: {{}} of {{}} cannot be had from {NOWHERE}: check the network, proxy and "
            "HF_ENDPOINT, or give a local folder (ConnectError: [Errno 111] Connection refused) "
            f"({{}} is not in the cache at {cache} either{{}})"
        )

    def expected(name: str, repo_id: str, revision: str, remains: str) -> str:
        if more:
            return message.format(name, repo_id + revision, remains)
        return message.format(name, repo_id, name, remains)

    why = "HF_HUB_OFFLINE is set" if more else "the Hub cannot be asked"
    assert got["origin"] == ["org/half", f"org/half (its cached files only: {why})"]
    weights = expected("model.safetensors", "org/half", "", holds)
    assert got["half"] == [False, weights, weights]
    assert got["branch"] == expected(
        "config.json", "org/tiny", "@dev", ", which holds only other revisions of it"
    )
    assert got["unknown"] == expected("config.json", "org/unknown", "", "")


def test_a_half_downloaded_repository_is_completed(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.repositories["org/tiny"].refs["main"]
    folder = fill_cache(tmp_path, "org/tiny", {"config.json": FILES["config.json"]}, commit)
    (folder / "snapshots" / commit / "model.safetensors").symlink_to("../../blobs/lost")
    code = """
files = RemoteFiles("org/tiny")
out["header"] = files.header("model.safetensors").decode()
out["bytes"] = files.path("model.safetensors").stat().st_size
"""
    got = answer(code, hub.url, tmp_path)
    assert got == {"header": HEADER.decode(), "bytes": len(WEIGHTS)}
    assert "GET config.json" not in hub.asked("config.json")


def test_each_refusal_says_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/private", FILES, token="hf_secret")
    hub.add("org/gated", FILES, gated=True)
    hub.add("org/empty", {"README.md": b""})
    code = """
def config(repo_id, revision=None):
    return refusal(RemoteFiles(repo_id, revision).path, "config.json")
out["absent"] = config("org/absent")
out["private"] = config("org/private")
out["gated"] = config("org/gated")
out["revision"] = config("org/tiny", "v9")
out["commit"] = config("org/tiny", "d" * 40)
out["empty"] = config("org/empty")
out["has"] = refusal(RemoteFiles("org/empty").has, "config.json")
files = RemoteFiles("org/tiny")
out["file"] = refusal(files.header, "model-00001-of-00002.safetensors")
out["size"] = refusal(files.num_bytes, "model-00001-of-00002.safetensors")
"""
    sign_in = "`hf auth login` or HF_TOKEN"
    unknown = (
        f"HubError: '{{}}' is neither a folder here nor a repository on {hub.url}: "
        "check the spelling; if it is private, {}"
    )
    gated = f"HubError: org/gated is gated: accept its licence at {hub.url}/org/gated with {{}}"
    revision = (
        "HubError: the Hub repository org/tiny has no revision {!r}: "
        "give a branch, a tag or a full commit of it with --revision"
    )
    no_file = "HubError: the Hub repository {} has no file {}: is it a model checkpoint?"
    no_shard = no_file.format("org/tiny", "model-00001-of-00002.safetensors")
    both = {
        "revision": revision.format("v9"),
        "commit": revision.format("d" * 40),
        "empty": no_file.format("org/empty", "config.json"),
        "has": "no error, but False",
        "file": no_shard,
        "size": no_shard,
    }
    assert answer(code, hub.url, tmp_path) == both | {
        "absent": unknown.format("org/absent", f"log in with {sign_in}"),
        "private": unknown.format("org/private", f"log in with {sign_in}"),
        "gated": gated.format(f"your account, then log in with {sign_in}"),
    }
    assert answer(code, hub.url, tmp_path, HF_TOKEN="hf_other") == both | {
        "absent": unknown.format("org/absent", "the token in use gives no access"),
        "private": unknown.format("org/private", "the token in use gives no access"),
        "gated": gated.format(f"the account whose token is in use ({sign_in})"),
    }
    assert set(answer(code, hub.url, tmp_path, HF_TOKEN="wrong").values()) == {
        f"HubError: {hub.url} denies access to {repo_id} "
        f"(Invalid credentials in Authorization header): check the token in use ({sign_in})"
        for repo_id in ("org/absent", "org/private", "org/gated", "org/tiny", "org/empty")
    }


def test_servers_that_fail_or_are_none(hub: HubServer, tmp_path: Path) -> None:
    code = 'out["is"] = refusal(RemoteFiles("org/tiny").path, "config.json")'
    uncached = f"(config.json is not in the cache at {tmp_path / 'hub'} either)"
    hub.status = 503
    assert answer(code, hub.url, tmp_path)["is"] == (
        f"HubError: {hub.url} answered 503 for config.json of org/tiny: try again later, or see "
        f"that HF_ENDPOINT is right {uncached}"
    )
    hub.status = 200  # what a network's sign-in page would do
    assert answer(code, hub.url, tmp_path)["is"] == (
        f"HubError: config.json of org/tiny cannot be had from {hub.url}: "
        "check the network, proxy and HF_ENDPOINT, or give a local folder "
        f"(FileMetadataError: what answers there is no Hub) {uncached}"
    )
    hub.status, hub.stalls_s = None, 3.0
    assert answer(code, hub.url, tmp_path, HF_HUB_ETAG_TIMEOUT="1")["is"] == (
        f"HubError: {hub.url} did not answer in time about config.json of org/tiny: check the "
        "network, or give it longer with HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT (seconds) "
        + uncached
    )


@pytest.mark.parametrize(
    "says",
    [
        {"ETag": '"../../../../planted"'},
        {"ETag": 'W/"ABSOLUTE"'},
        {"ETag": '".."'},
        {"ETag": '"a\\\\b"'},
        {"X-Linked-Etag": '"../../../../planted"'},
        {"X-Repo-Commit": "../../../../planted"},
        {"X-Repo-Commit": "ABSOLUTE"},
    ],
    ids=lambda says: "-".join((*says, *says.values())).replace("/", "|"),
)
def test_no_answer_leads_out_of_the_cache(
    says: dict[str, str], hub: HubServer, tmp_path: Path
) -> None:
    """The Hub's library makes paths of ETag and commit as they come, of a missing file's too."""
    home, planted = tmp_path / "outside" / "home", tmp_path / "planted"
    hub.says = {key: value.replace("ABSOLUTE", str(planted)) for key, value in says.items()}
    code = """
files = RemoteFiles("org/tiny")
out["config"] = refusal(files.path, "config.json")
files = RemoteFiles("org/tiny", COMMIT)
out["weights"] = refusal(files.path, "model.safetensors")
out["missing"] = refusal(files.path, "tokenizer.json")
files = RemoteFiles("org/tiny", first="tokenizer.json")
out["commit"] = refusal(getattr, files, "commit")
"""
    commit = hub.repositories["org/tiny"].refs["main"]
    out = answer(code.replace("COMMIT", repr(commit)), hub.url, home)
    what = "ETag" if "tag" in next(iter(says)).lower() else "commit"
    refused = {key for key, text in out.items() if f"answers with the {what} '" in str(text)}
    assert all(str(out[key]).startswith("HubError: ") for key in refused)
    assert (
        refused
        == {
            "ETag": {"config"},
            "X-Linked-Etag": {"weights"},
            "X-Repo-Commit": {"config", "weights", "missing", "commit"},
        }[next(iter(says))]
    )
    assert [path for path in tmp_path.rglob("*") if "planted" in path.name] == []
    assert {path.name for path in tmp_path.iterdir()} <= {"outside"}


def test_a_hub_that_drips_is_left(hub: HubServer, tmp_path: Path) -> None:
    """Each byte comes in time, and all of them never would: config, size and header."""
    code = """
import time
from portkit import hub_answers
hub_answers.SMALL_FILE_SECONDS = 10.0
started = time.monotonic()
out["config"] = refusal(RemoteFiles("org/tiny").path, "config.json")
out["in time"] = time.monotonic() - started < 40
"""
    hub.drips_s = 2.0
    got = answer(code, hub.url, tmp_path)
    assert got == {
        "config": f"HubError: {hub.url} has not sent config.json of org/tiny in 10 seconds: check "
        "the network, or give a local folder",
        "in time": True,
    }
    code = """
from portkit import hub_answers
files = RemoteFiles("org/tiny")
files.commit
hub_answers.SMALL_FILE_SECONDS = 1.0
out["header"] = refusal(files.header, "model.safetensors")
"""
    hub.drips_s = 0.01
    assert answer(code, hub.url, tmp_path) == {
        "header": f"HubError: {hub.url} has not sent the header of model.safetensors of org/tiny "
        "in 1 seconds: check the network, or give a local folder"
    }


def test_a_small_file_is_small(hub: HubServer, tmp_path: Path) -> None:
    code = """
from portkit import hub
hub.MAX_FILE_BYTES = 10
out["config"] = refusal(RemoteFiles("org/tiny").path, "config.json")
"""
    refused = str(answer(code, hub.url, tmp_path)["config"])
    assert refused.startswith("HubError: http")
    assert refused.endswith("has 22 bytes, where such a file has at most 10: do not trust it")
    assert hub.served_bytes("config.json") == 0


def test_a_cache_that_cannot_be_written(hub: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.touch()
    code = """
out["file"] = refusal(RemoteFiles("org/tiny").path, "config.json")
import errno, huggingface_hub
def full(*_, **__):
    raise problem
huggingface_hub.hf_hub_download = full
# As Python says it, and as the library that the Hub's own storage is read with does.
for problem in (OSError(errno.ENOSPC, "No space"), RuntimeError("IO Error: (os error 28)")):
    out[type(problem).__name__] = refusal(RemoteFiles("org/tiny").path, "config.json")
"""
    got = answer(code, hub.url, home)
    assert str(got.pop("file")).startswith(
        f"HubError: config.json cannot be put into the cache at {home}/hub ([Errno "
    )
    full = f"no space for config.json in the cache at {home}/hub: free some, or set HF_HOME"
    assert set(got.values()) == {f"HubError: {full} elsewhere"}


def test_progress_is_shown_where_a_person_looks_on(hub: HubServer, tmp_path: Path) -> None:
    script = f"{PRELUDE}\nprint(RemoteFiles('org/tiny').path('model.safetensors').name)"

    def shown(home: Path, terminal: bool) -> tuple[str, str]:
        ours, theirs = pty.openpty() if terminal else os.pipe()
        if terminal:
            termios.tcsetwinsize(theirs, (24, 100))
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment(hub.url, home),
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
            timeout=60,
            check=True,
        )
        os.set_blocking(ours, False)
        try:
            return done.stdout, os.read(ours, 1 << 20).decode()
        except BlockingIOError:
            return done.stdout, ""
        finally:
            os.close(ours)
            os.close(theirs)

    stdout, stderr = shown(tmp_path / "a", terminal=True)
    assert stdout == "model.safetensors\n"
    assert "100%" in stderr
    assert "1.00M/1.00M" in stderr
    assert shown(tmp_path / "b", terminal=False) == ("model.safetensors\n", "")
