"""Writing a trace: tensors as they come, the description at the end, the file whole or not at all.

A safetensors file begins with its header, which nobody knows before the last tensor and the floors.
So the bytes lie on its disk first, without a name, and are put in order once: large elements first,
or a reader could not map them in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO
from uuid import uuid4

import torch
from torch import Tensor

from portkit.checkpoint import DTYPES
from portkit.errors import TraceError
from portkit.parity.traces.trace_file import KEY
from portkit.shown import as_json

_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_ALIGNMENT = 8
_COPIED_BYTES = 1 << 24


class TraceWriter:
    """Takes tensors one by one; `new_trace` makes one and names the file."""

    def __init__(self, spool: IO[bytes]) -> None:
        self._spool = spool
        self._entries: list[tuple[str, Tensor, int, int]] = []
        """Name, the tensor's kind on the meta device, and where its bytes lie."""
        self.description: str | None = None
        """To be given before the end."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; it may change afterwards."""
        begin = self._spool.tell()
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        self._spool.write(flat.numpy().data)
        self._entries.append((name, tensor.to("meta"), begin, self._spool.tell()))

    def copy_to(self, target: IO[bytes]) -> None:
        """Write the trace: header, then the tensors."""
        assert self.description is not None, "a trace without a description is none"
        ordered = sorted(self._entries, key=lambda entry: -entry[1].itemsize)
        header: dict[str, object] = {"__metadata__": {KEY: self.description}}
        offset = 0
        for name, kind, begin, end in ordered:
            header[name] = {
                "dtype": _WORDS[kind.dtype],
                "shape": list(kind.shape),
                "data_offsets": [offset, offset + end - begin],
            }
            offset += end - begin
        raw = as_json(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % _ALIGNMENT)
        target.write(len(raw).to_bytes(8, "little") + raw)
        for _, _, begin, end in ordered:
            self._spool.seek(begin)
            for start in range(begin, end, _COPIED_BYTES):
                target.write(self._spool.read(min(_COPIED_BYTES, end - start)))


@contextmanager
def new_trace(path: Path) -> Iterator[TraceWriter]:
    """A writer whose trace is at `path` once the block has ended well; one that was there is gone.

    Raises `TraceError` where it cannot be written; then, as after any exception, `path` is as it
    was.
    """
    if path.is_dir():
        raise TraceError(f"{path} is a folder: name a file in it")
    partial = path.parent / f".{path.name}.{uuid4().hex[:8]}.partial"
    try:
        try:
            with TemporaryFile(dir=path.parent) as spool:  # gone however the process ends
                writer = TraceWriter(spool)
                yield writer
                with partial.open("wb") as target:
                    writer.copy_to(target)
            partial.replace(path)
        except OSError as error:
            raise TraceError(
                f"{path} cannot be written: {error.strerror or error}; make room or name another"
            ) from error
    finally:
        with suppress(OSError):
            partial.unlink()
