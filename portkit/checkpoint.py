"""A checkpoint as it lies on disk: config, header, and tensors that are read when asked for.

Knows files, their formats and what makes them untrustworthy; knows no model. Tensors come from the
safetensors library as views of the mapped file, so that opening touches no tensor byte. The header
is parsed here as well, because the library does not say which name stands twice, and because the
header of a remote file is all that is ever fetched of it to inspect it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from portkit import foreign_layouts
from portkit.errors import CheckpointError, InvalidConfig, PortkitError
from portkit.json_reading import parse_object, read_object
from portkit.plain_pickles import plain_tensors
from portkit.safetensors_header import LENGTH_BYTES, MAX_BYTES, header_length
from portkit.shown import listed

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
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


_AGAIN = "fetch the checkpoint again"
_MAX_TENSORS = 1 << 19
"""Of a checkpoint; the largest released have a quarter of it."""
_MAX_SHARDS = 1 << 12
_MAX_DIMENSIONS = 64
"""Torch's own, for most of what it computes."""


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
        with reading(name):
            return (self.directory / name).is_file()

    def path(self, name: str) -> Path:
        if not self.has(name):
            raise CheckpointError(f"{self.origin} has no {name}")
        path = self.directory / name
        with reading(name), path.open("rb") as file:
            start = file.read(len(foreign_layouts.LFS_POINTER))
        if start == foreign_layouts.LFS_POINTER:
            raise CheckpointError(
                f"{name} is a git-lfs pointer in the place of the file: run `git lfs pull` in "
                f"{self.origin}, or fetch the file itself"
            )
        return path

    def num_bytes(self, name: str) -> int:
        return self.path(name).stat().st_size

    def header(self, name: str) -> bytes:
        with reading(name), self.path(name).open("rb") as file:
            length = _checked_length(file.read(LENGTH_BYTES), self.num_bytes(name), name)
            return file.read(length)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn the system's refusal of a file into a `CheckpointError` that names it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{name} cannot be read ({error.strerror}): see to its path, permissions and disk"
        ) from None


def _checked_length(start: bytes, file_bytes: int, name: str) -> int:
    """The header's length from a safetensors file's first bytes; `CheckpointError` if absurd."""
    length = header_length(start)
    if length is None:
        raise _damaged(f"{name} is {file_bytes} bytes long: no safetensors file")
    if length > min(MAX_BYTES, file_bytes - LENGTH_BYTES):
        raise _damaged(
            f"{name} announces a header of {length} bytes in a file of {file_bytes}: it is "
            "truncated or no safetensors file"
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
        self.notes: tuple[str, ...] = ()
        """What is odd about its index and does no harm, once `tensors` is read."""
        self._open: dict[str, Callable[[str], Tensor]] = {}
        self._header_bytes = 0

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`; `InvalidConfig` where it is absent or not a JSON object.

        `CheckpointError` where the folder is an adapter's, whatever else lies in it.
        """
        if self.files.has(foreign_layouts.ADAPTER):
            said = foreign_layouts.adapter(self._json(foreign_layouts.ADAPTER, CheckpointError))
            raise CheckpointError(f"{self.files.origin}: {said}")
        if not self.files.has(CONFIG):
            found = foreign_layouts.by_files(self.files.has)
            raise InvalidConfig(
                f"{self.files.origin} has no {CONFIG}: {found or 'give the folder of a checkpoint'}"
            )
        return self._json(CONFIG, InvalidConfig)

    @property
    def has_weights(self) -> bool:
        return any(self.files.has(name) for name in (SINGLE, INDEX, PICKLE, PICKLE_INDEX))

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, from the headers alone. `CheckpointError` on anything untrue."""
        if self.files.has(SINGLE):
            return self._safetensors_header(SINGLE)
        if self.files.has(INDEX):
            return self._sharded(INDEX, self._safetensors_header)
        if not (self.files.has(PICKLE) or self.files.has(PICKLE_INDEX)):
            found = foreign_layouts.by_files(self.files.has) or "fetch the weights as well"
            raise CheckpointError(f"{self.files.origin} has neither {SINGLE} nor {INDEX}: {found}")
        if not self.allow_pickle:
            raise CheckpointError(
                f"{self.files.origin} holds its weights as a pickle, which can run code when it is "
                "read; take a safetensors copy, or make one from its plain tensors: "
                "portkit load REPO --allow-pickle --export DIR"
            )
        if self.files.has(PICKLE):
            return self._pickle_header(PICKLE)
        return self._sharded(PICKLE_INDEX, self._pickle_header)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU as it is stored: a view of the mapped file."""
        info = self.tensors[name]
        with suppress(SafetensorError, KeyError):  # where it is not there any more
            tensor = self._reader(info.file)(name)
            if tuple(tensor.shape) == info.shape and _word(tensor) == info.dtype:
                return tensor
        raise CheckpointError(
            f"{info.file} was replaced while it was read: {name} is no longer {info.dtype} of "
            f"shape {list(info.shape)}; run again when nobody writes to it"
        )

    @property
    def weight_files(self) -> list[str]:
        """The files that hold tensors, in order of first mention."""
        return list(dict.fromkeys(info.file for info in self.tensors.values()))

    def _json(self, name: str, error: type[PortkitError]) -> dict[str, Any]:
        return read_object(self.files.path(name), name, error, _AGAIN)

    # -- shards ------------------------------------------------------------------------------

    def _sharded(
        self, index: str, header: Callable[[str], dict[str, TensorInfo]]
    ) -> dict[str, TensorInfo]:
        weight_map = self._json(index, CheckpointError).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _damaged(f"{index} has no weight_map from tensor names to files")
        for shard in weight_map.values():
            _refuse_shard(shard, index)
        shards = dict.fromkeys(weight_map.values())
        _refuse_more(len(shards), _MAX_SHARDS, f"{index} names", "files")
        found: dict[str, TensorInfo] = {}
        for shard in shards:
            if not self.files.has(shard):
                raise _damaged(f"{index} names {shard}, which {self.files.origin} lacks")
            for name, info in header(shard).items():
                if name in found:
                    raise _damaged(f"{name} is stored in {found[name].file} and in {shard}")
                found[name] = info
        # Where a tensor is, its shard says; the index, which shards there are.
        astray = [name for name, info in found.items() if weight_map.get(name) != info.file]
        absent = [name for name in weight_map if name not in found]
        self.notes = (
            *([f"{index} does not list where it is stored: {listed(astray)}"] if astray else []),
            *([f"{index} lists what no shard holds: {listed(absent)}"] if absent else []),
        )
        return found

    def _safetensors_header(self, name: str) -> dict[str, TensorInfo]:
        raw = self.files.header(name)
        self._header_bytes += len(raw)
        _refuse_more(self._header_bytes, MAX_BYTES, f"the headers up to {name} have", "bytes")
        return _parse_header(raw, name, self.files.num_bytes(name))

    def _pickle_header(self, name: str) -> dict[str, TensorInfo]:
        return {
            key: TensorInfo(
                key,
                tuple(tensor.shape),
                _word(tensor),
                tensor.numel() * tensor.element_size(),
                name,
            )
            for key, tensor in self._pickled(name).items()
        }

    def _pickled(self, name: str) -> dict[str, Tensor]:
        try:
            return plain_tensors(self.files.path(name))
        except ValueError as error:
            raise CheckpointError(f"{name} {error}; take a safetensors copy") from None

    def _reader(self, file: str) -> Callable[[str], Tensor]:
        if file not in self._open:
            path = self.files.path(file)
            if file.endswith(".safetensors"):
                try:
                    # The mapping outlives the handle through the tensors that view it.
                    self._open[file] = safe_open(path, framework="pt", device="cpu").get_tensor
                except (SafetensorError, OSError) as error:
                    raise _damaged(f"{file} cannot be read: {error}") from None
            else:
                self._open[file] = self._pickled(file).__getitem__
        return self._open[file]


def _parse_header(raw: bytes, file: str, file_bytes: int) -> dict[str, TensorInfo]:
    header = parse_object(raw, f"{file}: its header", CheckpointError, _AGAIN)
    header.pop("__metadata__", None)
    _refuse_more(len(header), _MAX_TENSORS, f"{file} lists", "tensors")
    found: dict[str, TensorInfo] = {}
    spans = []
    for name, entry in header.items():
        _refuse_unprintable(name, file)
        try:
            word, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            dtype = DTYPES.get(word)
        except (KeyError, TypeError, ValueError):
            raise _damaged(
                f"{file}: the header's entry for {name} makes no sense: {entry!r:.120}"
            ) from None
        if dtype is None:
            raise CheckpointError(
                f"{file}: {name} is stored as {word!r:.60}; supported: {', '.join(DTYPES)}"
            )
        # So many sizes, each below 2**63, have a product in no time.
        sizes = len(shape) <= _MAX_DIMENSIONS and all(map(_is_size, (*shape, begin, end)))
        if not sizes or math.prod(shape) * dtype.itemsize != end - begin:
            raise _damaged(
                f"{file}: {name} of shape {list(shape)!r:.60} in {word} cannot lie from byte "
                f"{begin!r:.30} to {end!r:.30}"
            )
        spans.append((begin, end, name))
        found[name] = TensorInfo(name, shape, word, end - begin, file)
    _refuse_holes(sorted(spans), file, file_bytes - LENGTH_BYTES - len(raw))
    return found


def _word(tensor: Tensor) -> str:
    return next(
        (word for word, dtype in DTYPES.items() if dtype == tensor.dtype), str(tensor.dtype)
    )


def _refuse_more(count: int, most: int, who: str, what: str) -> None:
    """Nothing released comes near these; a file that was made to cost time does."""
    if count > most:
        raise CheckpointError(f"{who} {count:,} {what} and {most:,} are read at most; {_AGAIN}")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _refuse_unprintable(name: object, file: str) -> None:
    """Names are shown on terminals, which obey control characters."""
    if not (isinstance(name, str) and name.isprintable()):
        raise CheckpointError(f"{file}: {name!r:.60} is no name for a tensor; do not trust it")


def _refuse_holes(spans: list[tuple[int, int, str]], file: str, data_bytes: int) -> None:
    """Tensors must lie one behind the other and fill the file, or two could share bytes."""
    expected = 0
    for begin, end, name in spans:
        if begin != expected:
            raise _damaged(f"{file}: {name} begins at byte {begin} where {expected} is due")
        expected = end
    if expected != data_bytes:
        what = "truncated" if data_bytes < expected else "longer than its header says"
        raise _damaged(f"{file} is {what}: its tensors take {expected} bytes, it has {data_bytes}")


def _refuse_shard(shard: object, index: str) -> None:
    """A shard's name comes from a file that somebody else wrote: it must stay in the folder.

    A subfolder is inside. What the name leads to may be a link: the folder's owner made that.
    """
    if not isinstance(shard, str):
        raise _damaged(f"{index} names {shard!r:.60}, which is no file")
    suffix = Path(index.removesuffix(".index.json")).suffix
    windows = PureWindowsPath(shard)  # which also splits at /
    if ".." in windows.parts or windows.drive or windows.root:
        raise CheckpointError(
            f"{index} names {shard!r}, which leaves the checkpoint's folder; do not trust it"
        )
    # By the suffix it is decided how a file is read: a pickle must not come in by another's name.
    if not shard.endswith(suffix) or not shard.isprintable():
        raise _damaged(f"{index} names {shard!r:.60}, which is no {suffix} file")


def _damaged(what: str, error: type[PortkitError] = CheckpointError) -> PortkitError:
    return error(f"{what}; {_AGAIN}")
