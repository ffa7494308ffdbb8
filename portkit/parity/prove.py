"""The whole question: load both sides, compare them, hear them speak, and say what was not seen.

Knows what belongs to a proof beside the comparison itself: a pass in bfloat16, which alone shows a
missing care, generation, and the coverage of the probe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch

from portkit.architecture import CausalLM
from portkit.checkpoint import Checkpoint
from portkit.errors import OutOfMemory, PortkitError
from portkit.loading import COMPUTE_DTYPES, open_checkpoint, resolve_device, resolve_dtype
from portkit.parity.comparing import Tell, compare
from portkit.parity.generation import NUM_TOKENS, compare_generation
from portkit.parity.gradients import GradientParity, compare_gradients
from portkit.parity.judging.precision import ran_out_of_memory
from portkit.parity.probes.named import named_probe
from portkit.parity.probes.probe import Probe, check_fits
from portkit.parity.probes.probing import training_batch, unexercised
from portkit.parity.question import Question
from portkit.parity.reference import Reference
from portkit.parity.result import Comparison, NotVerified, ParityResult
from portkit.parity.sides.making import Sides, make_sides, make_subject
from portkit.parity.sides.port import PortSide
from portkit.parity.sides.sharing import share_parameters
from portkit.parity.sides.sites import CannotRun, SiteTable
from portkit.parity.subject.traits import Traits
from portkit.parity.teeth.fates import Teeth, chosen, merged
from portkit.parity.teeth.kill import KillMatrix, kill_matrix
from portkit.parity.teeth.moving import ConfigMoves
from portkit.parity.teeth.sensitivity import Sensitivity, settled
from portkit.registry import is_ported
from portkit.tokenizer import Tokenizer

CARE = torch.bfloat16
"""The dtype in which a missing upcast shows, whatever dtype was asked for."""
_OPENING = "Once upon a time"
_CARE_PASSES = {"short", "far"}
_OF_TOKENS = ("generation", "decoding", "gradients", "known faults")


@dataclass(frozen=True)
class _Prepared:
    """What a comparison in one dtype is made of."""

    checkpoint: Checkpoint | None
    sides: Sides
    probe: Probe
    prompt: list[int]
    num_tokens: int
    """To generate after the prompt."""


def prove(question: Question, tell: Tell = lambda _: None) -> ParityResult:
    """Answer it. `tell` is given a line for each step. Raises a `PortkitError` on bad input."""
    checkpoint, asked = _opened(question)
    with memory_watched():
        result = _prove_in(question, checkpoint, asked, tell)
        if asked != CARE and question.is_made:
            unseen = NotVerified("care in bfloat16", f"the model was given in {_word(asked)}")
            result = replace(result, not_verified=(*result.not_verified, unseen))
        elif asked != CARE:
            beside = _care(question, checkpoint, tell, settled(result.comparisons[0].config))
            known = {one.name for one in result.not_verified}
            further = (one for one in beside.not_verified if one.name not in known)
            result = replace(
                result,
                comparisons=(*result.comparisons, beside),
                not_verified=(*result.not_verified, *further),
            )
    fates = [one.fates for one in result.comparisons]
    if question.faults == "off" or not any(fates):
        return result
    found = merged(
        fates,
        [one.config for one in result.comparisons],
        [one.kinds for one in result.comparisons],
    )
    return replace(result, teeth=found, not_verified=(*result.not_verified, *_uncaught(found)))


def _opened(question: Question) -> tuple[Checkpoint | None, torch.dtype]:
    """The checkpoint, if there is one beside a model at hand, and the dtype to compute in."""
    if question.subject is None:
        checkpoint = open_checkpoint(question.repo, question.revision)
        return checkpoint, resolve_dtype(question.dtype, checkpoint)
    if question.dtype not in COMPUTE_DTYPES:
        raise PortkitError(
            f"dtype is {question.dtype!r:.60}: choose one of {', '.join(COMPUTE_DTYPES)}"
        )
    return None, COMPUTE_DTYPES[question.dtype]


def measure(question: Question, tell: Tell = lambda _: None) -> tuple[Probe, Teeth]:
    """What the question's probe would have caught, without running the port.

    Of a family that has none of ours no field of the config is moved.
    """
    checkpoint = open_checkpoint(question.repo, question.revision)
    asked = resolve_dtype(question.dtype, checkpoint)
    matrices, configs = list[KillMatrix](), list[tuple[Sensitivity, ...]]()
    has_port = is_ported(checkpoint.config)
    with memory_watched():
        for dtype in dict.fromkeys((asked, CARE)):
            care = dtype != asked
            if has_port:
                prepared = _prepare(question, checkpoint, dtype, tell)
                moved = _moved(question, _care_probe(prepared.probe) if care else prepared.probe)
                fields = _config_moves(prepared, prepared.sides.table, moved, settled(*configs))
                reference, table = prepared.sides.reference, prepared.sides.table
                assert isinstance(reference, Reference), "nothing else stands in its place"
                matrix = kill_matrix(reference, table, moved, question.gate, tell, fields.see)
                configs.append(fields.found())
            else:
                tell(f"load in {_word(dtype)}")
                subject = make_subject(question, checkpoint, dtype)
                probe = question.choose_probe(subject.traits, checkpoint.files)
                check_fits(probe, subject.traits.vocab_size, subject.traits.max_positions)
                moved = _moved(question, _care_probe(probe) if care else probe)
                matrix = kill_matrix(subject.reference, subject.table, moved, question.gate, tell)
            matrices.append(matrix)
    found = merged(
        [one.fates() for one in matrices],
        configs if has_port else None,
        [one.kinds for one in matrices],
    )
    return matrices[0].probe, found


def _uncaught(found: Teeth) -> Iterator[NotVerified]:
    """Faults that only a larger probe would show. What it lacks is listed too, and decides."""
    for one in found.survived:
        assert one.survived is not None, "it survived"
        if one.survived.startswith("beyond"):
            yield NotVerified(f"fault {one.fault.id}", one.survived)
    for each in found.config or ():
        if each.seen is False:
            yield NotVerified(f"config: {each.field}", each.by)


def _prove_in(
    question: Question, checkpoint: Checkpoint | None, dtype: torch.dtype, tell: Tell
) -> ParityResult:
    """The answer in the dtype that was asked for."""
    prepared = _prepare(question, checkpoint, dtype, tell)
    found = _compare(question, prepared, tell)
    generation, unheard = None, []
    if question.layers is None and question.inputs is None:
        tell("generate")
        try:
            generation = compare_generation(
                prepared.sides.port,
                prepared.sides.reference,
                prepared.prompt,
                prepared.num_tokens,
            )
        except CannotRun as reason:
            unheard.append(NotVerified("generation", str(reason)))
    gradients = None
    if question.backward and prepared.sides.are_ours:
        tell("backward")
        gradients = _differentiate(question, prepared)
    return ParityResult(
        (found,),
        generation,
        (*_not_verified(question, prepared), *found.not_verified, *unheard),
        (*prepared.sides.notes(), *found.notes),
        gradients,
    )


def _care(
    question: Question, checkpoint: Checkpoint | None, tell: Tell, known: frozenset[str]
) -> Comparison:
    """Again in bfloat16; of a complete probe the passes that run every module, near and far."""
    prepared = _prepare(question, checkpoint, CARE, tell)
    return _compare(question, replace(prepared, probe=_care_probe(prepared.probe)), tell, known)


def _care_probe(probe: Probe) -> Probe:
    if not probe.is_complete:
        return probe
    passes = tuple(one for one in probe if one.name in _CARE_PASSES)
    return Probe("bfloat16", passes or probe.passes)


def _prepare(
    question: Question, checkpoint: Checkpoint | None, dtype: torch.dtype, tell: Tell
) -> _Prepared:
    tell(f"load in {_word(dtype)}")
    sides = make_sides(question, checkpoint, dtype)
    traits = sides.traits
    if question.inputs is not None:
        return _Prepared(checkpoint, sides, named_probe(question.inputs, dtype), [], 0)
    probe = question.choose_probe(traits, None if checkpoint is None else checkpoint.files)
    check_fits(probe, traits.vocab_size, traits.max_positions)
    prompt, num_tokens = _prompt(checkpoint, traits, probe)
    for side in (sides.port, sides.reference):
        if isinstance(side, PortSide):
            side.length = max(probe.longest, len(prompt) + num_tokens)
    if not sides.are_ours:  # whoever reads the head of all tokens makes other matrices of it
        probe = replace(probe, passes=tuple(replace(one, num_logits=None) for one in probe))
    return _Prepared(checkpoint, sides, probe, prompt, num_tokens)


def _compare(
    question: Question, prepared: _Prepared, tell: Tell, known: frozenset[str] = frozenset()
) -> Comparison:
    """`known`: fields of the config that need not be moved again."""
    sides, table = prepared.sides, prepared.sides.table
    moved, faults = _moved(question, prepared.probe), chosen(question.faults)
    if sides.are_ours:
        share_parameters(sides.port, sides.reference)
    if not (isinstance(sides.reference, Reference) and sides.are_ours and faults):
        return compare(sides.port, sides.reference, table, moved, tell)
    matrix = KillMatrix(sides.reference, table, moved, question.gate, faults)
    fields = _config_moves(prepared, table, moved, known)
    found = compare(sides.port, sides.reference, table, moved, tell, (matrix, fields))
    return replace(found, fates=matrix.fates(), config=fields.found(), kinds=matrix.kinds)


def _config_moves(
    prepared: _Prepared, table: SiteTable, probe: Probe, known: frozenset[str]
) -> ConfigMoves:
    model = prepared.sides.port.model
    assert isinstance(model, CausalLM), "our own"
    assert prepared.sides.blueprint is not None, "our own"
    return ConfigMoves(prepared.sides.blueprint, model, table, probe, known)


def _differentiate(question: Question, prepared: _Prepared) -> GradientParity:
    port, reference = prepared.sides.port, prepared.sides.reference
    assert isinstance(port, PortSide), "our own"
    assert isinstance(reference, Reference), "nothing else stands in its place"
    input_ids = training_batch(port.model).to(resolve_device(question.device))
    return compare_gradients(port, reference, prepared.sides.table, input_ids)


def _moved(question: Question, probe: Probe) -> Probe:
    device = resolve_device(question.device)
    return replace(probe, passes=tuple(one.to(device) for one in probe))


def _prompt(checkpoint: Checkpoint | None, traits: Traits, probe: Probe) -> tuple[list[int], int]:
    """A prompt of one's own, or words, and how many tokens to generate after it.

    After random tokens a model ends in repeating one.
    """
    context = traits.max_positions or probe.longest + NUM_TOKENS
    first = next(iter(probe))
    prompt = first.input_ids[-1, first.real[-1]].tolist()
    if probe.name != "prompt" and checkpoint is not None:
        with suppress(PortkitError):  # a checkpoint need not have a tokenizer
            words = Tokenizer.open(checkpoint.files).encode(_OPENING)
            prompt = words if words and max(words) < traits.vocab_size else prompt
    num_tokens = max(1, min(NUM_TOKENS, context // 2))
    return prompt[: max(1, context - num_tokens)], num_tokens


def _not_verified(question: Question, prepared: _Prepared) -> Iterator[NotVerified]:
    if question.inputs is not None:
        yield from map(_without_tokens, _OF_TOKENS)
        return
    yield from unexercised(prepared.sides.traits, prepared.probe)
    blueprint = prepared.sides.blueprint
    for key in () if blueprint is None else blueprint.ignored:
        yield NotVerified(f"config: {key}", "not understood, and ignored on request")
    if question.faults != "off" and not prepared.sides.are_ours:
        yield NotVerified("known faults", "they are tried where both sides show every site")
    if question.backward and not prepared.sides.are_ours:
        yield NotVerified("gradients", "they are compared where both sides show every parameter")
    if question.layers is not None:
        named = f"{question.layers.start} to {question.layers.stop - 1}"
        yield NotVerified(
            f"everything but the layers {named}", "--layers left it out, and generation with it"
        )


def _without_tokens(name: str) -> NotVerified:
    return NotVerified(name, "not asked: it needs tokens, and the model was given named inputs")


@contextmanager
def memory_watched() -> Iterator[None]:
    """Where memory runs out, say what takes less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        said = str(error)
        reason = said.splitlines()[0] if said else "no reason given"
        raise OutOfMemory(
            f"memory ran out ({reason:.120}): try --layers 0-3, --quick, or a smaller --dtype"
        ) from error


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
