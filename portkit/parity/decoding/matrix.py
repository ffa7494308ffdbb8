"""The decode-equivalence matrix: every way of computing a token's logits, held against the others.

The readable model, fed whole, in chunks, token by token, padded and in a batch, must equal the
reference fed likewise in every bit. The fast path cannot where its operations are others; it must
then lie within the reference's own floor, its distance from float64 at these logits. A cell that
cannot be equal by nature says why: it was asked, of its own operations and on this machine. One
that could and is not has no excuse.

The fast path's function is asked for too: its graph and its caches in float64. A slot too many in a
ring of 512 is lost in bfloat16's rounding, and shows there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from portkit.architecture import CausalLM
from portkit.parity.decoding.fast_ways import (
    FastWays,
    MakePackages,
    run_fast,
    wrapped_tokens,
)
from portkit.parity.gradients import SAME_GRADIENT
from portkit.parity.judging.free_truth import FreeTruth
from portkit.parity.judging.judge import CHANNEL_FACTOR, FLOOR_FACTOR, Verdict, worst
from portkit.parity.probes.feeding import (
    DECODED,
    STEPWISE,
    WHOLE,
    Text,
    logits_by_engine,
    logits_by_side,
    prompts_of,
)
from portkit.parity.reference import Reference
from portkit.parity.sides.port import PortSide
from portkit.parity.sides.sites import LOGITS, SiteTable, watching
from portkit.readable import ReadableBatch

SAME_LOGITS = SAME_GRADIENT
"""Relative RMS in float64 up to which logits are of one function: as gradients, they are carried
through a whole network."""
FAST = {way: f"fast path, {way}" for way in STEPWISE}
RING, COMPILED = "fast path, ring after it wrapped", f"compiled, {DECODED}"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Parting:
    """The first token at which a way would have chosen another one than the reference."""

    token: int
    """Its place among the compared ones."""
    ours: int
    theirs: int
    gap: float
    """The larger of both sides' preferences for their own choice, in logits."""
    floor: float
    """How far a logit moves there between the reference's own kernels, or one step of the dtype."""

    @property
    def is_rounding(self) -> bool:
        """Both preferences are no more than two logits can move by rounding."""
        return self.gap <= 2 * self.floor


@dataclass(frozen=True)
class Cell:
    """One way in one dtype. Errors are relative RMS; `verdict` is None where it was not run."""

    way: str
    verdict: Verdict | None
    kind: str | None = None
    """function, care or tokens; None unless diverged."""
    bits: int | None = None
    """The same number in cells whose logits are equal in every bit; 0 is the prefill's."""
    is_equal: bool = False
    """In every bit, to the reference that is fed in the same way."""
    error: float | None = None
    floor: float | None = None
    worst_token: float | None = None
    """The largest ratio of a token's distance from the truth to what it is allowed."""
    function_error: float | None = None
    """Of the fast path, in float64; None where that was not asked."""
    num_tokens: int = 0
    num_same_tokens: int = 0
    parting: Parting | None = None
    reasons: tuple[str, ...] = ()
    """Why it cannot be equal in every bit."""
    unasked: str | None = None
    """Why a way of the fast path was not asked for its function."""
    not_run: str | None = None

    def holds(self, gate: str) -> bool:
        """Whether the gate lets it pass: `exact` asks for equal bits where they can be."""
        if self.verdict is Verdict.rounding:
            return gate == Verdict.rounding or bool(self.reasons)
        return self.verdict in (None, Verdict.exact)


@dataclass(frozen=True)
class Matrix:
    """All ways in one dtype."""

    dtype: str
    text: Text
    cells: tuple[Cell, ...]

    @property
    def verdict(self) -> Verdict:
        return worst(one.verdict for one in self.cells if one.verdict is not None)

    def holds(self, gate: str) -> bool:
        """Whether the gate lets every cell pass."""
        return all(one.holds(gate) for one in self.cells)


@torch.no_grad()
def decode_matrix(
    model: CausalLM,
    reference: Reference,
    table: SiteTable,
    text: Text,
    packages: MakePackages | None,
    tell: Tell = lambda _: None,
) -> Matrix:
    """Hold all ways of `model`, our own, against `reference`, on `text`.

    `packages` makes the folder of compiled regions; None leaves them out.
    """
    device = next(model.parameters()).device
    judge = _Judge(Measured.of(reference, table, text, tell))
    cells, readable = [], {}
    for way in text.ways:
        tell(way)
        if way in STEPWISE:
            engine = ReadableBatch(model, prompts_of(text, way), text.num_compared)
            logits = logits_by_engine(engine, text, way, device)
        else:
            logits = logits_by_side(PortSide(model, len(text.ids)), text, way, device)
        cells.append(judge(way, way, logits))
        readable[way] = logits
    fast = run_fast(model, text, readable, packages, tell)
    cells += _fast_cells(judge, fast, text)
    return Matrix(str(reference.dtype).removeprefix("torch."), text, tuple(cells))


def _fast_cells(judge: _Judge, fast: FastWays, text: Text) -> list[Cell]:
    if fast.refused is not None:
        return [Cell("fast path", None, not_run=fast.refused)]
    cells = []
    for way, name in FAST.items():
        cells.append(judge(name, way, fast.logits[way], fast.in_float64.get(way)))
        if way == DECODED and text.leaves_a_window:
            part = wrapped_tokens(text)
            cells.append(judge(RING, way, fast.logits[way], fast.in_float64.get(way), part))
        elif way == DECODED:
            cells.append(Cell(RING, None, not_run=_no_ring(text)))
    reasons = {FAST[way]: why for way, why in fast.reasons.items()}
    reasons[RING] = fast.reasons.get(DECODED, ())
    cells = [_told(one, reasons.get(one.way, ()), fast.unasked) for one in cells]
    if fast.compiled is None:
        return [*cells, Cell(COMPILED, None, not_run=fast.not_compiled)]
    compiled = judge(COMPILED, DECODED, fast.compiled)
    return [*cells, _told(compiled, fast.compiled_reasons)]


def _told(cell: Cell, why: tuple[str, ...], unasked: str | None = None) -> Cell:
    """With what it needs to be told of it: nothing excuses, where nothing differs."""
    differs = cell.verdict not in (None, Verdict.exact)
    return replace(cell, reasons=why if differs else (), unasked=unasked)


def _no_ring(text: Text) -> str:
    if not text.windows:
        return "no layer has a window shorter than the context"
    return f"a text of {len(text.ids)} tokens does not leave a window of {min(text.windows)}"


@dataclass(frozen=True)
class Measured:
    """What is had of the reference: the truth, and its own logits by way; (compared, vocab) all."""

    truth: Tensor
    theirs: dict[str, Tensor]
    others: dict[str, Tensor]
    """By its other attention kernel."""

    @staticmethod
    def of(reference: Reference, table: SiteTable, text: Text, tell: Tell) -> Measured:
        device = next(reference.model.parameters()).device
        tell("the truth in float64")
        (whole,) = (one.to(device) for one in text.passes(WHOLE))
        trace = {LOGITS: torch.empty(0)}

        def keep_tables(name: str, tensor: Tensor) -> Tensor:
            if "#cos" in name or "#sin" in name:
                trace[name] = tensor.clone()
            return tensor

        with watching(reference, table, keep_tables):
            reference.run(whole, {})
        found: dict[str, Tensor] = {}
        FreeTruth(reference, table).run(whole, trace, found.__setitem__)
        theirs, others = {}, {}
        for way in text.ways:
            tell(f"the reference, {way}")
            theirs[way] = logits_by_side(reference, text, way, device)
            with reference.other_kernel():
                others[way] = logits_by_side(reference, text, way, device)
        return Measured(found[LOGITS][-1], theirs, others)


class _Judge:
    """Judges a way's logits; remembers those that it has seen, to tell which are equal."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured
        self._known: list[Tensor] = []

    def __call__(
        self,
        name: str,
        way: str,
        logits: Tensor,
        in_float64: Tensor | None = None,
        part: slice = slice(None),
    ) -> Cell:
        """`way` is how the reference is fed beside it; `part` the tokens that are looked at."""
        whole = logits
        logits, truth, theirs, other = (
            one[part]
            for one in (
                logits,
                self._measured.truth,
                self._measured.theirs[way],
                self._measured.others[way],
            )
        )
        error, *floors = (_by_token(one, truth) for one in (logits, theirs, other))
        floor = torch.stack([one for one in floors if bool(one.isfinite().all())]).amax(0)
        # Of logits that are zero everywhere errors are absolute.
        size = _root_mean(_by_token(truth, torch.zeros_like(truth))) or 1.0
        allowed = CHANNEL_FACTOR * floor.clamp(min=_root_mean(floor))
        worst_token = float((error / allowed).nan_to_num(nan=0.0, posinf=math.inf).max())
        parting = _parting(logits, theirs, other)
        function_error = None
        if in_float64 is not None:
            function_error = _root_mean(_by_token(in_float64[part], truth)) / size
        within = _root_mean(error) <= FLOOR_FACTOR * _root_mean(floor) and worst_token <= 1
        is_equal = torch.equal(logits, theirs)
        kind = None
        if function_error is not None and not function_error <= SAME_LOGITS:
            kind = "function"
        elif not is_equal and not within:
            kind = "care"
        elif parting is not None and not parting.is_rounding:
            kind = "tokens"
        verdict = Verdict.diverged if kind else Verdict.exact if is_equal else Verdict.rounding
        return Cell(
            name,
            verdict,
            kind,
            self._number_of(whole),
            is_equal,
            _root_mean(error) / size,
            _root_mean(floor) / size,
            worst_token,
            function_error,
            len(logits),
            int((logits.argmax(-1) == theirs.argmax(-1)).sum()),
            parting,
        )

    def _number_of(self, logits: Tensor) -> int:
        for number, known in enumerate(self._known):
            if torch.equal(logits, known):
                return number
        self._known.append(logits)
        return len(self._known) - 1


def _by_token(logits: Tensor, truth: Tensor) -> Tensor:
    """Root mean square of the difference at each token, float64 (tokens,)."""
    return (logits.double() - truth).pow(2).mean(-1).sqrt()


def _root_mean(by_token: Tensor) -> float:
    return float(by_token.pow(2).mean().sqrt())


def _parting(ours: Tensor, theirs: Tensor, other: Tensor) -> Parting | None:
    chosen, expected = ours.argmax(-1), theirs.argmax(-1)
    differing = (chosen != expected).nonzero().flatten().tolist()
    if not differing:
        return None
    token = differing[0]
    a, b = int(expected[token]), int(chosen[token])
    step = float(theirs[token, a].abs()) * torch.finfo(theirs.dtype).eps
    mine, its, moved = (one[token].double() for one in (ours, theirs, other))
    far = float((moved - its).abs().max())
    gap = max(float(mine[b] - mine[a]), float(its[a] - its[b]))
    return Parting(token, b, a, gap, max(step, far if math.isfinite(far) else 0.0))
