"""Faults of both ends of a model, and of the sums between: embedding, residuals, head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from portkit.parity.faults.fault import Edit, Fault, Place, either, on
from portkit.parity.faults.modules import Embedding, Logits, Norm
from portkit.parity.faults.norms import SUBLAYERS, is_final, is_inner
from portkit.parity.faults.recipe import Recipe
from portkit.parity.faults.scene import layer_of
from portkit.parity.faults.streaming import StreamOf, is_laurel
from portkit.parity.faults.wiring import Copy, Sum


def _last_layer(copy: Copy | StreamOf, place: Place) -> Iterator[Recipe]:
    """What reads the last layer, outside of the layers, reads what that layer was given."""
    if layer_of(place.site) is None and layer_of(copy.of) is not None:
        yield replace(copy, of=f"{copy.of}:in")


def _final_norm(place: Place, site: str) -> Norm | None:
    found = place.recipe(site) if is_final(site) else None
    return found if isinstance(found, Norm) else None


def _norm_missing(copy: Copy, place: Place) -> Iterator[Copy]:
    if _final_norm(place, copy.of) is not None:
        yield replace(copy, of=f"{copy.of}:in")


def _norm_itself_missing(norm: Norm, place: Place) -> Iterable[Norm]:
    return (replace(norm, missing=True),) if is_final(place.site) else ()


def _norm_twice(copy: Copy, place: Place) -> Iterator[Copy]:
    norm = _final_norm(place, copy.of)
    if norm is not None:
        yield replace(copy, through=norm)


def _norm_itself_twice(norm: Norm, place: Place) -> Iterable[Norm]:
    return (replace(norm, times=2),) if is_final(place.site) else ()


def _given_again(copy: Copy, place: Place) -> Iterable[Copy]:
    """A final norm that is called twice was last given its own result."""
    norm = place.site.removesuffix(":in")
    return () if _final_norm(place, norm) is None else (Copy(norm),)


def _residual_missing(total: Sum, place: Place) -> Iterator[Recipe]:
    for number in range(len(total.terms)):
        if is_laurel(total.terms[number]):
            continue  # which is a mistake of its own
        left = total.terms[:number] + total.terms[number + 1 :]
        yield Copy(left[0]) if len(left) == 1 else replace(total, terms=left)
    if len(total.terms) > 2 and total.divisor == 1.0:  # the stream as it was before its last block
        yield Copy(total.terms[-1])


def _residual_normed(total: Sum, place: Place) -> Iterator[Sum]:
    """The stream is replaced by its normalised form before a block's output is added."""
    stream = total.terms[0]
    for name, module in place.facts.modules.items():
        if "norm" not in name.rpartition(".")[2] or not any(True for _ in module.parameters()):
            continue
        same_layer = layer_of(name) == layer_of(place.site) and is_inner(name)
        source = place.recipe(f"{name}:in") if same_layer else None
        if source is not None and (f"{name}:in" == stream or source == place.recipe(stream)):
            yield replace(total, terms=(name, *total.terms[1:]))


def _one_after_the_other(copy: Copy, place: Place) -> Iterator[Sum]:
    """A feed-forward that shares its norm with attention is given the stream behind attention."""
    block = place.site.partition(":")[0]
    layer, _, part = block.rpartition(".")
    attention = f"{layer}.self_attn"
    norm = place.recipe(copy.of)
    if f".{part}" not in SUBLAYERS or block == attention or not isinstance(norm, Norm):
        return
    if place.recipe(f"{attention}:in") == copy and attention in place.scene.trace:
        terms = (f"{copy.of}:in", attention)
        yield Sum(terms, norm=norm)
        yield Sum(terms)


def _scaled(change: Callable[[float], float]) -> Edit:
    def edit(logits: Logits, place: Place) -> Iterator[Logits]:
        if logits.scale != 1.0:
            yield replace(logits, scale=change(logits.scale))

    return on(Logits, edit)


def _capped(logits: Logits, place: Place) -> Iterator[Logits]:
    if logits.cap is None:
        yield from (replace(logits, cap=one) for one in (30.0, 50.0, 20.0))


FAULTS = (
    Fault(
        "embedding.scale_missing",
        "does not scale the embedding",
        "multiply by the square root of `hidden_size`, rounded to the model's dtype",
        on(Embedding, lambda e, _: () if e.scale is None else (replace(e, scale=None),)),
    ),
    Fault(
        "embedding.scale_in_float32",
        "scales the embedding by an unrounded number",
        "round the scale to the model's dtype first, as a tensor",
        on(Embedding, lambda e, _: () if e.scale is None else (replace(e, rounded=False),)),
    ),
    Fault(
        "embedding.scale_twice",
        "scales the embedding twice",
        "scale it once, and do not scale the table when it is loaded",
        on(Embedding, lambda e, _: () if e.scale is None else (replace(e, times=2),)),
    ),
    Fault(
        "head.last_layer_missing",
        "leaves out the last layer",
        "run `num_hidden_layers` layers",
        either(on(Copy, _last_layer), on(StreamOf, _last_layer)),
        leaves_out=True,
    ),
    Fault(
        "head.final_norm_missing",
        "does not normalise what the head reads",
        "apply the final norm",
        either(on(Copy, _norm_missing), on(Norm, _norm_itself_missing)),
        leaves_out=True,
    ),
    Fault(
        "head.final_norm_twice",
        "applies the final norm twice",
        "apply it once, in the decoder or before the head",
        either(on(Copy, _norm_twice), on(Norm, _norm_itself_twice), on(Copy, _given_again)),
    ),
    Fault(
        "head.softcap_missing",
        "does not cap the logits softly",
        "cap * tanh(logits / cap), with `final_logit_softcapping`",
        on(Logits, lambda one, _: () if one.cap is None else (replace(one, cap=None),)),
    ),
    Fault(
        "head.softcap_applied",
        "caps the logits softly, which the reference does not",
        "leave the cap out where `final_logit_softcapping` is null",
        on(Logits, _capped),
    ),
    Fault(
        "head.logit_scale_missing",
        "does not scale the logits",
        "multiply them by `logit_scale`",
        _scaled(lambda _: 1.0),
    ),
    Fault(
        "head.logit_scale_inverted",
        "divides the logits by their scale",
        "multiply them by `logit_scale`",
        _scaled(lambda scale: 1 / scale),
    ),
    Fault(
        "residual.missing",
        "loses a term of this sum",
        "add the block's output to what the block was given",
        on(Sum, _residual_missing),
    ),
    Fault(
        "residual.normed",
        "adds a block's output to the normalised stream",
        "keep the stream as it was before its norm, and add to that",
        on(Sum, _residual_normed),
    ),
    Fault(
        "residual.sequential",
        "runs attention and feed-forward one after the other where this model's block is parallel",
        "give both the same normalised input, and add both to the stream",
        on(Copy, _one_after_the_other),
    ),
)
