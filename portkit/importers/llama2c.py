"""llama2.c's weight files (github.com/karpathy/llama2.c), read into Llama's Hugging Face layout.

Three formats, all little-endian. *legacy*: seven int32, then float32 tensors and the rotary tables.
*v1*: a header of 256 bytes, then float32 tensors, the norms first. *q8_0*: as v1, but each matrix
is int8 in groups that share a float32 scale. Knows their headers and the order of their tensors,
that q and k are in the interleaved rotary layout of the original Llama release, and what llama2.c
has in its code instead of its files: RMS epsilon, BOS and EOS, and the rotary base, which a legacy
file's tables tell. Does not compute.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from portkit import layout
from portkit.errors import ImportFormatError
from portkit.importers.llama2c_rotary import LLAMA2C_BASE, choose_base
from portkit.importers.llama2c_tokenizer import read_llama2c_tokenizer
from portkit.importers.sentencepiece import read_sentencepiece
from portkit.importers.vocabulary import BOS_ID, EOS_ID, UNK_ID, Vocabulary, to_tokenizer
from portkit.json_reading import parse_object

_MAGIC = 0x616B3432  # "ak42"
_HEADER_BYTES = 256  # of v1 and q8_0
_FORMATS = {1: "v1", 2: "q8_0"}
_RMS_NORM_EPS = 1e-5
_ROTARY = ("rotary.cos", "rotary.sin")  # (positions, head_dim / 2) each, in legacy files only
_PICKLED = (
    "it is what torch.save writes, as llama2.c's training writes ckpt.pt: make a model file of it "
    "with llama2.c's `python export.py model.bin --checkpoint ckpt.pt`"
)
_OTHERS = {
    b"PK\3\4": _PICKLED,
    b"\x80\2\x8a\n": _PICKLED,
    b"GGUF": "it is a GGUF file, llama.cpp's: take the checkpoint that it was made of",
}
"""What files of other formats begin with, and what they are."""


@dataclass(frozen=True)
class Header:
    """What the first bytes say, `num_bytes` of them. No `group_size`: the weights are float32."""

    source_format: str  # "legacy", "v1" or "q8_0"
    num_bytes: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    tied: bool
    group_size: int | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Imported:
    """What was read, and what was written of it."""

    header: Header
    model_type: str
    parameters: int
    tensors: int
    weight_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Block:
    """`count` tensors of one shape, each after the other; `{}` in the name is the layer."""

    name: str
    count: int
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2


def import_llama2c(
    file: Path,
    directory: Path,
    *,
    tokenizer: Path | None = None,
    rope_theta: float | None = None,
) -> Imported:
    """Write the model in `file` to `directory`, which must be absent or an empty folder.

    `tokenizer` is llama2.c's `tokenizer.bin` or the SentencePiece `.model` behind it; without one
    the folder has weights and configs only. `rope_theta`: the rotary base; None is what the file's
    tables say, and of a file without tables 10000. float32 weights are written from the mapped
    file.

    Raises `ImportFormatError` if a file is not what it should be, `ExportError` if the folder
    cannot be written; nothing is left behind then.
    """
    header = read_header(file)
    if rope_theta is not None and not 1 < rope_theta < math.inf:
        raise ImportFormatError(f"a rotary base of {rope_theta:g}: give a number above 1")
    base, notes = _rotary_base(file, header, rope_theta)
    small_files = _configs(header, base)
    if tokenizer is not None:
        small_files |= _tokenizer_files(_read_vocabulary(tokenizer, header), header)
    with layout.new_folder(directory) as folder:
        tensors = _llama_tensors(file, header)
        layout.write_weights(folder, tensors)
        for name, content in small_files.items():
            layout.write_json(folder, name, content)
    return Imported(
        header=header,
        model_type=small_files["config.json"]["model_type"],
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        tensors=len(tensors),
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        notes=tuple(notes),
    )


def read_header(file: Path) -> Header:
    """Read and check the header of `file`, its exact size included.

    Raises `ImportFormatError` naming the first thing that is wrong.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(_HEADER_BYTES)
        size = file.stat().st_size
    except OSError as error:
        raise ImportFormatError(f"cannot read {file}: {error.strerror}") from error
    try:
        header = _parse_header(start)
        _check_sizes(header)
        _check_file_size(header, size)
    except ValueError as error:
        raise ImportFormatError(f"{file}: not a model of llama2.c: {error}") from error
    return header


def _parse_header(start: bytes) -> Header:
    if len(start) < 28:
        raise ValueError(f"{len(start)} bytes are too few for any header")
    if start[:4] in _OTHERS:
        raise ValueError(_OTHERS[start[:4]])
    if struct.unpack_from("<I", start) != (_MAGIC,):
        sizes = struct.unpack_from("<7i", start)
        # A negative vocabulary says that the classifier is stored apart from the embedding.
        return _header("legacy", 28, (*sizes[:5], abs(sizes[5]), sizes[6]), tied=sizes[5] > 0)
    version = struct.unpack_from("<i", start, 4)[0]
    if version not in _FORMATS:
        raise ValueError(f"it is of version {version}; 1 (float32) and 2 (q8_0) are known")
    if len(start) < _HEADER_BYTES:
        raise ValueError(f"it ends inside its header of {_HEADER_BYTES} bytes")
    *sizes_read, tied = struct.unpack_from("<7iB", start, 8)
    if tied not in (0, 1):
        raise ValueError(f"byte 36, whether the classifier is shared, is {tied}, not 0 or 1")
    group_size = struct.unpack_from("<i", start, 37)[0] if version == 2 else None
    if any(start[37 if group_size is None else 41 :]):
        raise ValueError("its header has values where zeros belong")
    return _header(
        _FORMATS[version], _HEADER_BYTES, tuple(sizes_read), tied=bool(tied), group_size=group_size
    )


def _header(
    source_format: str,
    num_bytes: int,
    sizes: tuple[int, ...],
    *,
    tied: bool,
    group_size: int | None = None,
) -> Header:
    hidden, intermediate, layers, heads, kv_heads, vocab_size, positions = sizes
    return Header(
        source_format=source_format,
        num_bytes=num_bytes,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        tied=tied,
        group_size=group_size,
    )


def _check_sizes(header: Header) -> None:
    says = f"its {_kind(header)} says"
    for name, value in vars(header).items():
        if isinstance(value, int) and not isinstance(value, bool) and value <= 0:
            raise ValueError(f"{says} {name} = {value}")
    for part, whole in (
        ("num_attention_heads", "hidden_size"),
        ("num_key_value_heads", "num_attention_heads"),
    ):
        divisor, dividend = getattr(header, part), getattr(header, whole)
        if dividend % divisor:
            raise ValueError(f"{says} {part} = {divisor}, no divisor of {whole} = {dividend}")
    if header.head_dim % 2:
        raise ValueError(f"{says} heads of {header.head_dim} channels: no pairs to rotate")
    for block in _blocks(header):
        values = math.prod(block.shape)
        if header.group_size and block.is_matrix and values % header.group_size:
            raise ValueError(
                f"{says} groups of {header.group_size}, no divisor of the {values} values of "
                f"{block.name}"
            )


def _check_file_size(header: Header, size: int) -> None:
    expected = header.num_bytes + sum(
        block.count * _tensor_bytes(block, header.group_size) for block in _blocks(header)
    )
    if size != expected:
        raise ValueError(
            f"it has {size} bytes and its {_kind(header)} asks for {expected}: "
            f"it is {'cut short' if size < expected else 'too long'}, or of another format"
        )


def _kind(header: Header) -> str:
    legacy = header.source_format == "legacy"
    return "legacy header (no magic number)" if legacy else f"{header.source_format} header"


def _blocks(header: Header) -> list[_Block]:
    """The tensors behind the header, in the order of the file."""
    hidden, layers = header.hidden_size, header.num_hidden_layers
    kv_channels = header.num_key_value_heads * header.head_dim
    embedding = _Block("model.embed_tokens.weight", 1, (header.vocab_size, hidden))
    norm = _Block("model.norm.weight", 1, (hidden,))
    attention_norm, mlp_norm = (
        _Block(f"model.layers.{{}}.{name}.weight", layers, (hidden,))
        for name in ("input_layernorm", "post_attention_layernorm")
    )
    attention = [
        _Block(f"model.layers.{{}}.self_attn.{name}.weight", layers, shape)
        for name, shape in (
            ("q_proj", (hidden, hidden)),
            ("k_proj", (kv_channels, hidden)),
            ("v_proj", (kv_channels, hidden)),
            ("o_proj", (hidden, hidden)),
        )
    ]
    mlp = [
        _Block(f"model.layers.{{}}.mlp.{name}.weight", layers, shape)
        for name, shape in (
            ("gate_proj", (header.intermediate_size, hidden)),
            ("down_proj", (hidden, header.intermediate_size)),
            ("up_proj", (header.intermediate_size, hidden)),
        )
    ]
    head = [] if header.tied else [_Block("lm_head.weight", 1, embedding.shape)]
    if header.source_format != "legacy":
        return [attention_norm, mlp_norm, norm, embedding, *attention, *mlp, *head]
    tables = [
        _Block(name, 1, (header.max_position_embeddings, header.head_dim // 2)) for name in _ROTARY
    ]
    return [embedding, attention_norm, *attention, mlp_norm, *mlp, norm, *tables, *head]


def _tensor_bytes(block: _Block, group_size: int | None) -> int:
    values = math.prod(block.shape)
    if group_size is None or not block.is_matrix:
        return values * 4
    return values + values // group_size * 4


def _read_tensors(file: Path, header: Header) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 value of each tensor, as stored; a view of the mapped file if it can be."""
    with file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    offset = header.num_bytes
    for block in _blocks(header):
        values = math.prod(block.shape)
        for layer in range(block.count):
            if header.group_size is None or not block.is_matrix:
                tensor = torch.frombuffer(mapped, dtype=torch.float32, count=values, offset=offset)
            else:
                num_groups = values // header.group_size
                scales = torch.frombuffer(
                    mapped, dtype=torch.float32, count=num_groups, offset=offset + values
                )
                quantised = torch.frombuffer(mapped, dtype=torch.int8, count=values, offset=offset)
                tensor = quantised.float().view(num_groups, -1).mul_(scales[:, None])
            yield block.name.format(layer), tensor.view(block.shape)
            offset += _tensor_bytes(block, header.group_size)


def _llama_tensors(file: Path, header: Header) -> dict[str, Tensor]:
    """The tensors of the Hugging Face layout."""
    return {
        name: _half_rotated(name, tensor, header.head_dim)
        for name, tensor in _read_tensors(file, header)
        if name not in _ROTARY
    }


def _rotary_base(file: Path, header: Header, given: float | None) -> tuple[float, list[str]]:
    """The base to write, and what there is to say about it."""
    if header.source_format != "legacy":
        return given or LLAMA2C_BASE, []
    tables = {name: tensor for name, tensor in _read_tensors(file, header) if name in _ROTARY}
    cos, sin = (tables[name] for name in _ROTARY)
    return choose_base(cos, sin, given)


def _half_rotated(name: str, weight: Tensor, head_dim: int) -> Tensor:
    """q and k with the rows of each head as the Hugging Face layout rotates them; others as is.

    llama2.c turns channels 2i and 2i + 1 of a head together, Hugging Face i and i + head_dim / 2.
    """
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # (heads, pairs, 2, hidden)
    return pairs.transpose(1, 2).reshape(weight.shape)


def _configs(header: Header, rope_theta: float) -> dict[str, dict[str, Any]]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": header.vocab_size,
        "hidden_size": header.hidden_size,
        "intermediate_size": header.intermediate_size,
        "num_hidden_layers": header.num_hidden_layers,
        "num_attention_heads": header.num_attention_heads,
        "num_key_value_heads": header.num_key_value_heads,
        "head_dim": header.head_dim,
        "max_position_embeddings": header.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": _RMS_NORM_EPS,
        "rope_theta": rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": header.tied,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": "float32",
    }
    # Training data of llama2.c has BOS before each story and no EOS: BOS is where one ends.
    generation = {"bos_token_id": BOS_ID, "eos_token_id": [EOS_ID, BOS_ID]}
    return {"config.json": config, "generation_config.json": generation}


def _read_vocabulary(file: Path, header: Header) -> Vocabulary:
    read = read_sentencepiece if file.suffix == ".model" else read_llama2c_tokenizer
    try:
        vocabulary = read(file)
    except OSError as error:
        raise ImportFormatError(f"cannot read {file}: {error.strerror}") from error
    if len(vocabulary.pieces) != header.vocab_size:
        raise ImportFormatError(
            f"{file} has {len(vocabulary.pieces)} pieces and the model {header.vocab_size}: "
            "name the tokenizer that the model was trained with"
        )
    return vocabulary


def _tokenizer_files(vocabulary: Vocabulary, header: Header) -> dict[str, dict[str, Any]]:
    settings = {
        # The class that takes tokenizer.json at its word; Llama's own would rebuild parts of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": vocabulary.pieces[UNK_ID].text,
        "bos_token": vocabulary.pieces[BOS_ID].text,
        "eos_token": vocabulary.pieces[EOS_ID].text,
        "clean_up_tokenization_spaces": False,
        "model_max_length": header.max_position_embeddings,
    }
    made = to_tokenizer(vocabulary).to_str()
    backend = parse_object(made, "the tokenizer", ImportFormatError)
    return {"tokenizer.json": backend, "tokenizer_config.json": settings}
