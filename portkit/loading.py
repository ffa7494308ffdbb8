"""From a name to a model that runs: resolve, plan, read, tie, place.

    loaded = load("google/gemma-3-270m")
    logits = loaded.model(input_ids)

Loading at the stored dtype on the CPU maps the file: parameters are views, no byte is read until a
forward pass wants it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from portkit import foreign_layouts
from portkit.architecture import Architecture, CausalLM
from portkit.checkpoint import DTYPES, Checkpoint, Files, LocalFiles, reading
from portkit.config import ConfigReader
from portkit.errors import CheckpointError, HubError, InvalidConfig, Mismatch, PortkitError
from portkit.hub import RemoteFiles
from portkit.registry import architecture_of
from portkit.weights import Drop, Plan, Tied

COMPUTE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_MOST_LAYERS_UNSEEN = 512
"""The largest released model has 126."""
_FLOATING = {"F64", "F32", "BF16", "F16"}


@dataclass(frozen=True)
class Blueprint:
    """What a checkpoint will become, known from its config and header: no tensor byte read."""

    checkpoint: Checkpoint
    architecture: Architecture
    config: Any
    """The family's config dataclass."""
    ignored: tuple[str, ...]
    """Keys of `config.json` that the user chose to go on without, by their paths."""
    notes: tuple[str, ...]
    """What the config says and nobody computes."""
    skeleton: CausalLM
    """The model on the meta device."""
    attention: str
    """The kernel that it is built with."""
    choices: Mapping[str, tuple[str, ...]]
    """The words that fields of the config may hold."""

    @property
    def num_parameters(self) -> int:
        """Tied parameters once."""
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    @cached_property
    def plan(self) -> Plan:
        """Who claims which tensor; `Mismatch` where anything is left over."""
        tensors = self.checkpoint.tensors
        shapes = {name: info.shape for name, info in tensors.items()}
        plan = self.architecture.weight_map.plan(self.skeleton, shapes, self._way_out())
        copies = [tied.also_on_disk for tied in plan.tied if tied.also_on_disk]
        for name in (*plan.sources, *copies):
            if tensors[name].dtype not in _FLOATING:
                raise Mismatch(
                    f"{name} is stored as {tensors[name].dtype}; supported: "
                    f"{', '.join(sorted(_FLOATING))} (is the checkpoint quantised?)"
                )
        return plan

    def _way_out(self) -> str:
        """What to do where the tensors are not those of the model."""
        known = (
            foreign_layouts.by_tensors(self.checkpoint.tensors),
            foreign_layouts.by_architectures(self.checkpoint.config),
            *(f"{note}; fetch the checkpoint again" for note in self.checkpoint.notes),
        )
        return next(filter(None, known), "take config and weights of one release")


@dataclass(frozen=True)
class LoadReport:
    """What loading did."""

    parameters: int
    tensors: int
    bytes: int
    """Of the tensors that were read, as stored."""
    dtype: str
    stored_dtypes: dict[str, int]
    """Tensors read, by the dtype they are stored in."""
    dropped: tuple[Drop, ...]
    tied: tuple[Tied, ...]
    notes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and where it came from."""

    model: CausalLM
    blueprint: Blueprint
    plan: Plan
    report: LoadReport

    @property
    def config(self) -> Any:
        return self.blueprint.config

    @property
    def architecture(self) -> Architecture:
        return self.blueprint.architecture

    @property
    def files(self) -> Files:
        return self.blueprint.checkpoint.files


def open_checkpoint(
    repo: str | Path, revision: str | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """A directory, or else a Hub repository; of the latter only files that are read are fetched."""
    directory = Path(repo)
    with reading(str(repo)):
        is_folder, is_file = directory.is_dir(), directory.is_file()
    if is_file:
        raise CheckpointError(f"{repo} is a file: give the folder that it is in")
    if is_folder:
        if revision is not None:
            raise HubError(f"--revision {revision} goes with a Hub repository; {repo} is a folder")
        return Checkpoint(LocalFiles(directory), allow_pickle)
    return Checkpoint(RemoteFiles(str(repo), revision), allow_pickle)


def draw(
    checkpoint: Checkpoint, attention: str = "sdpa", ignore_config: Sequence[str] = ()
) -> Blueprint:
    """Read the config and lay out the model on the meta device.

    Raises `UnsupportedConfig` or `InvalidConfig`.
    """
    raw = checkpoint.config
    architecture = architecture_of(raw, ignore_config)
    reader = ConfigReader(raw, ignore=ignore_config)
    config = architecture.read_config(reader)
    reader.finish()
    _refuse_layers(config.num_hidden_layers, checkpoint)
    skeleton = skeleton_of(architecture, config, attention)
    ignored, notes = tuple(sorted(reader.ignored)), reader.notes
    return Blueprint(
        checkpoint, architecture, config, ignored, notes, skeleton, attention, reader.choices
    )


def _refuse_layers(num_layers: int, checkpoint: Checkpoint) -> None:
    """Each layer costs time to lay out, whether or not it is there: ask the header first."""
    if not checkpoint.has_weights:
        if num_layers > _MOST_LAYERS_UNSEEN:
            raise InvalidConfig(
                f"config.json: num_hidden_layers is {num_layers}, and without weights beside it no "
                f"more than {_MOST_LAYERS_UNSEEN} are believed; take the file that was published "
                "with the weights"
            )
    elif num_layers > len(checkpoint.tensors):
        raise Mismatch(
            f"the checkpoint does not fit its config: {num_layers} layers and only "
            f"{len(checkpoint.tensors)} tensors; take config and weights of one release"
        )


def skeleton_of(architecture: Architecture, config: Any, attention: str) -> CausalLM:
    """The model of a family's config on the meta device, in evaluation mode."""
    with torch.device("meta"), _Uninitialised():
        return architecture.build(config, attention).eval()


def load(
    repo: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attention: str = "sdpa",
) -> LoadedModel:
    """Load a checkpoint into our port, in evaluation mode.

    `repo`: a directory or a Hub id. `dtype`: auto (the checkpoint's own), float32, bfloat16 or
    float16. `device`: auto, cpu, cuda or mps. `attention`: sdpa or eager. Raises a `PortkitError`
    on anything unfit.
    """
    return materialize(draw(open_checkpoint(repo, revision), attention), dtype, device)


def materialize(
    blueprint: Blueprint,
    dtype: str = "auto",
    device: str = "auto",
    advance: Callable[[], None] = lambda: None,
) -> LoadedModel:
    """Put the tensors in place. The blueprint's skeleton becomes the model and is used up.

    `advance` is called after each parameter of the plan.
    """
    started = time.perf_counter()
    plan = blueprint.plan
    checkpoint, model = blueprint.checkpoint, blueprint.skeleton
    compute_dtype, target = resolve_dtype(dtype, checkpoint), resolve_device(device)
    modules = dict(model.named_modules())
    for claim in plan.claims:
        tensor = claim.assemble(checkpoint.read, compute_dtype, target)
        place(modules, claim.parameter, nn.Parameter(tensor))
        advance()
    place_constants(model, target, compute_dtype)
    untied = tuple(note for tied in plan.tied if (note := _tie(modules, tied, checkpoint)))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    read = [checkpoint.tensors[name] for name in plan.sources]
    report = LoadReport(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tensors=len(read),
        bytes=sum(info.num_bytes for info in read),
        dtype=str(compute_dtype).removeprefix("torch."),
        stored_dtypes=dict(Counter(info.dtype for info in read)),
        dropped=plan.dropped,
        tied=tuple(t for t in plan.tied if parameters[t.parameter] is parameters[t.to]),
        notes=(*checkpoint.notes, *blueprint.notes, *untied),
        seconds=time.perf_counter() - started,
    )
    return LoadedModel(model, blueprint, plan, report)


def place_constants(model: CausalLM, device: torch.device, dtype: torch.dtype) -> None:
    """Have the buffers, constants of the config, held as the weights are."""
    modules = dict(model.named_modules())
    for name, buffer in model.named_buffers():
        module, _, attribute = name.rpartition(".")
        modules[module].register_buffer(attribute, buffer.to(device, dtype), persistent=False)


class _Uninitialised(TorchFunctionMode):
    """Leaves out the values that new modules fill themselves with.

    On the meta device there is nothing to fill, and trying imports torch's compiler: a second.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func in (torch.zeros, torch.ones) and "device" not in kwargs:
            func = torch.empty
        return func(*args, **kwargs)


def resolve_dtype(dtype: str, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype to compute in; `auto` is the checkpoint's own. `PortkitError` on any other."""
    word = _own_dtype(checkpoint) if dtype == "auto" else dtype
    if word not in COMPUTE_DTYPES:
        whose = "the checkpoint's own dtype" if dtype == "auto" else "dtype"
        raise PortkitError(
            f"{whose} is {word!r:.60}: choose one of {', '.join(COMPUTE_DTYPES)} with --dtype"
        )
    return COMPUTE_DTYPES[word]


def resolve_device(device: str) -> torch.device:
    """`auto` is the fastest device there is; `PortkitError` where the one asked for is not."""
    usable = [
        *(["cuda"] if torch.cuda.is_available() else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
        "cpu",
    ]
    if device == "auto":
        return torch.device(usable[0])
    if device.partition(":")[0] not in usable:
        raise PortkitError(f"--device {device}: torch finds no such device here; try --device auto")
    return torch.device(device)


def _own_dtype(checkpoint: Checkpoint) -> str:
    """What the config says, else what most tensors have, else torch's default."""
    config = checkpoint.config
    for section in (config, config.get("text_config")):
        if isinstance(section, Mapping):
            named = section.get("dtype") or section.get("torch_dtype")
            if named is not None:
                return str(named).removeprefix("torch.")
    tensors = checkpoint.tensors if checkpoint.has_weights else {}
    stored = Counter(info.dtype for info in tensors.values() if info.dtype in _FLOATING)
    return str(DTYPES[max(stored, key=stored.__getitem__, default="F32")]).removeprefix("torch.")


def _tie(modules: Mapping[str, nn.Module], tied: Tied, checkpoint: Checkpoint) -> str | None:
    """Share one parameter, unless both are on disk and differ: then say so and load the second."""
    shared = modules[""].get_parameter(tied.to)
    if tied.also_on_disk is not None:
        own = checkpoint.read(tied.also_on_disk).to(shared.device, shared.dtype)
        if not torch.equal(own, shared):
            place(modules, tied.parameter, nn.Parameter(own))
            return (
                f"{tied.also_on_disk} is stored and differs from {tied.to}: not tied, "
                "although the config says so"
            )
    place(modules, tied.parameter, shared)
    return None


def place(modules: Mapping[str, nn.Module], name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in its module; `modules` are the model's by name, itself as ""."""
    module, _, attribute = name.rpartition(".")
    setattr(modules[module], attribute, parameter)
