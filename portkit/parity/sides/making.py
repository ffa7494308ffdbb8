"""From words to sides: who stands in the port's place, and who in the reference's.

Ours against Transformers where nothing else is said; a factory of the user's in either place. Knows
how each is made of a checkpoint; a recorded trace is no side, and is turned away here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from portkit.architecture import CausalLM
from portkit.errors import PortError
from portkit.loading import Blueprint, materialize, resolve_device
from portkit.parity.question import Question
from portkit.parity.reference import load_reference
from portkit.parity.sides import factories
from portkit.parity.sides.factories import Factory
from portkit.parity.sides.foreign import ForeignSide, Surroundings
from portkit.parity.sides.pairs import SitePairs
from portkit.parity.sides.sites import PortSide, Side, SiteTable


@dataclass(frozen=True)
class Sides:
    """Both sides of one comparison, and what was done to have them."""

    port: Side
    reference: Side
    notes: Callable[[], tuple[str, ...]]
    """To be asked afterwards: a foreign side adds to its own while it runs."""

    @property
    def are_ours(self) -> bool:
        """Neither is foreign."""
        return not (self.port.is_partial or self.reference.is_partial)


def make_sides(question: Question, blueprint: Blueprint, dtype: torch.dtype, length: int) -> Sides:
    """Load both sides. `length`: how many tokens our caches are made for.

    The blueprint's skeleton becomes our port, where ours is the port.
    """
    # What is read lies in one folder, a repository's in the Hub's cache.
    folder = blueprint.checkpoint.files.path("config.json").parent
    notes: list[Callable[[], tuple[str, ...]]] = []
    around = Surroundings(
        SiteTable(blueprint.architecture.sites),
        dict(blueprint.skeleton.named_modules()),
        blueprint.config.vocab_size,
    )

    def foreign(given: str | Factory, pairs: str | None) -> Side:
        for file in blueprint.checkpoint.weight_files:
            blueprint.checkpoint.files.path(file)  # a repository's are fetched
        factory = factories.find(given) if isinstance(given, str) else given
        origin = given if isinstance(given, str) else getattr(given, "__name__", "the port")
        made = factories.make(factory, origin, folder, dtype, resolve_device(question.device))
        if isinstance(made.call, CausalLM):  # one of ours that somebody has changed
            notes.append(lambda: made.notes)
            return PortSide(made.call, length, is_partial=True)
        table = SitePairs(made.sites if pairs is None else pairs)
        side = ForeignSide(made.call, dtype, table, around, origin)
        notes.append(lambda: (*made.notes, *side.notes))
        return side

    port: Side
    if question.port is not None:
        port = foreign(question.port, question.sites)
    else:
        word = str(dtype).removeprefix("torch.")
        loaded = materialize(blueprint, word, question.device)
        port = PortSide(loaded.model, length)
        notes.append(lambda: loaded.report.notes)
    reference: Side
    if question.reference is not None:
        if isinstance(question.reference, str) and Path(question.reference).is_file():
            raise PortError(
                f"{question.reference} is a file: give module:factory, or a .safetensors recording "
                "to portkit parity --golden"
            )
        alone = question.port is None
        reference = foreign(question.reference, question.sites if alone else None)
    else:
        attention = question.reference_attention or question.attention
        loaded_reference = load_reference(folder, dtype, attention, question.device)
        reference = loaded_reference
        notes.append(lambda: loaded_reference.notes)
    return Sides(port, reference, lambda: tuple(note for each in notes for note in each()))
