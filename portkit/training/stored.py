"""What torch's distributed checkpoint has written, read as data: nothing in it can run code.

Torch keeps the index of a checkpoint as a pickle and reads it as one. Here it may name the classes
that torch writes there and no other, and whatever is no tensor is refused. Knows the index; which
files a step has to hold, and that they are whole, is `saves`'.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

INDEX = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
_NAMES = {
    *((_METADATA, name) for name in ("ChunkStorageMetadata", "Metadata", "MetadataIndex")),
    *((_METADATA, name) for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(
        (module, name)
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    ),
}
"""What an index may ask for, besides torch's dtypes: where it was written is noted as a path."""


def load_tensors(folder: Path, tensors: dict[str, Any], no_dist: bool) -> None:
    """Fill `tensors`, by part and name, from a checkpoint that fits them. Raises what torch does,
    which is no `Exception` where it gathers those of several ranks.
    """
    load(tensors, storage_reader=_Reader(folder), planner=_Planner(), no_dist=no_dist)


def misfit(folder: Path, tensors: Mapping[str, Any], files: Collection[str]) -> str | None:
    """Why the index in `folder` is not of `tensors`, lying in `files` beside it; None if it is."""
    try:
        index = _read_index(folder / INDEX)
        held = index.state_dict_metadata
        for part, values in tensors.items():
            for name, value in values.items():
                one = held.get(f"{part}.{name}")
                if not isinstance(one, TensorStorageMetadata):
                    return f"it holds no tensor {part}.{name}"
                if tuple(one.size) != tuple(value.shape):
                    due = list(value.shape)
                    return f"its {part}.{name} is of shape {list(one.size)} where {due} is due"
        if {one.relative_path for one in index.storage_data.values()} - set(files):
            return f"{INDEX} names files that it does not list"
    except Exception as error:  # bytes that somebody made may raise anything
        return f"{INDEX} cannot be read ({type(error).__name__}: {error})"
    return None


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = _read_index(Path(self.checkpoint_id) / INDEX)
        if index.storage_meta is not None:
            index.storage_meta.load_id = self.load_id
        return index


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_index(path: Path) -> Metadata:
    with path.open("rb") as file:
        index = _Unpickler(file).load()
    if not isinstance(index, Metadata):
        raise pickle.UnpicklingError("it is no index")
    return index
