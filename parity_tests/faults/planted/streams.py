"""Mistakes in several residual streams, in the branch beside attention, in vectors by layer.

A layer of several streams is written once more, with places for mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parity_tests.faults.planted.planting import (
    ONE_STREAM,
    Model,
    Need,
    Planting,
    attentions,
    layers,
    named_as,
    respell,
)
from portkit.nn.cache import SharedKeys
from portkit.nn.mlp import gelu_tanh
from portkit.nn.rope import rotate_by_token

Plant = Callable[[Model], str]
COEF_CLIP = 0.03
"""Less than many a coefficient: what the checkpoints say that training clipped to."""


@dataclass(frozen=True)
class Wiring:
    """How each layer is wired; by default as it should be."""

    place: str
    """Where within the first layer another wiring shows first."""
    predicts: bool = True
    corrects: bool = True
    laurel: bool = True
    divisor: float = math.sqrt(2)
    act: Callable[[Tensor], Tensor] = gelu_tanh
    added_from: int | None = 1
    """The first stream that a layer's own vector is added to; None: to none."""

    def __call__(self, model: Model) -> str:
        for layer in layers(model):

            def forward(*given: Any, layer: Any = layer) -> Tensor:
                return self._run(layer, *given)

            layer.forward = named_as(layer.forward, forward)
        return f"model.layers.0{self.place}"

    def _run(self, layer: Any, streams: Tensor, vector: Tensor, *rest: Any) -> Tensor:
        altup = layer.altup
        predictions = altup.predict(streams) if self.predicts else streams
        h = predictions[altup.active]
        x = layer.input_layernorm(h)
        laurel = layer.laurel(x) if self.laurel else None
        h = h + layer.post_attention_layernorm(layer.self_attn(x, *rest))
        if laurel is not None:
            h = (h + laurel) / self.divisor if self.divisor != 1.0 else h + laurel
        fed = layer.mlp(layer.pre_feedforward_layernorm(h))
        h = h + layer.post_feedforward_layernorm(fed)
        streams = altup.correct(predictions, h) if self.corrects else predictions
        h = streams[altup.active] * altup.correct_output_scale
        h = self.act(layer.per_layer_input_gate(h)) * vector
        h = layer.post_per_layer_input_norm(layer.per_layer_projection(h))
        if self.added_from is None:
            return streams
        start = self.added_from
        return torch.cat((streams[:start], streams[start:] + h))


def _altup(change: Callable[[Any], None], place: str) -> Plant:
    """Something else in every layer's AltUp."""

    def plant(model: Model) -> str:
        for layer in layers(model):
            change(layer.altup)
        return f"model.layers.0.altup{place}"

    return plant


def _other_stream(altup: Any) -> None:
    altup.active = (altup.active + 1) % altup.num_streams


def _unscaled_router(altup: Any) -> None:
    altup.router_input_scale = torch.ones_like(altup.router_input_scale)


def _unbounded(altup: Any) -> None:
    altup.modalities = lambda x: altup.modality_router(
        altup.router_norm(x) * altup.router_input_scale
    )


def _transposed(altup: Any) -> None:
    def predict(streams: Tensor) -> Tensor:
        coefs = altup.prediction_coefs(altup.modalities(streams[altup.active]))
        matrix = coefs.unflatten(-1, (altup.num_streams, altup.num_streams))
        mixed = torch.matmul(streams.permute(1, 2, 3, 0), matrix).permute(3, 0, 1, 2)
        return (mixed + streams).contiguous()

    altup.predict = predict


def _alone(altup: Any) -> None:
    def predict(streams: Tensor) -> Tensor:
        coefs = altup.prediction_coefs(altup.modalities(streams[altup.active]))
        matrix = coefs.unflatten(-1, (altup.num_streams, altup.num_streams)).transpose(-1, -2)
        return torch.matmul(streams.permute(1, 2, 3, 0), matrix).permute(3, 0, 1, 2).contiguous()

    altup.predict = predict


def _clipped(altup: Any) -> None:
    for coefs in (altup.prediction_coefs, altup.correction_coefs):

        def forward(x: Tensor, own: Any = coefs) -> Tensor:
            return F.linear(x, own.weight.clamp(-COEF_CLIP, COEF_CLIP))

        coefs.forward = forward


def _without_one(altup: Any) -> None:
    def correct(predictions: Tensor, activated: Tensor) -> Tensor:
        coefs = altup.correction_coefs(altup.modalities(activated))
        error = activated - predictions[altup.active]
        return predictions + error * coefs.permute(2, 0, 1).unsqueeze(-1)

    altup.correct = correct


def output_scale_missing(model: Model) -> str:
    for layer in layers(model):
        layer.scales_correction = False
    return "model.layers.0.per_layer_input_gate:in"


def streams_not_sized(model: Model) -> str:
    respell(model.model, spread=lambda x, ways: torch.stack((x, *(way(x) for way in ways))))
    return "model.layers.0:in"


def streams_copied(model: Model) -> str:
    def spread(embedded: Tensor, projections: Any) -> Tensor:
        for projection in projections:
            projection(embedded)
        return torch.stack([embedded] * (1 + len(projections)))

    respell(model.model, spread=spread)
    return "model.layers.0:in"


def _gathered(gather: Callable[[Tensor, list[Tensor]], Tensor]) -> Plant:
    def plant(model: Model) -> str:
        def gathered(streams: Tensor, projections: Any) -> Tensor:
            back = zip(projections, streams[1:], strict=True)
            return gather(streams[0], [projection(stream) for projection, stream in back])

        respell(model.model, gathered=gathered)
        return "model.norm:in"

    return plant


def _summed(first: Tensor, others: list[Tensor]) -> Tensor:
    size = first.pow(2).mean(-1, keepdim=True).sqrt()
    sized = (one * size / one.pow(2).mean(-1, keepdim=True).sqrt() for one in others)
    return torch.stack((first, *sized)).sum(0)


def _unsized(first: Tensor, others: list[Tensor]) -> Tensor:
    return torch.stack((first, *others)).mean(0)


def first_stream_alone(model: Model) -> str:
    respell(model.model, gathered=lambda streams, _: streams[0])
    return "model.altup_unembed_projections.0:in"


def _vectors(make: Callable[[Any, Tensor, Tensor], Tensor], place: str) -> Plant:
    """Other vectors by layer: `make` is given the decoder, token ids and embeddings."""

    def plant(model: Model) -> str:
        decoder = model.model
        decoder.per_layer_inputs = lambda ids, embedded: make(decoder, ids, embedded)
        return place

    return plant


def _right(decoder: Any, ids: Tensor, embedded: Tensor) -> Tensor:
    vectors: Tensor = type(decoder).per_layer_inputs(decoder, ids, embedded)
    return vectors


def _projected(decoder: Any, embedded: Tensor) -> Tensor:
    projected = decoder.per_layer_model_projection(embedded) * decoder.per_layer_projection_scale
    by_layer = projected.unflatten(-1, (decoder.config.num_hidden_layers, -1))
    normed: Tensor = decoder.per_layer_projection_norm(by_layer)
    return normed


def _looked_up(decoder: Any, ids: Tensor) -> Tensor:
    known = ids < decoder.config.vocab_size_per_layer_input
    rows = decoder.embed_tokens_per_layer(ids.where(known, 0))
    by_layer: Tensor = rows.unflatten(-1, (decoder.config.num_hidden_layers, -1))
    return by_layer


def _projection_lost(decoder: Any, ids: Tensor, _: Tensor) -> Tensor:
    return _looked_up(decoder, ids) * decoder.per_layer_input_scale


def _table_lost(decoder: Any, _: Tensor, embedded: Tensor) -> Tensor:
    return _projected(decoder, embedded) * decoder.per_layer_input_scale


def _last_row(decoder: Any, ids: Tensor, embedded: Tensor) -> Tensor:
    most = decoder.config.vocab_size_per_layer_input - 1
    return _right(decoder, ids.clamp(max=most), embedded)


def _constant(name: str, place: str) -> Plant:
    """A constant of the decoder is one."""

    def plant(model: Model) -> str:
        setattr(model.model, name, torch.ones_like(getattr(model.model, name)))
        return place

    return plant


@dataclass(frozen=True)
class Seen:
    """What an attention without keys of its own could see."""

    right: tuple[Tensor, Tensor]
    """The keys and values that it should."""
    shown: dict[int, tuple[Tensor, Tensor]]
    """What each layer with keys showed."""
    x: Tensor
    """What the attention is given, and so are the tables."""
    tables: tuple[Tensor, Tensor]


def _sharing(give: Callable[[list[Any], Seen], Sequence[Tensor]]) -> Plant:
    """Layers without keys of their own see others than they should."""

    def plant(model: Model) -> str:
        every, shown = attentions(model), dict[int, tuple[Tensor, Tensor]]()

        def watched(number: int, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def forward(x: Tensor, tables: Any, *rest: Any) -> Tensor:
                *others, shared = rest
                if every[number].has_own_kv:
                    context = own(x, tables, *others, shared)
                    shown[number] = shared.shown()
                    return context
                seen = SharedKeys()
                seen.update(*give(every, Seen(shared.shown(), shown, x, tables)))
                return own(x, tables, *others, seen)

            return named_as(own, forward)

        for number, attention in enumerate(every):
            attention.forward = watched(number, attention.forward)
        last = next(i for i, one in enumerate(every) if not one.has_own_kv)
        return f"model.layers.{last}.self_attn#key"

    return plant


def _by_its_matrices(every: list[Any], seen: Seen) -> list[Tensor]:
    """New keys and values of this layer's own, made by what should be shared as values."""
    theirs = every[next(i for i, one in seen.shown.items() if one[0] is seen.right[0])]
    by_head = (*seen.x.shape[:2], -1, theirs.head_dim)
    key = F.linear(seen.x, theirs.k_proj.weight, theirs.k_proj.bias).view(by_head)
    value = F.linear(seen.x, theirs.v_proj.weight, theirs.v_proj.bias).view(by_head)
    key = rotate_by_token(normalised(theirs.k_norm, key), *seen.tables)
    past = seen.right[0].shape[2] - seen.x.shape[1]
    return [
        torch.cat((held[:, :, :past], new.transpose(1, 2)), 2)
        for held, new in zip(seen.right, (key, normalised(theirs.v_norm, value)), strict=True)
    ]


def normalised(norm: Any, x: Tensor) -> Tensor:
    """By another layer's norm, which is not called: nobody is to take it for that layer's."""
    made: Tensor = type(norm).forward(norm, x)
    return made


STREAMS = Need("there is one stream", lambda model: not ONE_STREAM.holds(model))
SHARED = Need(
    "every layer has keys of its own",
    lambda model: not all(getattr(one, "has_own_kv", True) for one in attentions(model)),
)
_VECTOR, _GATE = "model.layers.0:in.per_layer_input", ".per_layer_projection:in"

_PLANTINGS = (
    Planting("altup.predict_skipped", Wiring(".altup#predict:in", predicts=False)),
    Planting("altup.prediction_transposed", _altup(_transposed, "#predict")),
    Planting("altup.prediction_alone", _altup(_alone, "#predict")),
    Planting("altup.correct_skipped", Wiring(".altup#correct:in", corrects=False)),
    Planting("altup.correction_without_one", _altup(_without_one, "#correct")),
    Planting("altup.output_scale_missing", output_scale_missing),
    Planting("altup.active_index", _altup(_other_stream, ".router_norm:in")),
    Planting("altup.coefs_clipped", _altup(_clipped, ".prediction_coefs")),
    Planting("altup.router_scale_missing", _altup(_unscaled_router, ".modality_router:in")),
    Planting("altup.tanh_missing", _altup(_unbounded, ".prediction_coefs:in")),
    Planting("altup.streams_not_sized", streams_not_sized, variant="at first"),
    Planting("altup.streams_not_sized", _gathered(_unsized), variant="at last"),
    Planting("altup.streams_copied", streams_copied),
    Planting("altup.streams_summed", _gathered(_summed)),
    Planting("altup.first_stream_alone", first_stream_alone),
    Planting("laurel.lost", Wiring(".laurel:in", laurel=False)),
    Planting("laurel.scale_missing", Wiring(".pre_feedforward_layernorm:in", divisor=1.0)),
    Planting(
        "per_layer.wrong_slice",
        _vectors(lambda *given: _right(*given).roll(1, 2), _VECTOR),
    ),
    Planting("per_layer.scale_missing", _constant("per_layer_input_scale", _VECTOR)),
    Planting(
        "per_layer.projection_scale_missing",
        _constant("per_layer_projection_scale", "model.per_layer_projection_norm:in"),
    ),
    Planting(
        "per_layer.projection_lost",
        _vectors(_projection_lost, "model.per_layer_model_projection:in"),
    ),
    Planting("per_layer.table_lost", _vectors(_table_lost, "model.embed_tokens_per_layer")),
    Planting("per_layer.gate_not_activated", Wiring(_GATE, act=lambda x: x)),
    Planting("per_layer.gate_activation", Wiring(_GATE, act=F.silu)),
    Planting("per_layer.added_to_all", Wiring("", added_from=0)),
    Planting("per_layer.not_added", Wiring("", added_from=None)),
    Planting("per_layer.beyond_table", _vectors(_last_row, "model.embed_tokens_per_layer")),
    Planting(
        "attention.shared_from_wrong_layer", _sharing(lambda _, seen: seen.shown[0]), (SHARED,)
    ),
    Planting("attention.keys_not_shared", _sharing(_by_its_matrices), (SHARED,)),
)
PLANTINGS = tuple(replace(one, needs=(STREAMS, *one.needs)) for one in _PLANTINGS)
