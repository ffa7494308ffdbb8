"""Weights that torch pickled, where they are plain tensors: anything else is refused unread."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor


def plain_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle by what they are called there, mapped where the format lets them be.

    Raises `ValueError` where it asks for code, or holds anything but plain tensors.
    """
    mmap = zipfile.is_zipfile(path)  # what torch wrote before 1.6 is not
    try:
        loaded = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # torch raises many kinds here, none of them documented
        # Its text recommends to load without weights_only, which is what must not be done.
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"asks for {wanted[1]}" if wanted else "is damaged or no pickle of tensors"
        raise ValueError(reason) from None
    if not isinstance(loaded, dict):
        raise ValueError("does not map names to tensors")
    for name, tensor in loaded.items():
        if not (isinstance(name, str) and name.isprintable()):
            raise ValueError(f"holds {name!r:.60}, which is no name for a tensor")
        if not (isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.is_cpu):
            raise ValueError(f"holds {name:.60}, which is no plain tensor")
    return loaded
