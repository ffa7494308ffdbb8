"""Gradients: does the port also learn as the reference does?

Equal logits do not say so: a detached branch, or a backward written by hand, has the right output.
One batch's mean next-token loss is differentiated on both sides; each parameter's gradient, and the
parameters after one step of AdamW, are held against the reference's. Where they are unequal the
port is run again, taught: every gradient that arrives at a site is compared and then replaced by
the reference's, so that a mistake shows where it is made and not in all that lies behind it.

Knows no verdict of its own: an unequal gradient is judged like any site, by its distance from the
reference's gradient in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from portkit.parity.judging.judge import Judgement, Verdict, judge, relative, worst
from portkit.parity.judging.ledger import Distance, PassRecord, SiteAccount, squares_of
from portkit.parity.judging.precision import LiftedCasts, held_in_float64
from portkit.parity.reference import Reference, by_name
from portkit.parity.sides.port import PortSide
from portkit.parity.sides.sites import SiteTable, parameters_of, watching

PASS = "backward"
LEARNING_RATE = 1e-2
SAME_GRADIENT = 1e-10
"""Relative RMS in float64 up to which two gradients, carried through a whole network, are of one
function. Kernels of the reference stay within 1e-13 of each other; a lost branch does not."""


Side = PortSide | Reference
Gradients = dict[str, Tensor]
"""By parameter, under the port's names; zero where no gradient arrives."""


@dataclass(frozen=True)
class GradientParity:
    """The gradients of one batch: of the parameters, and where they part on the way back."""

    dtype: str
    num_tokens: int
    judgements: tuple[Judgement, ...]
    """Of each parameter's gradient: first what is wrong where it is made, then the last first."""
    accounts: dict[str, SiteAccount]
    places: tuple[str, ...]
    """Where the port makes another gradient of the reference's own, in the order of the backward
    pass: a site, whose consumers are differentiated otherwise, or a parameter."""
    num_equal_after_step: int
    """Parameters that are equal in every bit after a step of AdamW from these gradients."""

    @property
    def verdict(self) -> Verdict:
        return worst(one.verdict for one in self.judgements)

    @property
    def num_exact(self) -> int:
        return sum(one.verdict is Verdict.exact for one in self.judgements)

    @property
    def culprits(self) -> tuple[Judgement, ...]:
        """Parameters whose gradient is not the reference's."""
        return tuple(one for one in self.judgements if one.verdict is Verdict.diverged)


def compare_gradients(
    port: PortSide, reference: Reference, table: SiteTable, input_ids: Tensor
) -> GradientParity:
    """Differentiate the mean next-token loss of `input_ids` (batch, tokens), int64, on both sides.

    The loss is taken in float32 on both. Parameters are left as they were.
    """
    ours = _gradients(port, input_ids)
    theirs = by_name(_gradients(reference, input_ids), ours)
    accounts, places = _accounts(ours, theirs), list[str]()
    if not all(one.exact for one in accounts.values()):
        _hold_against_truth(port, reference, input_ids, accounts, (ours, theirs))
        places = _places(port, reference, table, input_ids)
    made = {f"{name} (gradient)": number for number, name in enumerate(places)}
    judgements = [replace(judge(one), passes=(PASS,)) for one in accounts.values()]
    return GradientParity(
        str(next(port.model.parameters()).dtype).removeprefix("torch."),
        input_ids.numel(),
        tuple(sorted(judgements, key=lambda one: made.get(one.site, len(made)))),
        accounts,
        tuple(places),
        _num_equal_after_step(port, reference, ours, theirs),
    )


def _gradients(side: Side, input_ids: Tensor) -> Gradients:
    named = _named(side)
    required = [(one, one.requires_grad) for one in side.model.parameters()]
    try:
        with torch.enable_grad():
            side.model.requires_grad_(True)
            logits = side.differentiable_logits(input_ids)[:, :-1].float()
            loss = F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())
            found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    finally:
        for one, before in required:
            one.requires_grad_(before)
    return dict(zip(named, found, strict=True))


def _named(side: Side) -> dict[str, Tensor]:
    """Parameters by the text model's names, a tied one once."""
    found: dict[Tensor, str] = {}
    for name, parameter in parameters_of(side).items():
        found.setdefault(parameter, name)
    return {name: parameter for parameter, name in found.items()}


def _accounts(ours: Gradients, theirs: Gradients) -> dict[str, SiteAccount]:
    """Of each gradient, the last parameters in the network first."""
    accounts = {}
    for name, found in reversed(ours.items()):
        account = SiteAccount(f"{name} (gradient)", "", is_glue=False)
        expected = theirs.get(name)
        if expected is None:
            account.missing = True
        elif found.shape != expected.shape:
            account.misshapen = f"{list(found.shape)} against {list(expected.shape)}"
        elif not torch.equal(found, expected):
            gap = (found.double() - expected.double()).abs().nan_to_num(nan=torch.inf)
            num_unequal = int((found != expected).sum())
            record = PassRecord(PASS, num_unequal, found.numel(), float(gap.max()))
            account.unequal.append(record)
        accounts[account.name] = account
    return accounts


def _hold_against_truth(
    port: PortSide,
    reference: Reference,
    input_ids: Tensor,
    accounts: Mapping[str, SiteAccount],
    found: tuple[Gradients, Gradients],
) -> None:
    """Add how far each side's gradients are from the reference's in float64, and the two there."""
    ours, theirs = found
    with reference.other_kernel():
        others = by_name(_gradients(reference, input_ids), ours)
    with reference.plain_experts():
        truth = by_name(_in_float64(reference, input_ids), ours)
    try:
        exact: Gradients = _in_float64(port, input_ids)
    except (RuntimeError, TypeError):
        exact = {}  # the question of the function stays unasked, and the floor decides
    for name, held in truth.items():
        account = accounts[f"{name} (gradient)"]
        if account.exact:
            continue
        _add(account.truth, held, 0.0)
        for into, one in (
            (account.port, ours[name]),
            (account.floors[reference.attention], theirs[name]),
            (account.floors["other"], others[name]),
            (account.function, exact.get(name)),
        ):
            if one is not None and one.shape == held.shape:
                _add(into, one, held)
        apart = relative(account.function, account.truth)
        account.function_asked = apart is not None and apart > SAME_GRADIENT


def _in_float64(side: Side, input_ids: Tensor) -> Gradients:
    with held_in_float64(side.model), LiftedCasts():
        return _gradients(side, input_ids)


def _add(distance: Distance, gradient: Tensor, truth: Tensor | float) -> None:
    """A parameter's first dimension are its channels."""
    gap = (gradient.double() - truth).flatten(1) if gradient.dim() > 1 else gradient - truth
    rows = gap.T if gap.dim() > 1 else gap[None]
    distance.add(squares_of(rows.double()), len(rows))


def _places(port: PortSide, reference: Reference, table: SiteTable, input_ids: Tensor) -> list[str]:
    """Where the port makes other gradients of the reference's own."""
    lesson = _Lesson()
    with watching(reference, table, lesson.record):
        expected = _gradients(reference, input_ids)
    with watching(port, table, lesson.teach):
        ours = _gradients(port, input_ids)
    theirs = by_name(expected, ours)
    # A parameter stands behind the output of its module.
    order = {name: (number, 0) for number, name in enumerate(lesson.gradients)}
    wrong = {*lesson.wrong, *(lesson.gradients.keys() - lesson.arrived)}
    for name, found in ours.items():
        if name not in theirs or not torch.equal(found, theirs[name]):
            wrong.add(name)
            order[name] = order.get(name.rpartition(".")[0], (len(order), 0))[0], 1
    return sorted(wrong, key=order.__getitem__)


class _Lesson:
    """What the reference had at each site, going forward and coming back; and a port taught it."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        """In the order of the backward pass."""
        self.arrived: set[str] = set()
        self.wrong: set[str] = set()

    def record(self, name: str, tensor: Tensor) -> Tensor:
        self.values[name] = tensor.detach().clone()
        if tensor.requires_grad:

            def keep(gradient: Tensor) -> None:
                self.gradients[name] = gradient.clone()

            tensor.register_hook(keep)  # type: ignore[no-untyped-call]
        return tensor

    def teach(self, name: str, tensor: Tensor) -> Tensor:
        held = self.values.get(name)
        if held is None or held.shape != tensor.shape:
            return tensor
        if not torch.equal(tensor, held):
            tensor = _Taught.apply(tensor, held)  # type: ignore[no-untyped-call]
        expected = self.gradients.get(name)
        if tensor.requires_grad and expected is not None:

            def compare(gradient: Tensor) -> Tensor:
                self.arrived.add(name)
                if not torch.equal(gradient, expected):
                    self.wrong.add(name)
                return expected

            tensor.register_hook(compare)  # type: ignore[no-untyped-call]
        return tensor


class _Taught(torch.autograd.Function):
    """The recorded value going forward, the gradient as it is going back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, recorded: Tensor) -> Tensor:  # noqa: ARG004
        return recorded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


def _num_equal_after_step(
    port: PortSide, reference: Reference, ours: Gradients, theirs: Gradients
) -> int:
    held = reference.parameters(theirs)
    return sum(
        torch.equal(_stepped(parameter, ours[name]), _stepped(held[name], theirs[name]))
        for name, parameter in _named(port).items()
        if name in held
    )


def _stepped(parameter: Tensor, gradient: Tensor) -> Tensor:
    moved = parameter.detach().clone()
    moved.grad = gradient
    torch.optim.AdamW([moved], lr=LEARNING_RATE, fused=True).step()
    return moved
