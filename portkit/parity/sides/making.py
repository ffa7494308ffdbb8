"""From words to sides: who stands in the port's place, and who in the reference's.

Ours against Transformers where nothing else is said; a factory of the user's in either place. The
reference comes first: what it is, and which sites it has, is found out by running it. A recorded
trace is no side, and is turned away here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from portkit.architecture import CausalLM
from portkit.checkpoint import CONFIG, Checkpoint
from portkit.errors import PortError, UnsupportedConfig
from portkit.loading import Blueprint, draw, materialize, resolve_device
from portkit.parity.pretrained import code_files
from portkit.parity.probes.named import check_names, named_probe
from portkit.parity.question import Question, check_layers
from portkit.parity.reference import (
    Reference,
    check_takes_tokens,
    is_of_transformers,
    load_reference,
    reference_of,
)
from portkit.parity.sides import factories
from portkit.parity.sides.calling import answer, named, said
from portkit.parity.sides.counting import counts_real
from portkit.parity.sides.factories import Factory, Made
from portkit.parity.sides.foreign import ForeignSide, Surroundings
from portkit.parity.sides.pairs import SitePairs
from portkit.parity.sides.port import PortSide
from portkit.parity.sides.sites import EVERYTHING, CannotRun, Side, SiteTable
from portkit.parity.subject.by_inputs import discover_by
from portkit.parity.subject.discovery import discover
from portkit.parity.subject.traits import (
    Traits,
    traits_by_inputs,
    traits_of,
    traits_of_config,
)
from portkit.registry import architecture_of


@dataclass(frozen=True)
class Subject:
    """Transformers by itself, and what a port of it would be compared at."""

    reference: Reference
    table: SiteTable
    traits: Traits


@dataclass(frozen=True)
class Sides:
    """Both sides of one comparison, what they are compared at, and what was done to have them."""

    port: Side
    reference: Side
    table: SiteTable
    """The sites that the one who names them shows: the reference, or our port where that is
    foreign."""
    traits: Traits
    blueprint: Blueprint | None
    """Of our port; None where another stands in its place."""
    notes: Callable[[], tuple[str, ...]]
    """To be asked afterwards: a foreign side adds to its own while it runs."""

    @property
    def are_ours(self) -> bool:
        """Neither is foreign."""
        return not (self.port.is_partial or self.reference.is_partial)


class _Making:
    """Makes the sides of one question in one dtype."""

    def __init__(
        self, question: Question, checkpoint: Checkpoint | None, dtype: torch.dtype
    ) -> None:
        self._question, self._given, self._dtype = question, checkpoint, dtype
        self._notes: list[Callable[[], tuple[str, ...]]] = []

    def sides(self) -> Sides:
        question = self._question
        if question.inputs is not None and question.port is None:
            raise PortError(
                "named inputs go with a port of yours (--port, or the first argument): portkit's "
                "own are causal language models, and are given tokens"
            )
        if question.subject is not None:
            return self._beside_model(question.subject)
        blueprint = self._drawn() if question.port is None else None
        if question.reference is not None:
            return self._beside_foreign(question.reference, blueprint)
        subject = self.subject()
        reference, table, traits = subject.reference, subject.table, subject.traits
        if blueprint is not None:
            port: Side = self._ours(blueprint)
            return self._found((port, reference), table.shown_by(port), traits, blueprint)
        assert question.port is not None, "else there is a blueprint"
        around = self._around(table, reference.module_sites(), traits)
        port = self._foreign(question.port, question.sites, around)
        return self._found((port, reference), table, traits, None)

    def subject(self) -> Subject:
        reference = self._transformers()
        traits = self._traits(reference.model)
        check_layers(self._question, traits.num_layers)
        return Subject(reference, self._discovered(reference, traits), traits)

    def _traits(self, model: nn.Module) -> Traits:
        return traits_of(model) if self._question.inputs is None else traits_by_inputs(model)

    def _around(
        self, table: SiteTable, modules: Mapping[str, nn.Module], traits: Traits
    ) -> Surroundings:
        return Surroundings(table, modules, traits.vocab_size, self._question.inputs)

    def _discovered(self, side: Side, traits: Traits) -> SiteTable:
        inputs = self._question.inputs
        try:
            if inputs is None:
                return discover(side, traits)
            if isinstance(side, Reference):
                check_names(type(side.model).__name__, inputs, named(side.model))
            held = dict(next(iter(named_probe(inputs, side.dtype))).inputs or {})
            return discover_by(side, held, traits.vocab_size)
        except CannotRun as error:
            raise PortError(f"nothing was compared: the reference does not run: {error}") from error

    @property
    def _checkpoint(self) -> Checkpoint:
        if self._given is None:
            raise PortError(
                "a port beside a model at hand is one too: give a model or a callable, and no name"
            )
        return self._given

    @property
    def _folder(self) -> Path:
        """What is read lies in one folder, a repository's in the Hub's cache."""
        return self._checkpoint.files.path(CONFIG).parent

    def _beside_model(self, subject: Any) -> Sides:
        """A model of Transformers goes by its own names; another callable is measured too."""
        question = self._question
        if question.port is None:
            raise PortError("compare(None, model): give the port that is held against the model")
        if is_of_transformers(subject):
            if question.inputs is None:
                check_takes_tokens(subject)
            reference: Side = reference_of(subject)
            traits, modules = self._traits(subject), reference.module_sites()
            table = self._discovered(reference, traits)
        else:
            made = Made(subject, "")
            vocabulary = _vocabulary(subject) if question.inputs is None else 0
            traits = Traits(vocabulary, None, 0)
            modules = made.modules
            reference, table = self._by_own_names(made, subject, traits)
        check_layers(question, traits.num_layers)
        around = self._around(table, modules, traits)
        port = self._foreign(question.port, question.sites, around)
        return self._found((port, reference), table, traits, None)

    def _beside_foreign(self, given: str | Factory, blueprint: Blueprint | None) -> Sides:
        """Sites go by our port's names where there is one, else by the reference's own."""
        question = self._question
        if isinstance(given, str) and Path(given).is_file():
            raise PortError(
                f"{given} is a file: give module:factory, or a .safetensors recording to portkit "
                "parity --golden"
            )
        if blueprint is not None:
            traits = traits_of(blueprint.skeleton)
            check_layers(question, traits.num_layers)
            port = self._ours(blueprint)
            table = self._discovered(port, traits)
            around = self._around(table, port.module_sites(), traits)
            reference = self._foreign(given, question.sites, around)
            return self._found((port, reference), table, traits, blueprint)
        assert question.port is not None, "else there is a blueprint"
        raw = self._checkpoint.config
        config = SimpleNamespace(**{**raw, **raw.get("text_config", {})})
        by_inputs = question.inputs is not None
        traits = Traits(0, None, 0) if by_inputs else traits_of_config(config)
        check_layers(question, traits.num_layers)
        made = self._made(given)
        reference, table = self._by_own_names(made, given, traits)
        around = self._around(table, made.modules, traits)
        foreign = self._foreign(question.port, question.sites, around)
        return self._found((foreign, reference), table, traits, None)

    def _by_own_names(
        self, made: Made, given: str | Factory, traits: Traits
    ) -> tuple[Side, SiteTable]:
        """A callable that is no model of Transformers, and the sites that it shows."""
        everywhere = self._around(EVERYTHING, made.modules, traits)
        table = self._discovered(self._side(made, given, "", everywhere), traits)
        return self._side(made, given, "", self._around(table, made.modules, traits)), table

    def _found(
        self,
        pair: tuple[Side, Side],
        table: SiteTable,
        traits: Traits,
        blueprint: Blueprint | None,
    ) -> Sides:
        def notes() -> tuple[str, ...]:
            return tuple(note for each in self._notes for note in each())

        foreign, other = pair
        if isinstance(foreign, ForeignSide) and self._question.inputs is None:
            foreign.counts_real = counts_real(foreign, other, traits.vocab_size)
        traits = replace(traits, takes_positions=all(one.takes_positions for one in pair))
        return Sides(*pair, table.of_layers(self._question.layers), traits, blueprint, notes)

    def _drawn(self) -> Blueprint:
        """Our port of the family on the meta device; says the way out where there is none."""
        question = self._question
        try:
            architecture_of(self._checkpoint.config, self._question.ignore_config)
        except UnsupportedConfig as error:
            raise UnsupportedConfig(f"{error}; another one's port is given by --port") from error
        return draw(self._checkpoint, question.attention, question.ignore_config)

    def _ours(self, blueprint: Blueprint) -> PortSide:
        word = str(self._dtype).removeprefix("torch.")
        loaded = materialize(blueprint, word, self._question.device)
        self._notes.append(lambda: loaded.report.notes)
        return PortSide(loaded.model)

    def _transformers(self) -> Reference:
        question = self._question
        attention = question.reference_attention or question.attention
        self._fetch_weights()
        trusts = question.trust_remote_code
        for file in code_files(self._checkpoint.config) if trusts else ():
            self._checkpoint.files.path(file)
        found = load_reference(
            self._folder,
            self._dtype,
            attention,
            question.device,
            by_inputs=question.inputs is not None,
            trusts_code=trusts,
        )
        self._notes.append(lambda: found.notes)
        return found

    def _foreign(self, given: str | Factory, pairs: str | None, around: Surroundings) -> Side:
        return self._side(self._made(given), given, pairs, around)

    def _made(self, given: str | Factory) -> Made:
        factory = factories.find(given) if isinstance(given, str) else given
        device = resolve_device(self._question.device)
        folder = Path()
        if self._given is not None or not getattr(factory, "is_made", False):
            self._fetch_weights()
            folder = self._folder
        return factories.make(factory, _origin(given), folder, self._dtype, device)

    def _side(
        self, made: Made, given: str | Factory, pairs: str | None, around: Surroundings
    ) -> Side:
        self._notes.append(lambda: made.notes)
        if isinstance(made.call, CausalLM):  # one of ours that somebody has changed
            return PortSide(made.call, is_partial=True)
        model = made.call
        if isinstance(model, nn.Module) and is_of_transformers(model) and not (pairs or made.sites):
            if around.inputs is not None:
                check_names(type(model).__name__, around.inputs, named(model))
            return reference_of(model, is_partial=True)
        table = SitePairs(made.sites if pairs is None else pairs)
        side = ForeignSide(made.call, self._dtype, table, around, _origin(given))
        self._notes.append(lambda: tuple(side.notes))
        return side

    def _fetch_weights(self) -> None:
        for file in self._checkpoint.weight_files:
            self._checkpoint.files.path(file)  # a repository's are fetched


def make_sides(question: Question, checkpoint: Checkpoint | None, dtype: torch.dtype) -> Sides:
    """Load both sides, and find out what they are compared at. Raises a `PortkitError`."""
    return _Making(question, checkpoint, dtype).sides()


@torch.no_grad()
def _vocabulary(call: Callable[..., Any]) -> int:
    """How many logits a callable gives for a token."""
    held = call.parameters() if isinstance(call, nn.Module) else iter(())
    first = next(held, None)
    token = torch.zeros((1, 1), dtype=torch.int64, device=None if first is None else first.device)
    try:
        logits = answer(call(token)).logits
    except Exception as error:
        raise PortError(f"the reference raised {said(error)}, called with one token") from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        raise PortError("the reference gives no logits (batch, tokens, vocab_size) for a token")
    return int(logits.shape[-1])


def make_subject(question: Question, checkpoint: Checkpoint, dtype: torch.dtype) -> Subject:
    """Load the reference alone. Raises a `PortkitError`."""
    return _Making(question, checkpoint, dtype).subject()


def _origin(given: str | Factory) -> str:
    return given if isinstance(given, str) else getattr(given, "__name__", "the port")
