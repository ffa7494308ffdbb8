"""What a Hub answers about a file, before a path in the cache is made of it, and in what time.

`huggingface_hub` joins ETag and commit to paths as they come: a server that is none of the Hub's
could have files written outside of the cache. Knows which words can be names there.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from portkit.errors import HubError

SMALL_FILE_SECONDS = 600.0
"""For all of a header, or of a file that is no weights: 34 MB at half a megabit a second."""
_Result = TypeVar("_Result")
_NAME = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.+=-]{0,199}")


def refuse_path(what: str, answered: str | None) -> None:
    """Raises `HubError` on a word of a Hub's that is no plain name."""
    if answered is None or _NAME.fullmatch(answered):
        return
    from huggingface_hub.constants import ENDPOINT

    raise HubError(
        f"{ENDPOINT} answers with the {what} {answered!r:.80}, which is no name for a file in the "
        "cache: do not trust it; see that HF_ENDPOINT is right"
    )


@contextmanager
def no_paths(most_bytes: int | None = None) -> Iterator[None]:
    """While this lasts, no answer that `hf_hub_download` gets leads out of the cache's folder.

    Nor is a file fetched that has more than `most_bytes`.

    It asks again by itself where a connection fails, with another client, so the one function that
    it asks by is watched and no client.
    """
    from huggingface_hub import file_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    ask = file_download.get_hf_file_metadata

    def checked(*arguments: Any, **named: Any) -> Any:
        try:
            found = ask(*arguments, **named)
        except RemoteEntryNotFoundError as error:
            refuse_path("commit", error.response.headers.get("X-Repo-Commit"))
            raise
        refuse_path("commit", found.commit_hash)
        refuse_path("ETag", found.etag)
        if most_bytes is not None and (found.size or 0) > most_bytes:
            raise HubError(
                f"{found.location} has {found.size:,} bytes, where such a file has at most "
                f"{most_bytes:,}: do not trust it"
            )
        return found

    file_download.get_hf_file_metadata = checked
    try:
        yield
    finally:
        file_download.get_hf_file_metadata = ask


def in_time(call: Callable[[], _Result], what: str) -> _Result:
    """What `call` gives, if it does so in the time that a small file may take.

    The Hub's library limits the time between two bytes, and a server that drips keeps to that.
    """
    ended: list[_Result | BaseException] = []

    def run() -> None:
        try:
            ended.append(call())
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SMALL_FILE_SECONDS)
    if not ended:
        raise too_slow(what)
    if isinstance(ended[0], BaseException):
        raise ended[0]
    return ended[0]


def too_slow(what: str) -> HubError:
    """The error of what was not sent in time."""
    from huggingface_hub.constants import ENDPOINT

    return HubError(
        f"{ENDPOINT} has not sent {what} in {SMALL_FILE_SECONDS:g} seconds: check the network, or "
        "give a local folder"
    )
