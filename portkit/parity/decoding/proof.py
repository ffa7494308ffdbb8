"""The decode-equivalence matrix of a checkpoint: load both sides, choose the text, judge.

In the dtype that was asked for, and in bfloat16 beside it, where care shows and decoding happens.
Knows the question; what a cell is `decode` knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from portkit.loading import draw, materialize, open_checkpoint, resolve_device, resolve_dtype
from portkit.parity.decoding.fast_ways import MakePackages
from portkit.parity.decoding.matrix import Matrix, Tell, decode_matrix
from portkit.parity.judging.judge import Verdict, worst
from portkit.parity.probes.feeding import text_for
from portkit.parity.probes.probe import Probe, chain, check_fits
from portkit.parity.prove import CARE, memory_watched
from portkit.parity.question import Question
from portkit.parity.reference import load_reference
from portkit.parity.result import NotVerified
from portkit.parity.subject.discovery import sites_of
from portkit.parity.subject.traits import traits_of


@dataclass(frozen=True)
class DecodeParity:
    """The answer: a matrix for each dtype, and what was not verified."""

    matrices: tuple[Matrix, ...]
    not_verified: tuple[NotVerified, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of all cells that were run."""
        return worst(one.verdict for one in self.matrices)

    def holds(self, gate: str) -> bool:
        """Whether the gate lets every cell pass; `exact` asks for equal bits where they can be."""
        return all(one.holds(gate) for one in self.matrices)

    @property
    def probe(self) -> Probe:
        """The prompt, as a probe that `--tokens` takes to ask again."""
        text = self.matrices[0].text
        ids = torch.tensor([text.ids[: text.prompt]])
        return Probe("decode", tuple(chain("prompt", ids, [text.prompt])))


def prove_decoding(
    question: Question,
    seed: int,
    prompt: bool,
    packages: MakePackages | None,
    tell: Tell = lambda _: None,
) -> DecodeParity:
    """Answer it on random tokens drawn from `seed`, behind the question's probe where `prompt`.

    Raises a `PortkitError` on bad input.
    """
    checkpoint = open_checkpoint(question.repo, question.revision)
    asked = resolve_dtype(question.dtype, checkpoint)
    matrices, notes = [], dict[str, None]()
    not_verified: dict[str, NotVerified] = {}
    for dtype in dict.fromkeys((asked, CARE)):
        word = str(dtype).removeprefix("torch.")
        tell(f"load in {word}")
        with memory_watched():
            blueprint = draw(checkpoint, question.attention, question.ignore_config)
            given = None
            if prompt:
                probe = question.choose_probe(traits_of(blueprint.skeleton), checkpoint.files)
                config = blueprint.config
                check_fits(probe, config.vocab_size, config.max_position_embeddings)
                given = _first_row(probe)
            text = text_for(blueprint.skeleton, seed, given)
            loaded = materialize(blueprint, word, question.device)
            folder = checkpoint.files.path("config.json").parent
            device = str(resolve_device(question.device))
            attention = question.reference_attention or question.attention
            reference = load_reference(folder, dtype, attention, device)
            table = sites_of(loaded.model)
            found = decode_matrix(loaded.model, reference, table, text, packages, tell)
        matrices.append(found)
        notes |= dict.fromkeys((*loaded.report.notes, *reference.notes))
        for key in blueprint.ignored:
            reason = "not understood, and ignored on request"
            not_verified[key] = NotVerified(f"config: {key}", reason)
        for cell in found.cells:
            if cell.not_run is not None:
                not_verified.setdefault(cell.way, NotVerified(cell.way, cell.not_run))
            elif cell.unasked is not None:
                name = f"{cell.way}, in float64"
                not_verified.setdefault(name, NotVerified(name, cell.unasked))
    return DecodeParity(tuple(matrices), tuple(not_verified.values()), tuple(notes))


def _first_row(probe: Probe) -> list[int]:
    first = next(iter(probe))
    ids: list[int] = first.input_ids[-1, first.real[-1]].tolist()
    return ids
