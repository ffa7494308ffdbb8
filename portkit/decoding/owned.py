"""Whether a file or folder can hold what another user wrote: code is run from none that can.

Knows owner, mode and links, as systems of the Unix kind have them; elsewhere links alone.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def strangeness(path: Path) -> str | None:
    """Why `path` is not ours alone, as a clause that goes on from its name; None if it is.

    What its folder allows is that folder's own question. Raises OSError where there is none.
    """
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if not hasattr(os, "geteuid"):
        return None
    if found.st_uid != os.geteuid():
        return f"belongs to another user (id {found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by other users (mode {stat.S_IMODE(found.st_mode):o})"
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        return "has a second name elsewhere (a hard link)"
    return None
