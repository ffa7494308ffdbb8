"""A checkpoint as it lies on disk: config, header, and tensors that are read when asked for.

Knows files, their formats and what makes them untrustworthy; knows no model. Tensors come from the
safetensors library as views of the mapped file, so that opening touches no tensor byte. The header
is parsed here as well, because the library does not say which name stands twice, and because the
header of a remote file is all that is ever fetched of it to inspect it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from portkit.errors import CheckFailed, CheckpointError, InvalidConfig

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound


class Files(Protocol):
    """A flat folder of files, here or elsewhere."""

    @property
    def origin(self) -> str:
        """What messages call it."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a file; never fetches it."""
        ...

    def path(self, name: str) -> Path:
        """The file on this machine, fetched if it has to be; `PortkitError` where there is none."""
        ...

    def header(self, name: str) -> bytes:
        """The JSON of a safetensors file's header, without fetching the tensors."""
        ...

    def num_bytes(self, name: str) -> int:
        """The whole file's size."""
        ...


class LocalFiles:
    """A directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.origin = str(directory)

    def has(self, name: str) -> bool:
        return (self.directory / name).is_file()

    def path(self, name: str) -> Path:
        path = self.directory / name
        if not path.is_file():
            raise CheckpointError(f"{self.origin} has no {name}")
        return path

    def num_bytes(self, name: str) -> int:
        return self.path(name).stat().st_size

    def header(self, name: str) -> bytes:
        with self.path(name).open("rb") as file:
            length = header_length(file.read(_LENGTH_BYTES), self.num_bytes(name), name)
            return file.read(length)


def header_length(prefix: bytes, file_bytes: int, name: str) -> int:
    """The header's length from a safetensors file's first 8 bytes; `CheckpointError` if absurd."""
    if len(prefix) < _LENGTH_BYTES:
        raise CheckpointError(
            f"{name} is {file_bytes} bytes long: no safetensors file; fetch it again"
        )
    length = int.from_bytes(prefix, "little")
    if length > min(_MAX_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
        raise CheckpointError(
            f"{name} announces a header of {length} bytes in a file of {file_bytes}: it is truncated "
            "or no safetensors file; fetch it again"
        )
    return length


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its header describes it. `dtype` is the file format's word."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    file: str


class Checkpoint:
    """Config, header and lazily read tensors of one folder."""

    def __init__(self, files: Files, allow_pickle: bool = False) -> None:
        self.files = files
        self.allow_pickle = allow_pickle
        self._open: dict[str, Callable[[str], Tensor]] = {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`; `InvalidConfig` where it is absent or not a JSON object."""
        if not self.files.has(CONFIG):
            raise InvalidConfig(f"{self.files.origin} has no {CONFIG}: not a checkpoint")
        return _json_object(self.files.path(CONFIG).read_bytes(), CONFIG, InvalidConfig)

    @property
    def has_weights(self) -> bool:
        return any(self.files.has(name) for name in (SINGLE, INDEX, PICKLE, PICKLE_INDEX))

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, from the headers alone. `CheckpointError` on anything untrue."""
        if self.files.has(SINGLE):
            return _parse_header(self.files.header(SINGLE), SINGLE, self.files.num_bytes(SINGLE))
        if self.files.has(INDEX):
            return self._sharded(INDEX, self._safetensors_header)
        if not (self.files.has(PICKLE) or self.files.has(PICKLE_INDEX)):
            raise CheckpointError(f"{self.files.origin} has neither {SINGLE} nor {INDEX}")
        if not self.allow_pickle:
            raise CheckpointError(
                f"{self.files.origin} holds its weights as a pickle, which can run code when it is "
                "read; take a safetensors copy, or trust it with --allow-pickle"
            )
        if self.files.has(PICKLE):
            return self._pickle_header(PICKLE)
        return self._sharded(PICKLE_INDEX, self._pickle_header)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU as it is stored: a view of the mapped file."""
        info = self.tensors[name]
        tensor = self._reader(info.file)(name)
        assert tuple(tensor.shape) == info.shape, f"{name}: the header was read as {info.shape}"
        return tensor

    def check(self, advance: Callable[[], None] = lambda: None) -> dict[str, str]:
        """Read every byte: file name to sha256. `CheckFailed` on values that are not finite.

        `advance` is called after each tensor.
        """
        for info in self.tensors.values():
            tensor = self.read(info.name)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                bad = int((~tensor.isfinite()).sum())
                raise CheckFailed(
                    f"{info.file}: {info.name} holds {bad} values that are not finite "
                    f"(of {tensor.numel()}); the file is damaged or its training diverged"
                )
            advance()
        return {name: self._sha256(name) for name in self.weight_files}

    @property
    def weight_files(self) -> list[str]:
        """The files that hold tensors, in order of first mention."""
        return list(dict.fromkeys(info.file for info in self.tensors.values()))

    def _sha256(self, name: str) -> str:
        path = self.files.path(name)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        promised = path.resolve().name  # the Hub's cache names large files by their digest
        if len(promised) == len(found) and promised != found and _is_hex(promised):
            raise CheckFailed(f"{name} has sha256 {found} where the Hub's cache says {promised}")
        return found

    # -- shards ------------------------------------------------------------------------------

    def _sharded(
        self, index: str, header: Callable[[str], dict[str, TensorInfo]]
    ) -> dict[str, TensorInfo]:
        weight_map = _json_object(self.files.path(index).read_bytes(), index, CheckpointError).get(
            "weight_map"
        )
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map from tensor names to files")
        found: dict[str, TensorInfo] = {}
        for shard in dict.fromkeys(weight_map.values()):
            _refuse_path_outside(shard, index)
            if not self.files.has(shard):
                raise CheckpointError(f"{index} names {shard}, which {self.files.origin} lacks")
            for name, info in header(shard).items():
                if name in found:
                    raise CheckpointError(f"{name} is stored in {found[name].file} and in {shard}")
                if weight_map.get(name) != shard:
                    listed = weight_map.get(name, "no file")
                    raise CheckpointError(
                        f"{name} is stored in {shard}; {index} lists {listed} for it"
                    )
                found[name] = info
        for name, shard in weight_map.items():
            if name not in found:
                raise CheckpointError(f"{index} lists {name} in {shard}, which does not hold it")
        return found

    def _safetensors_header(self, name: str) -> dict[str, TensorInfo]:
        return _parse_header(self.files.header(name), name, self.files.num_bytes(name))

    def _pickle_header(self, name: str) -> dict[str, TensorInfo]:
        words = {dtype: word for word, dtype in DTYPES.items()}
        return {
            key: TensorInfo(
                key,
                tuple(tensor.shape),
                words.get(tensor.dtype, str(tensor.dtype)),
                tensor.numel() * tensor.element_size(),
                name,
            )
            for key, tensor in _load_pickle(self.files.path(name)).items()
        }

    def _reader(self, file: str) -> Callable[[str], Tensor]:
        if file not in self._open:
            path = self.files.path(file)
            if file.endswith(".safetensors"):
                try:
                    # The mapping outlives the handle through the tensors that view it.
                    self._open[file] = safe_open(path, framework="pt", device="cpu").get_tensor
                except (SafetensorError, OSError) as error:
                    raise CheckpointError(f"{file} cannot be read: {error}") from None
            else:
                self._open[file] = _load_pickle(path).__getitem__
        return self._open[file]


def _parse_header(raw: bytes, file: str, file_bytes: int) -> dict[str, TensorInfo]:
    header = _json_object(raw, f"{file}: its header", CheckpointError)
    header.pop("__metadata__", None)
    found: dict[str, TensorInfo] = {}
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            info = TensorInfo(name, tuple(map(int, shape)), dtype, end - begin, file)
            itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else None
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{file}: the header's entry for {name} makes no sense") from None
        if min(info.shape, default=0) < 0 or (
            itemsize is not None and math.prod(info.shape) * itemsize != info.num_bytes
        ):
            raise CheckpointError(
                f"{file}: {name} of shape {list(info.shape)} in {dtype} cannot fill "
                f"{info.num_bytes} bytes"
            )
        spans.append((begin, end, name))
        found[name] = info
    _refuse_holes(sorted(spans), file, file_bytes - _LENGTH_BYTES - len(raw))
    return found


def _refuse_holes(spans: list[tuple[int, int, str]], file: str, data_bytes: int) -> None:
    """Tensors must lie one behind the other and fill the file, or two could share bytes."""
    expected = 0
    for begin, end, name in spans:
        if begin != expected:
            raise CheckpointError(f"{file}: {name} begins at byte {begin} where {expected} is due")
        expected = end
    if expected != data_bytes:
        what = "truncated" if data_bytes < expected else "longer than its header says"
        raise CheckpointError(
            f"{file} is {what}: its tensors take {expected} bytes, it has {data_bytes}; fetch it again"
        )


def _refuse_path_outside(shard: object, index: str) -> None:
    """A shard's name comes from a file that somebody else wrote: it must stay in the folder."""
    parts = PurePosixPath(shard).parts if isinstance(shard, str) else ("..",)
    windows = PureWindowsPath(str(shard))
    if ".." in parts or "/" in parts or ".." in windows.parts or windows.drive or windows.root:
        raise CheckpointError(f"{index} names {shard!r}, which leaves the checkpoint's folder")


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds here, none of them documented
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path.name} cannot be read as plain tensors: {reason}") from None
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{path.name} is not a mapping from names to tensors")
    return loaded


def _json_object(raw: bytes, what: str, error: type[Exception]) -> dict[str, Any]:
    """Parse a JSON object, refusing a key that stands twice: one of the two would be lost."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1)
            raise error(f"{what} holds {twice} twice")
        return found

    try:
        parsed = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as problem:
        raise error(f"{what} is not JSON ({problem})") from None
    if not isinstance(parsed, dict):
        raise error(f"{what} must be a JSON object, not {type(parsed).__name__}")
    return parsed


def _is_hex(text: str) -> bool:
    return all(character in "0123456789abcdef" for character in text)
