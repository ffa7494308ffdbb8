"""Faults of several residual streams (AltUp), of the branch beside attention (LAuReL), and of the
vectors that each layer has for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from portkit.parity.faults.fault import Edit, Fault, Place, either, on
from portkit.parity.faults.modules import ACTIVATIONS, Embedding, Linear
from portkit.parity.faults.recipe import Recipe
from portkit.parity.faults.streaming import (
    Added,
    Bounded,
    Corrected,
    GatedVector,
    Gathered,
    OwnVector,
    Predicted,
    Scaled,
    Spread,
    StreamOf,
    is_laurel,
)
from portkit.parity.faults.wiring import Sum


def _instead(site: str, by: str) -> Edit:
    """What is read of streams at one point is read at another."""

    def of(one: StreamOf, place: Place) -> Iterator[StreamOf]:
        if one.of.endswith(site):
            yield replace(one, of=one.of.replace(site, by))

    def streams(one: Added, place: Place) -> Iterator[Added]:
        if one.streams.endswith(site):
            yield replace(one, streams=one.streams.replace(site, by))

    return either(on(StreamOf, of), on(Added, streams))


def _formed(kind: type[Predicted] | type[Corrected], form: str) -> Edit:
    return on(kind, lambda one, _: (replace(one, form=form),))


def _no_output_scale(one: StreamOf, place: Place) -> Iterator[StreamOf]:
    if one.scale is not None:
        yield replace(one, scale=None)


def _other_stream(one: StreamOf | Corrected, place: Place) -> Iterator[Recipe]:
    """Within layers; which streams are projected back at the end is no matter of the active one."""
    if place.layer is None:
        return
    of = f"{one.altup}#correct:in" if isinstance(one, Corrected) else one.of
    given = place.scene.at(of)
    own = one.active if isinstance(one, Corrected) else one.stream
    for other in () if given is None or given.dim() != 4 else range(len(given)):
        if other != own and isinstance(one, Corrected):
            yield replace(one, active=other)
        elif other != own and isinstance(one, StreamOf):
            yield replace(one, stream=other)


def _clipped(linear: Linear, place: Place) -> Iterator[Linear]:
    clip = getattr(place.facts.config, "altup_coef_clip", None)
    if clip and place.site.endswith("_coefs"):
        yield replace(linear, clip=float(clip))


def _unscaled(of: str) -> Edit:
    def edit(scaled: Scaled, place: Place) -> Iterator[Scaled]:
        if of in scaled.of:
            yield replace(scaled, scale=1.0)

    return on(Scaled, edit)


def _laurel_lost(total: Sum, place: Place) -> Iterator[Sum]:
    """With the division that is of the branch, and without it."""
    left = tuple(one for one in total.terms if not is_laurel(one))
    if len(left) < len(total.terms):
        yield replace(total, terms=left, divisor=1.0)
        yield replace(total, terms=left)


def _undivided(total: Sum, place: Place) -> Iterator[Sum]:
    if total.divisor != 1.0:
        yield replace(total, divisor=1.0)
        yield replace(total, divisor=2.0)


def _gates(choose: Callable[[str], bool]) -> Edit:
    def edit(one: GatedVector, place: Place) -> Iterator[GatedVector]:
        for other in ACTIVATIONS:
            if other != one.activation and choose(other):
                yield replace(one, activation=other)

    return on(GatedVector, edit)


def _other_slice(one: OwnVector, place: Place) -> Iterator[OwnVector]:
    for number in (one.number - 1, one.number + 1, 0, place.facts.num_layers - 1):
        if number != one.number and 0 <= number < place.facts.num_layers:
            yield replace(one, number=number)


def _added(*ways: str) -> Edit:
    return on(Added, lambda one, _: (replace(one, to=way) for way in ways))


def _last_row(embedding: Embedding, place: Place) -> Iterator[Embedding]:
    held = place.facts.parameter(embedding.weight)
    if held is not None and len(held) < place.facts.config.vocab_size:
        yield replace(embedding, beyond="last")


FAULTS = (
    Fault(
        "altup.predict_skipped",
        "runs a layer on its streams as they are, and not as they are predicted",
        "mix all streams by `prediction_coefs` first, and add them as they were",
        either(_formed(Predicted, "skipped"), _instead("#predict", "#predict:in")),
        leaves_out=True,
    ),
    Fault(
        "altup.prediction_transposed",
        "mixes the predicted streams by the transposed matrix",
        "`prediction_coefs` gives a row for each stream that is made",
        _formed(Predicted, "transposed"),
    ),
    Fault(
        "altup.prediction_alone",
        "does not add the streams to their prediction",
        "a prediction is the mixture plus the stream itself",
        _formed(Predicted, "alone"),
    ),
    Fault(
        "altup.correct_skipped",
        "does not correct the streams by what the layer made of the active one",
        "add the active stream's error, times each stream's coefficient, to the predictions",
        either(
            _formed(Corrected, "active"),
            _formed(Corrected, "skipped"),
            _instead("#correct", "#predict"),
            _instead("#correct", "#correct:in.activated"),
        ),
        leaves_out=True,
    ),
    Fault(
        "altup.correction_without_one",
        "does not add 1 to the coefficients of the correction",
        "the factors are `correction_coefs` + 1",
        _formed(Corrected, "without_one"),
    ),
    Fault(
        "altup.output_scale_missing",
        "does not scale the corrected stream",
        "multiply it by `correct_output_scale` where `altup_correct_scale` is set",
        on(StreamOf, _no_output_scale),
    ),
    Fault(
        "altup.active_index",
        "takes another stream for the active one",
        "read `altup_active_idx`, which counts from 0",
        either(on(StreamOf, _other_stream), on(Corrected, _other_stream)),
    ),
    Fault(
        "altup.coefs_clipped",
        "clips the coefficients of prediction or correction",
        "`altup_coef_clip` is of training alone",
        on(Linear, _clipped),
    ),
    Fault(
        "altup.router_scale_missing",
        "does not scale what the router of streams is given",
        "multiply it by 1 / `hidden_size`, rounded to the model's dtype",
        _unscaled("router_norm"),
    ),
    Fault(
        "altup.tanh_missing",
        "does not bound what the router of streams makes",
        "take its tanh in float32, and cast back",
        on(Bounded, lambda one, _: (replace(one, missing=True),)),
    ),
    Fault(
        "altup.streams_not_sized",
        "does not make the projected streams as large as the first",
        "scale each token's projection to the root mean square of the first stream",
        either(
            on(Spread, lambda one, _: (replace(one, sized=False),)),
            on(Gathered, lambda one, _: (replace(one, sized=False),)),
        ),
    ),
    Fault(
        "altup.streams_copied",
        "begins every stream with the embedding itself",
        "project it by `altup_projections` for all streams but the first",
        on(Spread, lambda one, _: (replace(one, copied=True),)),
    ),
    Fault(
        "altup.streams_summed",
        "adds the streams at the end where this model takes their mean",
        "take the mean over the streams",
        on(Gathered, lambda one, _: (replace(one, by="sum"),)),
    ),
    Fault(
        "altup.first_stream_alone",
        "reads the first stream alone at the end",
        "project the others back by `altup_unembed_projections`, and take the mean of all",
        on(Gathered, lambda one, _: (replace(one, by="first"),)),
        leaves_out=True,
    ),
    Fault(
        "laurel.lost",
        "leaves out the low-rank branch beside attention",
        "add LAuReL's output to the stream, and divide the sum by the square root of 2",
        on(Sum, _laurel_lost),
        leaves_out=True,
    ),
    Fault(
        "laurel.scale_missing",
        "does not divide by the square root of 2 where LAuReL's output is added",
        "(stream + attention + laurel) / sqrt(2)",
        on(Sum, _undivided),
    ),
    Fault(
        "per_layer.wrong_slice",
        "gives a layer the vector of another",
        "of a token's row in `embed_tokens_per_layer` each layer has its own part, in their order",
        on(OwnVector, _other_slice),
    ),
    Fault(
        "per_layer.scale_missing",
        "does not scale the sum of both vectors that a layer has for a token",
        "multiply it by 1 / sqrt(2), rounded to the model's dtype",
        on(OwnVector, lambda one, _: (replace(one, scaled=False),)),
    ),
    Fault(
        "per_layer.projection_scale_missing",
        "does not scale the embedding's projection to vectors by layer",
        "multiply it by `hidden_size` ** -0.5, rounded to the model's dtype",
        _unscaled("per_layer_model_projection"),
    ),
    Fault(
        "per_layer.projection_lost",
        "has the looked-up vectors alone",
        "add the embedding's normalised projection, `per_layer_model_projection`",
        on(OwnVector, lambda one, _: (replace(one, terms="table"),)),
        leaves_out=True,
    ),
    Fault(
        "per_layer.table_lost",
        "has no looked-up vectors by layer",
        "add the token's row of `embed_tokens_per_layer`",
        on(OwnVector, lambda one, _: (replace(one, terms="projected"),)),
        leaves_out=True,
    ),
    Fault(
        "per_layer.gate_not_activated",
        "does not activate the gate of a layer's own vector",
        "act(per_layer_input_gate(stream)) * vector",
        _gates(lambda name: name == "none"),
    ),
    Fault(
        "per_layer.gate_activation",
        "activates the gate of a layer's own vector by another function",
        "use the config's `hidden_activation` there too",
        _gates(lambda name: name != "none"),
    ),
    Fault(
        "per_layer.added_to_all",
        "adds a layer's own vector to all streams, or to all but the active one",
        "add it to all streams but the first",
        _added("all", "inactive"),
    ),
    Fault(
        "per_layer.not_added",
        "does not add a layer's own vector to the streams",
        "add it to all streams but the first",
        _added("none"),
        leaves_out=True,
    ),
    Fault(
        "per_layer.beyond_table",
        "gives a token that the table by layer does not have another row than its first",
        "tokens from `vocab_size_per_layer_input` on have row 0 of `embed_tokens_per_layer`",
        on(Embedding, _last_row),
    ),
)
