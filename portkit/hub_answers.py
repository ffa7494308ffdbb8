"""What a Hub answers about a file, before a path in the cache is made of it.

`huggingface_hub` joins ETag and commit to paths as they come: a server that is none of the Hub's
could have files written outside of the cache. Knows which words can be names there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from portkit.errors import HubError

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
def no_paths() -> Iterator[None]:
    """While this lasts, no answer that `hf_hub_download` gets leads out of the cache's folder.

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
        return found

    file_download.get_hf_file_metadata = checked
    try:
        yield
    finally:
        file_download.get_hf_file_metadata = ask
