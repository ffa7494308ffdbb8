"""Writing the Hugging Face layout: a folder that appears whole or not at all.

Knows the names of the files and how to write them safely. Knows no model and no foreign format.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from portkit.errors import ExportError
from portkit.shown import as_json

MAX_SHARD_BYTES = 5 * 10**9


@contextmanager
def new_folder(directory: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty folder whose files are those of `directory` once the block has ended well.

    Raises `ExportError` where `directory` is anything but absent or an empty folder, where fewer
    than `needed_bytes` are free, or where the disk refuses; then, as after any other exception,
    nothing is left behind.
    """
    try:
        target = directory.resolve()
        exists = target.is_dir()
        if target.exists() and not exists:
            raise ExportError(f"{directory} is not a folder: name one that is new or empty")
        if exists and any(target.iterdir()):
            raise ExportError(f"{directory} is not empty: name a folder that is new or empty")
        _refuse_full_disk(target, needed_bytes)
        # A folder that is there may be a mount, or where the user stands: it is not replaced.
        parent = target if exists else target.parent
        with _scratch_folder(parent, f".{target.name}.partial-{uuid4().hex[:8]}") as partial:
            yield partial
            if exists:
                for file in sorted(partial.iterdir()):
                    file.rename(target / file.name)
            else:
                partial.rename(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(
            f"cannot write {directory}: {reason}; nothing was left there; make room or name another"
        ) from error


@contextmanager
def _scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder, gone afterwards unless renamed; so are those parents that nothing came into."""
    folder = parent / name
    made = [one for one in folder.parents if not one.exists()]  # the innermost first
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for one in made:
            with suppress(OSError):  # not empty: the target is in it
                one.rmdir()


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` and their index.

    Tensors may be views of a mapped file.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        path = folder / file
        path.touch()
        usual_mode = path.stat().st_mode
        # Transformers refuses a file that does not say which framework laid its tensors out.
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(usual_mode)  # safetensors makes its files readable to their owner only
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder, "model.safetensors.index.json", index)


def write_json(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write one of the layout's small files, as readable as the Hub's own."""
    text = as_json(content, indent=2, allow_nan=True) + "\n"
    (folder / name).write_text(text, encoding="utf-8")


def _refuse_full_disk(target: Path, needed_bytes: int) -> None:
    """Before hours of writing, not after: the disk that the nearest existing folder is on."""
    parent = next(folder for folder in (target, *target.parents) if folder.is_dir())
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise ExportError(
            f"{parent} has {free_bytes:,} bytes free and the tensors take {needed_bytes:,}: "
            "make room or choose another disk"
        )
