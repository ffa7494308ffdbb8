"""The whole question: load both sides, compare them, hear them speak, and say what was not seen.

Knows what belongs to a proof beside the comparison itself: a pass in bfloat16, which alone shows a
missing care, generation, and the coverage of the probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from portkit.checkpoint import Checkpoint
from portkit.errors import OutOfMemory, PortkitError
from portkit.loading import LoadedModel, draw, materialize, open_checkpoint, resolve_dtype
from portkit.parity.compare import Tell, compare
from portkit.parity.generation import NUM_TOKENS, GenerationParity, compare_generation
from portkit.parity.kill import KillMatrix, kill_matrix
from portkit.parity.probe import Probe, check_fits
from portkit.parity.probing import default_probe, unexercised
from portkit.parity.reference import Reference, load_reference
from portkit.parity.result import Comparison, NotVerified, ParityResult
from portkit.parity.sites import PortSide, SiteTable
from portkit.parity.teeth import Teeth, chosen, merged
from portkit.tokenizer import Tokenizer

CARE = torch.bfloat16
"""The dtype in which a missing upcast shows, whatever dtype was asked for."""
_OPENING = "Once upon a time"
_CARE_PASSES = {"short", "far"}


@dataclass(frozen=True)
class Question:
    """What is to be proven. Words are the command's."""

    repo: str | Path
    revision: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    attention: str = "sdpa"
    reference_attention: str | None = None
    """None: the same as the port's."""
    layers: range | None = None
    """The layers to hold against the truth; None: all, and what is around them."""
    ignore_config: tuple[str, ...] = ()
    gate: str = "exact"
    """By which the faults of the catalogue are judged."""
    faults: str = "full"
    """How many of them are tried: full, sampled or off."""
    choose_probe: Callable[[LoadedModel], Probe] = lambda loaded: default_probe(loaded.model)


def prove(question: Question, tell: Tell = lambda _: None) -> ParityResult:
    """Answer it. `tell` is given a line for each step. Raises a `PortkitError` on bad input."""
    checkpoint = open_checkpoint(question.repo, question.revision)
    asked = resolve_dtype(question.dtype, checkpoint)
    with memory_watched():
        result = _prove_in(question, checkpoint, asked, tell)
        if asked != CARE:
            beside = _care(question, checkpoint, tell)
            result = replace(
                result,
                comparisons=(*result.comparisons, beside),
                not_verified=(*result.not_verified, *beside.not_verified),
            )
    if question.faults == "off":
        return result
    found = merged([one.fates for one in result.comparisons])
    return replace(result, teeth=found, not_verified=(*result.not_verified, *_uncaught(found)))


def measure(question: Question, tell: Tell = lambda _: None) -> tuple[Probe, Teeth]:
    """What the question's probe would have caught, without running the port."""
    checkpoint = open_checkpoint(question.repo, question.revision)
    asked = resolve_dtype(question.dtype, checkpoint)
    fates, probes = [], []
    with memory_watched():
        for dtype in dict.fromkeys((asked, CARE)):
            loaded, reference, probe = _prepare(question, checkpoint, dtype, tell)
            probe = probe if dtype == asked else _care_probe(probe)
            table, moved = _table(question, loaded), _moved(loaded, probe)
            fates.append(kill_matrix(reference, table, moved, question.gate, tell))
            probes.append(probe)
    return probes[0], merged(fates)


def _uncaught(found: Teeth) -> Iterator[NotVerified]:
    """Faults that only a larger probe would show. What it lacks is listed too, and decides."""
    for one in found.survived:
        assert one.survived is not None, "it survived"
        if one.survived.startswith("beyond"):
            yield NotVerified(f"fault {one.fault.id}", one.survived)


def _prove_in(
    question: Question, checkpoint: Checkpoint, dtype: torch.dtype, tell: Tell
) -> ParityResult:
    """The answer in the dtype that was asked for."""
    loaded, reference, probe = _prepare(question, checkpoint, dtype, tell)
    found = _compare(question, loaded, reference, probe, tell)
    generation = None
    if question.layers is None:
        tell("generate")
        generation = _generate(loaded, reference, probe)
    return ParityResult(
        (found,),
        generation,
        (*_not_verified(question, loaded, probe), *found.not_verified),
        (*loaded.report.notes, *reference.notes),
    )


def _care(question: Question, checkpoint: Checkpoint, tell: Tell) -> Comparison:
    """Again in bfloat16; of a complete probe the passes that run every module, near and far."""
    loaded, reference, probe = _prepare(question, checkpoint, CARE, tell)
    return _compare(question, loaded, reference, _care_probe(probe), tell)


def _care_probe(probe: Probe) -> Probe:
    if not probe.is_complete:
        return probe
    passes = tuple(one for one in probe if one.name in _CARE_PASSES)
    return Probe("bfloat16", passes or probe.passes)


def _prepare(
    question: Question, checkpoint: Checkpoint, dtype: torch.dtype, tell: Tell
) -> tuple[LoadedModel, Reference, Probe]:
    tell(f"load in {_word(dtype)}")
    loaded, reference = _load(question, checkpoint, dtype)
    probe = question.choose_probe(loaded)
    check_fits(probe, loaded.config.vocab_size, loaded.config.max_position_embeddings)
    return loaded, reference, probe


def _load(
    question: Question, checkpoint: Checkpoint, dtype: torch.dtype
) -> tuple[LoadedModel, Reference]:
    blueprint = draw(checkpoint, question.attention, question.ignore_config)
    check_layers(question, blueprint.config.num_hidden_layers)
    loaded = materialize(blueprint, _word(dtype), question.device)
    # What was just read lies in one folder, a repository's in the Hub's cache.
    folder = loaded.files.path("config.json").parent
    attention = question.reference_attention or question.attention
    return loaded, load_reference(folder, dtype, attention, question.device)


def check_layers(question: Question, num_layers: int) -> None:
    """Raise `PortkitError` where the model has no such layers."""
    if question.layers is not None and question.layers.stop > num_layers:
        raise PortkitError(
            f"--layers {question.layers.start}-{question.layers.stop - 1}: the model has "
            f"{num_layers} layers, 0 to {num_layers - 1}"
        )


def _compare(
    question: Question, loaded: LoadedModel, reference: Reference, probe: Probe, tell: Tell
) -> Comparison:
    moved, table = _moved(loaded, probe), _table(question, loaded)
    faults = chosen(question.faults)
    matrix = KillMatrix(reference, table, moved, question.gate, faults) if faults else None
    return compare(PortSide(loaded.model, probe.longest), reference, table, moved, tell, matrix)


def _moved(loaded: LoadedModel, probe: Probe) -> Probe:
    device = next(loaded.model.parameters()).device
    return replace(probe, passes=tuple(one.to(device) for one in probe))


def _table(question: Question, loaded: LoadedModel) -> SiteTable:
    return SiteTable(loaded.architecture.sites, question.layers)


def _generate(loaded: LoadedModel, reference: Reference, probe: Probe) -> GenerationParity:
    """After a prompt of one's own, or after words: random tokens end in repeating one."""
    context = loaded.config.max_position_embeddings
    first = next(iter(probe))
    prompt = first.input_ids[-1, first.real[-1]].tolist()
    if probe.name != "prompt":
        with suppress(PortkitError):  # a checkpoint need not have a tokenizer
            words = Tokenizer.open(loaded.files).encode(_OPENING)
            prompt = words if words and max(words) < loaded.config.vocab_size else prompt
    num_tokens = max(1, min(NUM_TOKENS, context // 2))
    prompt = prompt[: context - num_tokens]
    port = PortSide(loaded.model, len(prompt) + num_tokens)
    return compare_generation(port, reference, prompt, num_tokens)


def _not_verified(question: Question, loaded: LoadedModel, probe: Probe) -> Iterator[NotVerified]:
    yield from unexercised(loaded.model, probe)
    for key in loaded.blueprint.ignored:
        yield NotVerified(f"config: {key}", "not understood, and ignored on request")
    if question.layers is not None:
        named = f"{question.layers.start} to {question.layers.stop - 1}"
        yield NotVerified(
            f"everything but the layers {named}", "--layers left it out, and generation with it"
        )


@contextmanager
def memory_watched() -> Iterator[None]:
    """Where memory runs out, say what takes less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and (
            "can't allocate memory" not in said
        ):
            raise
        reason = said.splitlines()[0] if said else "no reason given"
        raise OutOfMemory(
            f"memory ran out ({reason:.120}): try --layers 0-3, --quick, or a smaller --dtype"
        ) from error


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
