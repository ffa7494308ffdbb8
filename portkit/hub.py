"""The files of a Hugging Face Hub repository, all of one commit, through the Hub's own cache.

Knows how a repository id, a revision and a file name become a local path, how to read a safetensors
file's header without its tensors, and what to tell a person when either fails. Leaves the cache's
layout, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, resumed downloads and progress bars to `huggingface_hub`,
which it imports only when a repository is really asked for. Knows nothing of what files mean.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from portkit import hub_answers
from portkit.errors import CheckpointError, HubError, PortkitError
from portkit.hub_answers import in_time, no_paths, refuse_path, too_slow
from portkit.json_reading import MAX_FILE_BYTES
from portkit.safetensors_header import LENGTH_BYTES, MAX_BYTES, header_length

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

_COMMIT = re.compile(r"[0-9a-f]{40}")

# Every checkpoint has one and it is read first, so it is the file that a revision is resolved with.
_CONFIG = "config.json"

_LARGE = (".safetensors", ".bin")

# The headers of published shards are mostly below this, so one request is mostly enough.
_FIRST_READ_BYTES = 100_000


def is_repository_id(text: str) -> bool:
    """Whether `text` could be the id of a Hub repository: `name` or `owner/name`, by its rules."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # is public

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


class RemoteFiles:
    """The files of one Hub repository at one commit (the `Files` protocol).

    `revision` is a branch, a tag or a commit; the default is the branch `main`. It is resolved
    once, at the first question, so that a push in the meantime cannot mix two versions. Where the
    Hub cannot be asked (HF_HUB_OFFLINE, no network, no access any more), the cache alone answers.
    `repo_type` is "model" or "dataset"; `first` is the file that a revision is resolved with.
    """

    def __init__(
        self,
        repo_id: str,
        revision: str | None = None,
        *,
        repo_type: str = "model",
        first: str = _CONFIG,
    ) -> None:
        if not is_repository_id(repo_id):
            raise HubError(
                f"{repo_id!r} is neither a folder nor a Hub repository: give the path of an "
                "existing folder, or an id such as google/gemma-3-270m"
            )
        self.repo_id = repo_id
        self.repo_type, self._first = repo_type, first
        self.revision = revision or "main"
        self.label = f"{repo_id}@{revision}" if revision else repo_id
        self._known: dict[str, HfFileMetadata | None] = {}

    @property
    def origin(self) -> str:
        """What messages call it, which say so where only the cache has been asked."""
        unreachable = vars(self).get("_unreachable")  # where it is known by now, without asking
        if unreachable is None:
            return self.label
        from huggingface_hub.errors import OfflineModeIsEnabled

        offline = isinstance(unreachable, OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be asked"
        return f"{self.label} (its cached files only: {why})"

    @cached_property
    def commit(self) -> str:
        """The commit that every file is read at, as 40 hexadecimal digits.

        Raises HubError where neither the Hub nor the cache knows the repository and revision.
        """
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        from huggingface_hub.errors import RemoteEntryNotFoundError

        with self._explaining(self._first):
            try:
                # By the revision's own name, so that the cache notes which commit it stands for:
                # what a later run without network goes by.
                return self._download(self._first, self.revision).parent.name
            except RemoteEntryNotFoundError as error:
                commit = str(error.response.headers["X-Repo-Commit"])
                refuse_path("commit", commit)
                return commit

    def has(self, name: str) -> bool:
        """Whether the repository has the file; of it, only response headers are fetched."""
        return self._cached(name) is not None or self._metadata(name) is not None

    def num_bytes(self, name: str) -> int:
        """The whole file's size, without fetching it. Raises HubError."""
        metadata = None if self._cached(name) else self._metadata(name)
        if metadata is None or metadata.size is None:
            return self.path(name).stat().st_size
        return metadata.size

    def path(self, name: str) -> Path:
        """The file in the cache, downloaded if it is not there. Raises HubError."""
        if (cached := self._cached(name)) is not None:
            return cached
        commit = self.commit
        with self._explaining(name):
            return self._download(name, commit)

    def header(self, name: str) -> bytes:
        """The JSON bytes of a safetensors file's header, without its tensors.

        A cached file is read; of any other only its first bytes are fetched. Raises HubError, and
        CheckpointError where the bytes are not those of a safetensors file.
        """
        cached = self._cached(name)
        if cached is None and self._unreachable is None:
            return _read_header(lambda count: self._fetch_start(name, count), name, self.label)
        local = cached or self.path(name)
        return _read_header(lambda count: _start(local, count), name, self.label)

    def _metadata(self, name: str) -> HfFileMetadata | None:
        """What the Hub says of a file that is not in the cache; None where it says there is none.

        Where it cannot be asked, what is not in the cache is not there.
        """
        from huggingface_hub import get_hf_file_metadata
        from huggingface_hub.errors import EntryNotFoundError

        if self._unreachable is not None:
            return None
        if name not in self._known:
            url = self._url(name, self.commit)
            with self._explaining(name):
                try:
                    what = f"the size of {name} of {self.label}"
                    self._known[name] = in_time(lambda: get_hf_file_metadata(url), what)
                except EntryNotFoundError:
                    self._known[name] = None
        return self._known[name]

    @cached_property
    def _unreachable(self) -> Exception | None:
        """Why the Hub does not answer about this repository, or None; asked at most once.

        One request without retries: `hf_hub_download` alone would insist for half a minute before
        it believed that there is no network.
        """
        from huggingface_hub import get_hf_file_metadata
        from huggingface_hub.errors import (
            EntryNotFoundError,
            FileMetadataError,
            RevisionNotFoundError,
        )

        try:
            url = self._url(self._first, self.revision)
            found = in_time(lambda: get_hf_file_metadata(url), f"an answer about {self.label}")
            if found.commit_hash is None:  # say, a sign-in page of the network
                return FileMetadataError("what answers there is no Hub")
        except (EntryNotFoundError, RevisionNotFoundError):
            return None  # an answer
        except Exception as error:
            return error.with_traceback(None)
        return None

    def _cached(self, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        commit = self.commit
        with self._explaining(name):
            cached = try_to_load_from_cache(
                self.repo_id, name, revision=commit, repo_type=self.repo_type
            )
        return Path(cached) if isinstance(cached, str) else None

    def _download(self, name: str, revision: str) -> Path:
        from huggingface_hub import hf_hub_download

        cache_only = self._unreachable is not None
        if cache_only:
            revision = _noted_commit(self, revision) or revision
        is_large = self.repo_type != "model" or name.endswith(_LARGE)

        def fetch() -> Path:
            with no_paths(None if is_large else MAX_FILE_BYTES):
                return Path(
                    hf_hub_download(
                        self.repo_id,
                        name,
                        revision=revision,
                        repo_type=self.repo_type,
                        local_files_only=cache_only,
                    )
                )

        return fetch() if is_large or cache_only else in_time(fetch, f"{name} of {self.label}")

    def _url(self, name: str, revision: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo_id, name, revision=revision, repo_type=self.repo_type)

    def _fetch_start(self, name: str, num_bytes: int) -> bytes:
        """The first `num_bytes` of a remote file; fewer where the file is shorter."""
        from huggingface_hub import get_session, hf_raise_for_status
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # is public

        url = self._url(name, self.commit)
        range_ = {"Range": f"bytes=0-{num_bytes - 1}", "Accept-Encoding": "identity"}
        headers = build_hf_headers(headers=range_)
        start, until = bytearray(), time.monotonic() + hub_answers.SMALL_FILE_SECONDS
        with (
            self._explaining(name),
            get_session().stream(
                "GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT
            ) as response,
        ):
            if response.status_code == 416:  # not even a first byte: an empty file
                return b""
            hf_raise_for_status(response)
            for chunk in response.iter_bytes():
                start += chunk
                if time.monotonic() > until:
                    raise too_slow(f"the header of {name} of {self.label}")
                if len(start) >= num_bytes:
                    break  # hang up: a server that ignores `Range` would go on to the last tensor
        return bytes(start[:num_bytes])

    @contextmanager
    def _explaining(self, name: str) -> Iterator[None]:
        """Turn whatever goes wrong between us, the network and the cache into a HubError."""
        try:
            yield
        except PortkitError:
            raise
        except Exception as error:
            raise HubError(" ".join(_explain(self, name, error).split())) from error


def _start(path: Path, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(num_bytes)


def _read_header(first: Callable[[int], bytes], name: str, label: str) -> bytes:
    """The JSON of the header in a safetensors file.

    `first(count)` gives the file's first `count` bytes, or all that it has.
    """
    start = first(_FIRST_READ_BYTES)
    length = header_length(start)
    if length is None or length > MAX_BYTES:
        found = f"{len(start)} bytes in all" if length is None else f"a header of {length}"
        raise CheckpointError(
            f"{name} of {label} is no safetensors file (it has {found}); fetch it again"
        )
    end = LENGTH_BYTES + length
    if len(start) < end and len(start) == _FIRST_READ_BYTES:
        start = first(end)
    if len(start) < end:
        raise CheckpointError(
            f"{name} of {label} is truncated: its header should have {length} bytes, "
            f"the file has {len(start)} in all; fetch it again"
        )
    return start[LENGTH_BYTES:end]


def _explain(files: RemoteFiles, name: str, error: Exception) -> str:
    """What went wrong with a file of a repository, and what to do about it."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError):
        return _explain_uncached(files, name, files._unreachable or error.__cause__ or error)
    if isinstance(error, RevisionNotFoundError):
        return (
            f"the Hub repository {files.repo_id} has no revision {files.revision!r}: give a "
            "branch, a tag or a full commit of it with --revision"
        )
    if isinstance(error, EntryNotFoundError):
        return f"the Hub repository {files.label} has no file {name}: is it a model checkpoint?"
    # The storage library is not Python: its full disk is a RuntimeError with the system's text.
    if (isinstance(error, OSError) and error.errno is not None) or "os error 28" in str(error):
        return _explain_disk(name, error, HF_HUB_CACHE)
    return _explain_answer(files.repo_id, name, error)


def _explain_uncached(files: RemoteFiles, name: str, reason: BaseException) -> str:
    """Why a file is not here: the cache has none, and for that reason only the cache was asked."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(reason, OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set and {name} of {files.label} is not in the cache at "
            f"{HF_HUB_CACHE}{_remains(files)}: unset HF_HUB_OFFLINE and run again to fetch it"
        )
    why = _explain_answer(files.repo_id, name, reason)
    if isinstance(reason, HfHubHTTPError) and reason.response.status_code < 500:
        return why
    return f"{why} ({name} is not in the cache at {HF_HUB_CACHE} either{_remains(files)})"


def _explain_answer(repo_id: str, name: str, error: BaseException) -> str:
    """Why the Hub, or whatever stands between us and it, gave no file."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    sign_in = "`hf auth login` or HF_TOKEN"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        account = f"the account whose token is in use ({sign_in})"
        login = f"your account, then log in with {sign_in}"
        return (
            f"{repo_id} is gated: accept its licence at {ENDPOINT}/{repo_id} with "
            f"{account if get_token() else login}"
        )
    if isinstance(error, RepositoryNotFoundError):
        access = "the token in use gives no access" if get_token() else f"log in with {sign_in}"
        return (
            f"{repo_id!r} is neither a folder here nor a repository on {ENDPOINT}: check the "
            f"spelling; if it is private, {access}"
        )
    if isinstance(error, HfHubHTTPError) and status in (401, 403):
        said = error.response.headers.get("X-Error-Message", status)
        return f"{ENDPOINT} denies access to {repo_id} ({said}): check the token in use ({sign_in})"
    if status is not None:
        return (
            f"{ENDPOINT} answered {status} for {name} of {repo_id}: try again later, or see "
            "that HF_ENDPOINT is right"
        )
    # By name: the HTTP library under huggingface_hub has changed with its major versions.
    if "Timeout" in type(error).__name__:
        return (
            f"{ENDPOINT} did not answer in time about {name} of {repo_id}: check the network, or "
            "give it longer with HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT (seconds)"
        )
    return (
        f"{name} of {repo_id} cannot be had from {ENDPOINT}: check the network, proxy and "
        f"HF_ENDPOINT, or give a local folder ({type(error).__name__}: {error})"
    )


def _explain_disk(name: str, error: Exception, cache: str) -> str:
    """Why a file could not be put into the cache."""
    if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{name} cannot be put into the cache at {cache} ({error}): mend it, or set HF_HOME"
    return f"no space for {name} in the cache at {cache}: free some, or set HF_HOME elsewhere"


def _remains(files: RemoteFiles) -> str:
    """What the cache holds of this repository, for a message about what it does not hold."""
    folder = _cache_folder(files)
    commit = _noted_commit(files, files.revision) or files.revision
    names = sorted(path.name for path in (folder / "snapshots" / commit).glob("*") if path.exists())
    if names:
        return f", which holds only {', '.join(names)} of it (an interrupted download?)"
    return ", which holds only other revisions of it" if any(folder.glob("snapshots/*/*")) else ""


def _noted_commit(files: RemoteFiles, revision: str) -> str | None:
    """The commit that the cache notes for a branch or tag, also where an editor ended the line."""
    ref = _cache_folder(files) / "refs" / revision
    noted = ref.read_text(errors="replace").strip() if ref.is_file() else ""
    return noted if _COMMIT.fullmatch(noted) else None


def _cache_folder(files: RemoteFiles) -> Path:
    """By the cache's documented layout: models--owner--name/{blobs,refs,snapshots/COMMIT}."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"{files.repo_type}s--{files.repo_id.replace('/', '--')}"
