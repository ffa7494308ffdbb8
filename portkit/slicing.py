"""Smaller models within a larger one: fewer layers, narrower feed-forwards, no number computed.

MatFormer (Devvrit et al. 2023, arXiv:2310.07707) trains a model so that the first rows of its
feed-forwards are one too, with a width of its own in each layer. What of a config changes, and
which parameters hold a block for each layer, is the family's to say (`Nesting`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from portkit.architecture import Nesting
from portkit.config import ConfigReader
from portkit.errors import ExportError
from portkit.loading import LoadedModel, draw

_LAYER = re.compile(r"(?<=\.layers\.)\d+")


def slice_of(
    loaded: LoadedModel, widths: Sequence[int], dropped: frozenset[int] = frozenset()
) -> LoadedModel:
    """The model of the layers that are not `dropped`, with the first `widths` rows of each.

    `widths`: one for all layers that are kept, or one for each. Raises `ExportError` where the
    family has no models within its models, or these are none of them; `InvalidConfig` where layers
    depend on one that is dropped.
    """
    nesting = loaded.architecture.nesting
    if nesting is None:
        raise ExportError(
            f"{loaded.architecture.model_type} has no smaller models within it: leave out "
            "--matformer and --drop-layers"
        )
    kept, widths = _layers(loaded.config.num_hidden_layers, widths, dropped)
    checkpoint = copy.copy(loaded.blueprint.checkpoint)
    text = loaded.architecture.text_config(checkpoint.config)
    checkpoint.config = nesting.config(ConfigReader(text), widths, kept)
    blueprint = draw(checkpoint)
    model = blueprint.skeleton
    _fill(loaded, model, nesting, kept)
    plan = blueprint.architecture.weight_map.written(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    report = replace(
        loaded.report,
        parameters=blueprint.num_parameters,
        tied=tuple(t for t in plan.tied if parameters[t.parameter] is parameters[t.to]),
    )
    return LoadedModel(model, blueprint, plan, report)


def _layers(
    num_layers: int, widths: Sequence[int], dropped: frozenset[int]
) -> tuple[list[int], list[int]]:
    """The layers that are kept, and a width for each."""
    if beyond := sorted(one for one in dropped if one >= num_layers):
        raise ExportError(
            f"--drop-layers names layer {beyond[0]}, and there are {num_layers}, from 0 on"
        )
    kept = [layer for layer in range(num_layers) if layer not in dropped]
    if not kept:
        raise ExportError("--drop-layers leaves no layer: name fewer")
    if len(widths) not in (1, len(kept)):
        raise ExportError(
            f"--matformer names {len(widths)} widths for {len(kept)} layers: give one for all, or "
            "one for each, as in 8192x10,4096x20"
        )
    return kept, list(widths) * (len(kept) if len(widths) == 1 else 1)


def _fill(loaded: LoadedModel, model: nn.Module, nesting: Nesting, kept: Sequence[int]) -> None:
    """Give the smaller model its part of each parameter; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    modules = dict(model.named_modules())
    for name, wanted in list(model.named_parameters(remove_duplicate=False)):
        source_name = _LAYER.sub(lambda found: str(kept[int(found[0])]), name)
        source = loaded.model.get_parameter(source_name)
        if id(source) not in made:
            whole = _blocks(source.detach(), nesting.by_layer.get(name), loaded, kept)
            if any(n > have for n, have in zip(wanted.shape, whole.shape, strict=True)):
                raise ExportError(
                    f"{source_name} is {list(whole.shape)}, and the slice wants "
                    f"{list(wanted.shape)} of it: name a smaller width"
                )
            part = whole[tuple(slice(n) for n in wanted.shape)]
            made[id(source)] = nn.Parameter(part.contiguous())
        module, _, attribute = name.rpartition(".")
        setattr(modules[module], attribute, made[id(source)])
    dtype = getattr(torch, loaded.report.dtype)
    for name, buffer in list(model.named_buffers()):
        module, _, attribute = name.rpartition(".")
        modules[module].register_buffer(attribute, buffer.to(dtype), persistent=False)


def _blocks(whole: Tensor, dim: int | None, loaded: LoadedModel, kept: Sequence[int]) -> Tensor:
    """Along `dim` the blocks of the layers that are kept; None: all of it."""
    num_layers = loaded.config.num_hidden_layers
    if dim is None or len(kept) == num_layers:
        return whole
    blocks = whole.chunk(num_layers, dim)
    return torch.cat([blocks[layer] for layer in kept], dim)
