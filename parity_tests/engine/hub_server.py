"""A stand-in for the Hugging Face Hub: a server on 127.0.0.1 and a cache folder as the Hub's is.

Knows the part of the Hub's HTTP interface that downloading needs: `/{repo}/resolve/{rev}/{file}`
with its headers, error codes and tokens, small files answered in place and weights by a redirect to
another origin, as the Hub's storage is, which serves ranges; it remembers what it was asked. Knows
how to ask from a fresh process, since `huggingface_hub` reads its environment when it is imported.
Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote

NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens

PRELUDE = """
import json, pathlib
from portkit.errors import PortkitError
from portkit.hub import RemoteFiles

def refusal(ask, *arguments):
    try:
        return f"no error, but {ask(*arguments)!r}"
    except PortkitError as error:
        return f"{type(error).__name__}: {error}"
"""

_RESOLVE = re.compile(
    r"/(?P<repo>(?:datasets/)?[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<name>.+)"
)
_CHUNK_BYTES = 1 << 16


@dataclass
class Repository:
    """What the Hub holds under one id: `{commit: {file name: bytes}}`, and branches and tags."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    token: str | None = None  # whoever does not send it cannot see the repository
    gated: bool = False  # whoever sees it has still to accept a licence


@dataclass(frozen=True)
class Request:
    """One request as it came in, and how many bytes of body went out."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    body_bytes: int


@dataclass
class HubServer:
    """`with HubServer() as hub:` serves `hub.repositories` at `hub.url`, each request in a thread.

    The switches below are the ways in which networks and servers misbehave.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    ignores_range: bool = False
    status: int | None = None  # answer everything with this
    stalls_s: float = 0.0  # wait before each answer
    drips_s: float = 0.0  # send a byte at a time, and wait so long after each
    cuts_at_bytes: int | None = None  # hang up once, after this much of a body
    says: dict[str, str] = field(default_factory=dict)  # headers in place of the right ones
    on_push: Callable[[], object] | None = None  # what a client's request for /push sets off

    def __enter__(self) -> HubServer:
        self._http = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self})
        )
        self._http.daemon_threads = True
        # A client hangs up on purpose in these tests: nothing to report.
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def storage_url(self) -> str:
        """Another origin than `url`: what is secret to the one must not be sent to the other."""
        return f"http://localhost:{self._http.server_port}/storage"

    def add(self, repo_id: str, files: dict[str, bytes], **options: object) -> Repository:
        """A repository with one commit, on its branch `main`."""
        repository = Repository({}, {}, **options)  # type: ignore[arg-type]
        self.repositories[repo_id] = repository
        self.push(repo_id, files)
        return repository

    def push(self, repo_id: str, files: dict[str, bytes]) -> str:
        """A new commit on `main`; returns it."""
        repository = self.repositories[repo_id]
        seed = repr((repo_id, len(repository.commits), sorted(files)))
        commit = hashlib.sha1(seed.encode()).hexdigest()
        repository.commits[commit] = files
        repository.refs["main"] = commit
        return commit

    def asked(self, name: str = "") -> list[str]:
        """The requests that mention `name`, as `METHOD file`, in order of arrival."""
        return [
            f"{request.method} {request.path.rsplit('/', 1)[-1]}"
            for request in self.requests
            if request.path.endswith(name)
        ]

    def served_bytes(self, name: str = "") -> int:
        """How much of the bodies of files called `name` (all, if empty) was sent."""
        return sum(request.body_bytes for request in self.requests if request.path.endswith(name))


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep the test's output free of the server's log."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        time.sleep(self.hub.stalls_s)
        path = unquote(self.path)
        if self.hub.status is not None:
            self._send(self.hub.status, {})
        elif path == "/push" and self.hub.on_push is not None:
            self.hub.on_push()
            self._send(200, {})
        elif path.startswith("/storage/"):
            self._send_from_storage(path)
        elif (match := _RESOLVE.fullmatch(path)) is None:
            self._refuse(404, None, "Not found")
        else:
            self._resolve(match["repo"], match["revision"], match["name"])

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token == "wrong":
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(repo_id)
        if repository is None or repository.token not in (None, token):
            return self._refuse(401, "RepoNotFound", "Repository not found")
        if repository.gated:
            return self._refuse(403 if token else 401, "GatedRepo", "Access to it is restricted")
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self._send_or_redirect(repo_id, commit, name)

    def _send_or_redirect(self, repo_id: str, commit: str, name: str) -> None:
        content = self.hub.repositories[repo_id].commits[commit].get(name)
        common = {"X-Repo-Commit": commit}
        if content is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", common)
        if not name.endswith(".safetensors"):
            return self._send(200, common | {"ETag": f'"{_sha1(content)}"'}, content)
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{_sha256(content)}"'}
        location = f"{self.hub.storage_url}/{repo_id}/{commit}/{name}"
        return self._send(302, common | linked | {"Location": location})

    def _send_from_storage(self, path: str) -> None:
        *owner, commit, name = path.removeprefix("/storage/").split("/")
        content = self.hub.repositories["/".join(owner)].commits[commit][name]
        etag = {"ETag": f'"{_sha256(content)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if wanted is None or self.hub.ignores_range:
            return self._send(200, etag, content)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        if start >= len(content):
            return self._send(416, {"Content-Range": f"bytes */{len(content)}"})
        etag["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return self._send(206, etag, content[start:stop])

    def _refuse(
        self, status: int, code: str | None, message: str, more: dict[str, str] | None = None
    ) -> None:
        codes = {} if code is None else {"X-Error-Code": code}
        self._send(status, (more or {}) | codes | {"X-Error-Message": message})

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        own = {key: value for key, value in self.hub.says.items() if key in headers}
        for key, value in (headers | {"Content-Length": str(len(body))} | own).items():
            self.send_header(key, value)
        self.end_headers()
        sent = 0
        try:
            while self.command == "GET" and sent < len(body):
                if self.hub.cuts_at_bytes is not None and sent >= self.hub.cuts_at_bytes:
                    self.hub.cuts_at_bytes = None
                    self.close_connection = True
                    break
                chunk_bytes = 1 if self.hub.drips_s else _CHUNK_BYTES
                sent += self.wfile.write(body[sent : sent + chunk_bytes])
                time.sleep(self.hub.drips_s)
        finally:
            self.hub.requests.append(
                Request(
                    self.command,
                    unquote(self.path),
                    self.headers["Range"],
                    self.headers["Authorization"],
                    sent,
                )
            )


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """For a child: this process's environment with another Hub and `HF_HOME`, and no proxies."""
    ours = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and "proxy" not in key.lower()
    }
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return ours | hub | more


def fill_cache(home: Path, repo_id: str, files: dict[str, bytes], commit: str = "c" * 40) -> Path:
    """A repository as the Hub's cache keeps it: named snapshots that link to nameless blobs."""
    folder = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for part in (folder / "blobs", folder / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    for number, (name, content) in enumerate(files.items()):
        blob = folder / "blobs" / f"{number:040x}"
        blob.write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    return folder


def answer(code: str, endpoint: str, home: Path, **more: str) -> dict[str, object]:
    """What `code` puts into its dictionary `out`, run in a fresh process that must not complain."""
    script = f"{PRELUDE}\nout = {{}}\n{code}\nprint(json.dumps(out))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(endpoint, home, **more),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)
