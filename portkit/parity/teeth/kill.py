"""The kill matrix: which faults of the catalogue a probe would have caught, where, and by how much.

Each fault is judged as if it were the port: what it makes of the recorded inputs of a site is held
against what the reference had there, by the rules of the gate. Nothing of the model runs again but
the piece that is edited. One place for each kind of layer stands for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from portkit.parity.faults.attending import Kernel
from portkit.parity.faults.catalogue import CATALOGUE
from portkit.parity.faults.fault import Fault, Place
from portkit.parity.faults.needs import Feeding
from portkit.parity.faults.observing import candidates, is_shown_by_parameters
from portkit.parity.faults.recipe import Cookbook, Recipe
from portkit.parity.faults.rotary import Rotation, Tables
from portkit.parity.faults.scene import Facts, Scene, Scenes, representatives
from portkit.parity.judging.judge import FLOOR_FACTOR, SAME_FUNCTION, Verdict, judge
from portkit.parity.judging.ledger import PARAMETER, PassRecord, SiteAccount, squares_of
from portkit.parity.judging.local import Trace, recorder
from portkit.parity.judging.precision import casts_lifted
from portkit.parity.probes.probe import Pass, Probe
from portkit.parity.reference import Reference
from portkit.parity.sides.sites import LOGITS, SiteTable, kind_of, watching
from portkit.parity.subject.dims import rows, same_shape

AS_LOADED = "as loaded"
_ROWS = 512
"""Of a parameter that differs, so many rows say by how much."""


@dataclass(frozen=True)
class Fate:
    """What became of one fault."""

    fault: Fault
    killed: bool = False
    survived: str | None = None
    """Why the probe does not catch it, where it applies."""
    killed_by: str | None = None
    """values, shape, function or care: which question it failed first."""
    first_site: str | None = None
    first_pass: str | None = None
    dtype: str | None = None
    margin: float | None = None
    """Relative RMS between the fault and the reference at that site; of masks, the share of values;
    of care, the distance in multiples of what is allowed."""

    @property
    def applies(self) -> bool:
        return self.killed or self.survived is not None


@dataclass
class _Trial:
    """A fault at a site, whose care is judged over all passes."""

    account: SiteAccount
    first_pass: str


class KillMatrix:
    """Takes in a reference's recorded passes one by one."""

    def __init__(
        self,
        reference: Reference,
        table: SiteTable,
        probe: Probe,
        gate: str = "exact",
        catalogue: Iterable[Fault] = CATALOGUE,
    ) -> None:
        self.facts = Facts(reference, table)
        self.book = Cookbook(self.facts, candidates)
        self.probe, self.gate = probe, gate
        self._scenes, self._feeding = Scenes(self.facts, probe), Feeding(self.facts, probe)
        self._open = list(catalogue)
        self._all = tuple(self._open)
        self._fates: dict[str, Fate] = {}
        self._applied: set[str] = set()
        """Faults for which there is a place in this model."""
        self._trials: dict[tuple[str, str], _Trial] = {}
        self._passes = 0
        self.kinds: dict[str, bool] = {}
        """Of each kind of site that was recorded, whether what stands there is known."""

    @torch.no_grad()
    def see(self, one: Pass, trace: Trace) -> None:
        """Try every fault that is not caught yet on the next pass."""
        scene = self._scenes.of(one, trace)
        if not self._passes:
            self._try_parameters(scene)
        sites = [*trace, *([LOGITS] if "lm_head" in trace and LOGITS not in trace else [])]
        for site in representatives(self.facts, sites):
            recipe = self.book.recipe(scene, site)
            known = recipe is not None or is_shown_by_parameters(scene, site)
            self.kinds[kind_of(site)] = known or self.kinds.get(kind_of(site), False)
            if recipe is not None:
                self._try_at(scene, site, recipe)
        self._passes += 1

    def _try_parameters(self, scene: Scene) -> None:
        for name, held in self.facts.parameters.items():
            if self.facts.table.dims(name.rpartition(".")[0]) is None:
                continue
            site = f"{name}{PARAMETER}"
            recipe = self.book.recipe(scene, site)
            assert recipe is not None, "a parameter is what it is"
            for fault, edited in self._mutants(scene, site, recipe):
                made = edited.run(scene, site)
                if made is not None and not torch.equal(made, held):
                    ours, theirs = (one[:_ROWS].double() for one in (made, held))
                    error = _relative(ours - theirs, theirs)
                    self._kill(fault, "values", site, AS_LOADED, error)

    def _mutants(self, scene: Scene, site: str, recipe: Recipe) -> Iterator[tuple[Fault, Recipe]]:
        """The faults that apply to a recipe and are not caught yet, each in its first form."""
        place = Place(site, self.book, scene)
        for fault in (*self._open,):
            edited = next(iter(fault.edit(recipe, place)), None)
            if edited is not None:
                self._applied.add(fault.id)
                yield fault, edited

    def _try_at(self, scene: Scene, site: str, recipe: Recipe) -> None:
        for fault, edited in self._mutants(scene, site, recipe):
            made, held = edited.run(scene, site), self._held(scene, site, recipe)
            if made is None or held is None:
                continue
            dims = self._dims(site)
            if not same_shape(dims, made, held) or made.dtype != held.dtype:
                self._kill(fault, "shape", site, scene.one.name, None)
                continue
            ours, theirs = (rows(each, dims, scene.one) for each in (made, held))
            equal = torch.equal(ours, theirs)
            if not equal and (self.gate == "exact" or not made.is_floating_point()):
                self._kill(fault, "values", site, scene.one.name, _relative_rows(ours, theirs))
            elif made.is_floating_point() and (not equal or self._passes < 2):
                self._ask(scene, site, (fault, edited, recipe), (ours, theirs))

    def _held(self, scene: Scene, site: str, recipe: Recipe) -> Tensor | None:
        return recipe.run(scene, site) if site not in scene.trace else scene.at(site)

    def _dims(self, site: str) -> str:
        dims = self.facts.table.dims(site)
        assert dims is not None, f"{site} is declared"
        return dims

    def _ask(
        self,
        scene: Scene,
        site: str,
        tried: tuple[Fault, Recipe, Recipe],
        found: tuple[Tensor, Tensor],
    ) -> None:
        """The two questions: the same function, and the same care?"""
        fault, edited, recipe = tried
        if isinstance(edited, Rotation) and edited.tables is not None:
            # Rounded tables are part of the truth: what uses others is held against its own kind.
            own = self.book.recipe(scene, f"{self.facts.attention(site)}:in.cos")
            assert isinstance(own, Tables), "the tables that were edited"
            recipe = replace(recipe, tables=own)  # type: ignore[type-var]
        dims = self._dims(site)
        with casts_lifted():
            exact = scene.in_float64()
            made, truth = edited.run(exact, site), recipe.run(exact, site)
        if made is None or truth is None:
            return
        if made.dtype != torch.float64 or truth.dtype != torch.float64:
            return  # positions alone: their tables are asked where they are used
        port, held = (rows(each, dims, scene.one) for each in (made, truth))
        error = _relative(port - held, held)
        if error > SAME_FUNCTION:
            self._kill(fault, "function", site, scene.one.name, error)
            return
        ours, theirs = found
        if torch.equal(ours, theirs):
            return
        trial = self._trials.setdefault(
            (fault.id, site), _Trial(SiteAccount(site, dims, is_glue=False), scene.one.name)
        )
        account = trial.account
        account.unequal.append(PassRecord(scene.one.name, 1, ours.numel(), 0.0))
        account.truth.add(squares_of(held), len(held))
        account.port.add(squares_of(ours, held), len(held))
        account.floors["own"].add(squares_of(theirs, held), len(held))
        if isinstance(recipe, Kernel):
            other = replace(recipe, kernel="eager" if recipe.kernel == "sdpa" else "sdpa")
            context = other.run(scene, site)
            if context is not None:
                gap = squares_of(rows(context, dims, scene.one), held)
                account.floors["other"].add(gap, len(held))

    def _kill(self, fault: Fault, by: str, site: str, one: str, margin: float | None) -> None:
        dtype = str(self.facts.dtype).removeprefix("torch.")
        self._fates[fault.id] = Fate(fault, True, None, by, site, one, dtype, margin)
        self._open.remove(fault)

    def fates(self) -> tuple[Fate, ...]:
        """What became of every fault, in the catalogue's order."""
        below: dict[str, str] = {}
        for (name, site), trial in self._trials.items():
            found = judge(trial.account)
            fault = next((one for one in self._open if one.id == name), None)
            if fault is None:
                continue
            assert found.floor is not None, "a trial has a truth"
            assert found.local_error is not None, "a trial has a truth"
            times = found.local_error / (FLOOR_FACTOR * found.floor) if found.floor else math.inf
            if found.verdict is Verdict.diverged:
                times = max(times, found.worst_channel or 0.0)
                self._kill(fault, "care", site, trial.first_pass, times)
            else:
                below.setdefault(name, f"below the floor: {times:.2f} of what is allowed at {site}")
        return tuple(
            self._fates.get(one.id) or Fate(one, survived=self._why(one, below))
            for one in self._all
        )

    def _why(self, fault: Fault, below: dict[str, str]) -> str | None:
        """Why an open fault was not caught; None where it does not apply to the model."""
        if fault.id in below:
            return below[fault.id]
        if fault.id not in self._applied:
            return None
        lacks = self._feeding.lacks(fault.needs)
        if lacks is not None:
            return f"beyond this probe: it has no pass with {lacks}, as the default one has"
        return None


def kill_matrix(
    reference: Reference,
    table: SiteTable,
    probe: Probe,
    gate: str = "exact",
    tell: Callable[[str], None] = lambda _: None,
    beside: Callable[[Pass, Trace], None] = lambda *_: None,
) -> KillMatrix:
    """Run the probe once on the reference, and every fault on what is recorded.

    `beside` is shown what was recorded, too.
    """
    matrix, caches = KillMatrix(reference, table, probe, gate), dict[str, Any]()
    for one in probe:
        tell(one.name)
        trace: Trace = {}
        with watching(reference, table, recorder(trace)):
            logits = reference.run(one, caches)
        matrix.see(one, trace)
        if "lm_head" in trace:
            trace[LOGITS] = logits
        beside(one, trace)
    return matrix


def _relative(gap: Tensor, truth: Tensor) -> float:
    size, error = float(truth.square().sum()), float(gap.square().sum())
    if not math.isfinite(error):
        return math.inf
    return math.sqrt(error / size) if size else math.sqrt(error)


def _relative_rows(ours: Tensor, theirs: Tensor) -> float:
    if not ours.is_floating_point():
        return float((ours != theirs).double().mean())
    return _relative(ours.double() - theirs.double(), theirs.double())
