"""Faults of experts: how they are chosen, weighed, ordered and summed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from portkit.parity.faults.choosing import Blocks, Choice, Mixture, Sent, Total, is_router
from portkit.parity.faults.fault import Edit, Fault, Place, either, on
from portkit.parity.faults.modules import Linear


def _form(of: str, by: str) -> Edit:
    def edit(choice: Choice, place: Place) -> Iterable[Choice]:
        return (replace(choice, form=by),) if choice.form == of else ()

    return on(Choice, edit)


def _normalised(now: bool) -> Edit:
    def edit(choice: Choice, place: Place) -> Iterable[Choice]:
        return (replace(choice, normalised=now),) if choice.normalised != now else ()

    return on(Choice, edit)


def _counted(by: int) -> Edit:
    return on(Choice, lambda choice, _: (replace(choice, count=choice.count + by),))


def _weights_on_input(mixture: Mixture, place: Place) -> Iterator[Mixture]:
    if mixture.weighs == "output":
        yield replace(mixture, weighs="input")


def _shared_lost(total: Total, place: Place) -> Iterator[Total]:
    if total.shared is not None:
        yield replace(total, shared=None)


_NOT_SENT_WEIGHED = on(Sent, lambda sent, _: (replace(sent, weighs=False),))


def _wide_logits(linear: Linear, place: Place) -> Iterator[Linear]:
    """And goes on in float32, or rounds them: there few bits differ, and often none."""
    if is_router(place.scene, place.site):
        yield replace(linear, upcast=True, cast=False)
        yield replace(linear, upcast=True)


FAULTS = (
    Fault(
        "experts.softmax_over_chosen",
        "takes the router's softmax over the chosen experts alone",
        "softmax over all experts first, then choose",
        _form("softmax", "chosen"),
    ),
    Fault(
        "experts.sigmoid",
        "weighs experts by a sigmoid where this router has a softmax",
        "softmax over all experts in float32",
        _form("softmax", "sigmoid"),
    ),
    Fault(
        "experts.softmax",
        "weighs experts by a softmax where this router has a sigmoid",
        "the sigmoid of the chosen logits, which need not sum to one",
        _form("sigmoid", "softmax"),
    ),
    Fault(
        "experts.not_normalised",
        "does not make the chosen experts' weights sum to one",
        "honour `norm_topk_prob`",
        _normalised(False),
    ),
    Fault(
        "experts.normalised",
        "makes the chosen experts' weights sum to one where this model does not",
        "honour `norm_topk_prob`",
        _normalised(True),
    ),
    Fault(
        "experts.router_in_low_precision",
        "computes the router's weights in the model's dtype",
        "softmax or sigmoid in float32, and cast what comes of it",
        on(Choice, lambda choice, _: (replace(choice, upcast=False),)),
    ),
    Fault(
        "experts.one_too_few",
        "chooses one expert too few",
        "read `num_experts_per_tok`",
        _counted(-1),
    ),
    Fault(
        "experts.one_too_many",
        "chooses one expert too many",
        "read `num_experts_per_tok`",
        _counted(1),
    ),
    Fault(
        "experts.not_weighed",
        "adds experts without their weights",
        "each expert counts by the router's weight",
        either(
            on(Mixture, lambda mixture, _: (replace(mixture, weighs="nothing"),)),
            _NOT_SENT_WEIGHED,
        ),
    ),
    Fault(
        "experts.weights_on_input",
        "weighs what an expert is given where this model weighs what it makes",
        "multiply an expert's output by its weight",
        on(Mixture, _weights_on_input),
    ),
    Fault(
        "experts.weights_on_output",
        "weighs what an expert makes where this model weighs what it is given",
        "multiply an expert's input by its weight",
        either(_NOT_SENT_WEIGHED, on(Total, lambda total, _: (replace(total, weighs=True),))),
    ),
    Fault(
        "experts.order",
        "gives an expert the matrices of another",
        "stack experts in the order of their numbers, not of their names",
        either(
            on(Mixture, lambda mixture, _: (replace(mixture, shifted=1),)),
            on(Blocks, lambda blocks, _: (replace(blocks, shifted=1),)),
        ),
    ),
    Fault(
        "experts.gate_up_exchanged",
        "activates an expert's `up` and not its `gate`",
        "the gate's half of a fused matrix comes first",
        either(
            on(Mixture, lambda mixture, _: (replace(mixture, exchanged=True),)),
            on(Blocks, lambda blocks, _: (replace(blocks, exchanged=True),)),
        ),
    ),
    Fault(
        "experts.shared_lost",
        "leaves out the expert that all tokens pass through",
        "add `shared_expert` to the chosen experts' sum",
        on(Total, _shared_lost),
        leaves_out=True,
    ),
    Fault(
        "experts.summed_one_by_one",
        "rounds after each expert that it adds",
        "sum a token's experts at once, in float32, and round once",
        either(
            on(Mixture, lambda mixture, _: (replace(mixture, one_by_one=True),)),
            on(Total, lambda total, _: (replace(total, one_by_one=True),)),
        ),
    ),
    Fault(
        "experts.router_logits_in_float32",
        "computes the router's logits in float32",
        "multiply in the model's dtype, and upcast what comes of it",
        on(Linear, _wide_logits),
    ),
)
