"""The cause of a difference: the fault under which the reference does what the port did.

At each culprit every fault of the catalogue that applies is tried on what the reference recorded
there; the one that reproduces the port's tensor is the cause, and how much of the difference it
takes away is said. Where two meet, pairs are tried. Runs again only the piece that is edited, in a
few passes; keeps sums, and no tensor. Knows no fault by name, and judges nothing.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from portkit.parity.faults.catalogue import CATALOGUE
from portkit.parity.faults.fault import Fault, Place
from portkit.parity.faults.needs import Feeding
from portkit.parity.faults.observing import candidates
from portkit.parity.faults.recipe import Cookbook, Recipe
from portkit.parity.faults.scene import Facts, Scene, Scenes, in_layer, layer_of, template
from portkit.parity.judging.judge import Judgement, Verdict
from portkit.parity.judging.ledger import PARAMETER
from portkit.parity.judging.local import Trace
from portkit.parity.probes.probe import Pass, Probe
from portkit.parity.reference import Reference
from portkit.parity.sides.sites import Side, SiteTable
from portkit.parity.teeth.general import Tendencies
from portkit.parity.teeth.trying import EXPLAINED, NUM_ROWS, Trying, of_parameter

_MOST_PASSES, _MOST_FORMS, _MOST_PAIRS = 3, 14, 400
_MOST_ROUNDING = 2
"""Layers in which rounding of one kind is looked into."""
_PAIR_LEAVES = 0.01
"""Of what a single fault leaves unexplained, the most that a pair may leave."""
_KEPT, _TOLD = 12, 3
_ORDER = {one.id: number for number, one in enumerate(CATALOGUE)}


@dataclass(frozen=True)
class Cause:
    """Why a site differs, as far as the catalogue and general tests can tell."""

    faults: tuple[Fault, ...]
    """The mistake, or the two that meet; none: unexplained."""
    explains: float
    """1 - |port - fault|² / |port - reference|²; of a mask or a shape, the share of passes."""
    alternatives: tuple[tuple[str, float], ...] = ()
    """The runners-up, by id, and what each explains."""
    tendencies: tuple[str, ...] = ()
    """What general tests show where no fault explains it."""

    @property
    def name(self) -> str:
        """The first fault's id, or `unexplained`."""
        return self.faults[0].id if self.faults else "unexplained"

    @property
    def sentence(self) -> str:
        """What a porter can act on."""
        if not self.faults:
            shown = f": {'; '.join(self.tendencies)}" if self.tendencies else ""
            return f"unexplained by any known fault{shown}"
        said = ", and ".join(f"{one.says}: {one.mend}" for one in self.faults)
        return f"your port {said}"


@dataclass
class _Hypothesis:
    """Faults at a site, as one edited recipe, and how well it did."""

    faults: tuple[Fault, ...]
    recipe: Recipe
    scores: list[float] = field(default_factory=list)

    @property
    def explains(self) -> float:
        return sum(self.scores) / len(self.scores) if self.scores else -math.inf


@dataclass
class _Evidence:
    """What was found at one culprit."""

    hypotheses: list[_Hypothesis] = field(default_factory=list)
    passes: list[str] = field(default_factory=list)
    base: Recipe | None = None
    is_misshapen: bool = False
    tendencies: Tendencies = field(default_factory=Tendencies)

    def best(self) -> list[_Hypothesis]:
        return sorted(self.hypotheses, key=lambda one: -one.explains)


def is_observed(side: Side) -> bool:
    """Whether a side is Transformers' own, of which the catalogue knows what is public."""
    return isinstance(side, Reference)


class Diagnosis:
    """Takes in passes with their culprits, and tells the causes at the end."""

    def __init__(self, reference: Side, table: SiteTable, probe: Probe) -> None:
        assert isinstance(reference, Reference), "the catalogue's levers are its"
        self.facts = Facts(reference, table)
        self.book = Cookbook(self.facts, candidates)
        self.probe = probe
        self._scenes_of, self._feeding = Scenes(self.facts, probe), Feeding(self.facts, probe)
        self._scenes: dict[str, Scene] = {}
        self._evidence: dict[str, _Evidence] = {}
        self._seen: list[str] = []
        self._rounding: dict[str, set[str]] = {}
        self._tried: dict[str, set[tuple[str, ...]]] = {}
        """By a site's template, the faults that explained it in another layer."""

    def recorded(self, one: Pass, trace: Trace) -> None:
        """The reference's next pass."""
        self._scenes[one.name] = self._scenes_of.of(one, trace)
        self._seen.append(one.name)

    def let_go(self, one: Pass) -> None:
        """Forget a pass that was recorded."""
        self._scenes.pop(one.name, None)

    @torch.no_grad()
    def parameter(self, name: str, port: Tensor, reference: Tensor) -> None:
        """A parameter of the port that holds other values."""
        site = f"{name}{PARAMETER}"
        blank = Scene(self.facts, self.probe.passes[0], 0, {})
        evidence = self._evidence.setdefault(site, _Evidence(passes=["as loaded"]))
        recipe = self.book.recipe(blank, site)
        if recipe is None:
            return
        for fault, edited in self._singles(blank, site, recipe):
            one = _Hypothesis((fault,), edited)
            one.scores.append(of_parameter(edited, blank, site, port, reference))
            evidence.hypotheses.append(one)
        evidence.tendencies.add_parameter(port[:NUM_ROWS], reference[:NUM_ROWS])

    @torch.no_grad()
    def rounding(self, site: str, one: Pass, port: Tensor) -> None:
        """What the port had where it differs by rounding: told only what gives its very bits."""
        self._rounding.setdefault(template(site), set()).add(site)
        if len(self._rounding[template(site)]) <= _MOST_ROUNDING:
            self.culprit(site, one, port, pairs=False)

    @torch.no_grad()
    def culprit(
        self, site: str, one: Pass, port: Tensor, exact: bool = False, pairs: bool = True
    ) -> None:
        """What the port had where it differs in a pass; `exact`: some rows in float64."""
        scene = self._scenes[one.name]
        evidence = self._evidence.setdefault(site, _Evidence())
        # Of what a cache holds a later pass shows what it inherited.
        most = 1 if site.endswith(("#key", "#value")) else _MOST_PASSES
        if len(evidence.passes) >= most or one.name in evidence.passes:
            return
        trying = Trying(scene, site, port, evidence.base, exact)
        misshapen = trying.is_misshapen
        if misshapen and evidence.passes and not evidence.is_misshapen:
            return  # values tell more than shapes
        evidence.is_misshapen = misshapen
        evidence.passes.append(one.name)
        if not evidence.base:
            evidence.base = trying.base = self.book.recipe(scene, site)
        evidence.tendencies.add(one, scene, trying.pair())
        if evidence.base is None:
            return
        if not evidence.hypotheses:
            evidence.hypotheses = self._hypotheses(scene, site, evidence.base)
        kept = evidence.best()[:_KEPT] if len(evidence.passes) > 1 else evidence.hypotheses
        for each in kept:
            each.scores.append(trying.score(each.recipe))
        kept = kept + self._fitted(trying, evidence)
        if pairs and max((each.explains for each in kept), default=0.0) < trying.enough:
            kept = kept + self._pairs(scene, site, trying, kept)
        evidence.hypotheses = kept
        explained = {
            tuple(f.id for f in each.faults) for each in kept if each.explains >= EXPLAINED
        }
        if explained:
            self._tried.setdefault(template(site), set()).update(explained)

    def _singles(self, scene: Scene, site: str, recipe: Recipe) -> Iterator[tuple[Fault, Recipe]]:
        place = Place(site, self.book, scene)
        for fault in CATALOGUE:
            for edited in islice(fault.edit(recipe, place), _MOST_FORMS):
                yield fault, edited

    def _hypotheses(self, scene: Scene, site: str, recipe: Recipe) -> list[_Hypothesis]:
        """All that apply; of a site that was explained in another layer, what explained it."""
        known = self._tried.get(template(site))
        found = [_Hypothesis((f,), edited) for f, edited in self._singles(scene, site, recipe)]
        if known is None or any(len(one) > 1 for one in known):
            return found
        first = [one for one in found if tuple(f.id for f in one.faults) in known]
        # Whatever explained it there may not here: the others stay at hand.
        return first + [one for one in found if one not in first]

    def _fitted(self, trying: Trying, evidence: _Evidence) -> list[_Hypothesis]:
        """Faults whose number is read off the port's own tensor, where usual ones do not fit."""
        best = max((one.explains for one in evidence.hypotheses), default=0.0)
        if best >= EXPLAINED or len(evidence.passes) > 1 or evidence.base is None:
            return []
        recipe, fitting = trying.fitted(), [one for one in CATALOGUE if one.fits]
        if recipe is None:
            return []
        return [_Hypothesis((one,), recipe, [trying.score(recipe)]) for one in fitting]

    def _pairs(
        self, scene: Scene, site: str, trying: Trying, singles: list[_Hypothesis]
    ) -> list[_Hypothesis]:
        """Two mistakes at one site: an edit of what another left."""
        place, found = Place(site, self.book, scene), list[_Hypothesis]()
        ordered = sorted(singles, key=lambda one: -one.explains)
        seen: set[Recipe] = set()
        for first in ordered:
            for fault in CATALOGUE:
                if len(first.faults) > 1 or fault is first.faults[0]:
                    continue
                for edited in islice(fault.edit(first.recipe, place), 5):
                    if edited in seen or len(seen) >= _MOST_PAIRS:
                        continue
                    seen.add(edited)
                    one = _Hypothesis((first.faults[0], fault), edited)
                    one.scores.append(trying.score(edited))
                    if one.explains >= EXPLAINED:
                        found.append(one)
        return sorted(found, key=lambda one: -one.explains)[:_KEPT]

    def causes(self, culprits: Iterable[Judgement]) -> dict[str, Cause]:
        """The cause of each culprit, by its site."""
        judged = list(culprits)
        rounding = {one.site for one in judged if one.verdict is Verdict.rounding}
        explained = {one.site: self._explaining(one.site) for one in judged}
        culprits = [
            one
            for one in judged
            if one.site not in rounding or any(h.explains >= 1 for h in explained[one.site])
        ]
        counts = Counter(
            name
            for best in explained.values()
            for name in {fault.id for one in best for fault in one.faults}
        )
        where: defaultdict[str, set[int | None]] = defaultdict(set)
        for one in culprits:
            where[template(one.site)].add(layer_of(one.site))
        found: dict[str, Cause] = {}
        for culprit in culprits:
            if best := explained[culprit.site]:
                seen = {*culprit.passes, *self._evidence[culprit.site].passes}
                layers = where[template(culprit.site)]
                chosen = min(
                    best, key=lambda one: self._rank(one, culprit.site, seen, layers, counts)
                )
                found[culprit.site] = self._told(culprit.site, chosen)
        absent = {one.site for one in culprits if one.kind == "missing"}
        for culprit in culprits:
            inherited = self._inherited(culprit.site, found, absent)
            if inherited is not None:
                found[culprit.site] = inherited
            elif culprit.site not in found:
                found[culprit.site] = self._told(culprit.site, None)
        return found

    def _explaining(self, site: str) -> list[_Hypothesis]:
        evidence = self._evidence.get(site)
        if evidence is None:
            return []
        best = [one for one in evidence.best() if one.explains >= EXPLAINED]
        singles = [one for one in best if len(one.faults) == 1]
        if singles and 1 - best[0].explains > _PAIR_LEAVES * (1 - singles[0].explains):
            best = singles  # a pair is believed where it leaves next to nothing of the rest
        elif best and len(best[0].faults) > 1:
            best = [one for one in best if len(one.faults) > 1]
        return [one for one in best if one.explains >= best[0].explains - 1e-3]

    def _rank(
        self,
        one: _Hypothesis,
        site: str,
        passes: set[str],
        layers: set[int | None],
        counts: Counter[str],
    ) -> tuple[float, ...]:
        """Fewer faults, in the passes where it would show, at most culprits, told first."""
        return (
            len(one.faults),
            -round(one.explains, 6),
            -self._fit(one.faults[0], passes),
            -self._spread(one.faults[0], site, layers),
            -counts[one.faults[0].id],
            _ORDER[one.faults[0].id],
        )

    def _fit(self, fault: Fault, passes: set[str]) -> float:
        """How well the passes with a difference are those that have what the fault needs."""
        expected = self._feeding.passes_with(fault.needs) & {*self._seen}
        both, either = expected & passes, expected | passes
        return len(both) / len(either) if either else 0.0

    def _spread(self, fault: Fault, site: str, layers: set[int | None]) -> float:
        """How well the layers that differ are those in which the fault would show."""
        if not site.endswith((PARAMETER, "#mask")):
            return 0.0
        blank = Scene(self.facts, self.probe.passes[0], 0, {})
        expected: set[int | None] = set()
        for layer in {layer_of(one) for one in self.facts.attentions} - {None}:
            other = in_layer(site, layer or 0)
            recipe = self.book.recipe(blank, other)
            if recipe and any(True for _ in fault.edit(recipe, Place(other, self.book, blank))):
                expected.add(layer)
        return len(expected & layers) / len(expected | layers) if expected else 0.0

    def _told(self, site: str, best: _Hypothesis | None) -> Cause:
        evidence = self._evidence.get(site, _Evidence())
        others: dict[str, float] = {}
        for one in evidence.best():
            name = " + ".join(fault.id for fault in one.faults)
            if one.explains > 0 and (best is None or one.faults != best.faults):
                others.setdefault(name, round(one.explains, 6))
        alternatives = tuple(islice(others.items(), _TOLD))
        if best is None:
            return Cause((), 0.0, alternatives, evidence.tendencies.told())
        return Cause(best.faults, round(best.explains, 9), alternatives)

    def _inherited(self, site: str, found: dict[str, Cause], absent: set[str]) -> Cause | None:
        """The cause of another: of a site's own parameter, or of who does not call it."""
        module = site.partition(":")[0]
        if site in absent:
            for other, cause in found.items():
                base = self._evidence[other].base if other in self._evidence else None
                named = () if base is None else tuple(_sites_in(base))
                leaves_out = any(one.leaves_out for one in cause.faults)
                if leaves_out and any(f"{module}.".startswith(f"{name}.") for name in named):
                    return cause
            return None
        if module != site or "#" in site:
            return None
        own = (f"{module}.{part}{PARAMETER}" for part in ("weight", "bias"))
        return next((found[one] for one in own if one in found and found[one].faults), None)


def _sites_in(recipe: Recipe) -> Iterator[str]:
    """The sites that a recipe reads."""
    for value in vars(recipe).values():
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, str) and "." in one:
                yield one.partition(":")[0]
