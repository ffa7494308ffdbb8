"""A proof against a recording: the port runs, the reference is a file, and Transformers not needed.

Where the recording holds what went into each module, the port is taught by it and judged where an
error is made; else errors are carried and judged as such. The truth that a proof has from the
reference in float64 is the port's own here, which is the same as long as both compute the same
function. Whether they do, the recording tells: it must lie as close to that truth as its floor
says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from portkit.errors import TraceError, UnsupportedConfig
from portkit.loading import COMPUTE_DTYPES, LoadedModel, draw, materialize, open_checkpoint
from portkit.parity.comparing import Comparing, Tell, groups
from portkit.parity.judging.carried import CarriedErrors
from portkit.parity.judging.judge import Judgement, Verdict, judge
from portkit.parity.judging.ledger import Distance, SiteAccount
from portkit.parity.judging.local import Calls, Recording, Trace
from portkit.parity.probes.probe import Pass, check_fits
from portkit.parity.probes.probing import unexercised
from portkit.parity.prove import CARE, memory_watched
from portkit.parity.question import Question, check_layers
from portkit.parity.result import Comparison, NotVerified, ParityResult
from portkit.parity.sides.port import PortSide
from portkit.parity.sides.sites import LOGITS, SiteTable, watching
from portkit.parity.subject.dims import rows
from portkit.parity.subject.discovery import sites_of
from portkit.parity.traces.recording import PORTKIT, config_digest
from portkit.parity.traces.trace_diff import CARRIED
from portkit.parity.traces.trace_file import RecordedFloor, TraceFile, names
from portkit.registry import is_ported


@dataclass(frozen=True)
class _Held:
    """The port, and what of a recording it is held against."""

    trace: TraceFile
    loaded: LoadedModel
    side: PortSide
    table: SiteTable
    why_carried: str | None
    """Why errors cannot be judged where they are made; None where they can."""


def prove_by(trace: TraceFile, question: Question, tell: Tell = lambda _: None) -> ParityResult:
    """Hold our port against a recording, on the recording's probe and in its dtype.

    Raises `TraceError` where the recording is of another model, or holds nothing to compare.
    """
    with memory_watched():
        tell("load")
        held = _prepare(trace, question)
        seen: set[str] = set()
        if held.why_carried is None:
            comparison = _compare_locally(held, seen, tell)
        else:
            comparison = _compare_carried(held, seen, tell)
    not_verified = (
        *unexercised(held.loaded.model, trace.probe),
        *_never_shown(held),
        *_left_out(held, seen, question),
    )
    if comparison.verdict is Verdict.rounding and held.why_carried is not None:
        not_verified = (*not_verified, CARRIED)
    notes = (*held.loaded.report.notes, *_notes(trace))
    return ParityResult((comparison,), None, not_verified, notes)


def _prepare(trace: TraceFile, question: Question) -> _Held:
    said = trace.provenance
    if said.dtype not in COMPUTE_DTYPES:
        raise TraceError(
            f"{trace} is in {said.dtype!r:.40}; the port runs in {', '.join(COMPUTE_DTYPES)}"
        )
    if question.dtype not in {"auto", said.dtype}:
        raise TraceError(
            f"{trace} was recorded in {said.dtype}: leave --dtype {question.dtype} out, or record "
            "in that dtype"
        )
    checkpoint = open_checkpoint(question.repo, question.revision)
    if not is_ported(checkpoint.config):
        raise UnsupportedConfig(
            f"config.json: model_type is {checkpoint.config.get('model_type')!r:.60}, of which "
            "there is no port here to hold against a recording: record yours too (docs/traces.md), "
            "and hold it against this one by portkit diff"
        )
    blueprint = draw(checkpoint, question.attention, question.ignore_config)
    check_layers(question, blueprint.config.num_hidden_layers)
    digest = config_digest(checkpoint.files)
    if said.config_sha256 not in {None, digest}:
        raise TraceError(
            f"{trace} was recorded of {said.model!r:.60}, whose config.json has sha256 "
            f"{said.config_sha256:.12}…, and that of {question.repo} has {digest:.12}…: give the "
            "checkpoint that was recorded, or record this one"
        )
    config = blueprint.config
    check_fits(trace.probe, config.vocab_size, config.max_position_embeddings)
    loaded = materialize(blueprint, said.dtype, question.device)
    table = sites_of(loaded.model).of_layers(question.layers)
    known = [site for site in trace.sites if table.dims(site) is not None]
    if not known:
        raise TraceError(
            f"{trace} has no site of this model: it holds {names(trace.sites)}; docs/traces.md "
            "says how sites are spelled"
        )
    for site in known:
        if trace.sites[site] != table.dims(site):
            raise TraceError(
                f"{trace}: {site} has the dims {trace.sites[site]!r:.60} where the model has "
                f"{table.dims(site)!r}; record it again"
            )
    side = PortSide(loaded.model, trace.probe.longest)
    return _Held(trace, loaded, side, table, _why_carried(trace, side, table))


def _why_carried(trace: TraceFile, side: PortSide, table: SiteTable) -> str | None:
    if not trace.has_inputs:
        return "the recording has no inputs of modules (record --inputs)"
    if trace.last_tokens is not None:
        return "the recording keeps the last tokens alone"
    modules = [name for name in side.module_sites() if table.dims(name) is not None]
    missing = [name for name in modules if name not in trace.sites]
    return f"the recording leaves out {names(missing)}" if missing else None


def _read(trace: TraceFile, one: Pass, site: str) -> Tensor:
    """A recorded site. Raises `TraceError` where a real token has NaN: nothing equals it."""
    tensor = trace.read(one, site)
    dims = trace.sites[site]
    if tensor.is_floating_point() and bool(rows(tensor, dims, one).isnan().any()):
        raise TraceError(
            f"{trace} holds NaN at {site} in {one.name}: nothing can be held against it; record a "
            "sound model"
        )
    return tensor


# -- carried -------------------------------------------------------------------------------------


@torch.no_grad()
def _compare_carried(held: _Held, seen: set[str], tell: Tell) -> Comparison:
    trace, errors = held.trace, CarriedErrors()
    for site, dims in trace.sites.items():
        if held.table.dims(site) is not None:
            errors.account(site, dims)
    caches: dict[str, object] = {}
    device = next(held.loaded.model.parameters()).device
    for one in trace.probe:
        tell(one.name)
        here: set[str] = set()

        def look(name: str, ours: Tensor, one: Pass = one, here: set[str] = here) -> Tensor:
            seen.add(name)
            if trace.shape(one, name) is not None:
                here.add(name)
                pair = ours.cpu(), _read(trace, one, name)
                errors.hold(one, name, trace.sites[name], pair)
            return ours

        with watching(held.side, held.table, look):
            logits = held.side.run(one.to(device), caches)
        if held.table.dims(LOGITS) is not None:
            look(LOGITS, logits)
        for site in trace.recorded(one):
            if site in errors.accounts and site not in here:
                errors.accounts[site].missing = True
    left_out = [name for name in _outputs(seen) if name not in errors.accounts]
    judgements = errors.judge(trace.floors, trace.is_whole, left_out)
    return Comparison(trace.provenance.dtype, trace.probe, judgements, errors.accounts)


def _outputs(sites: set[str]) -> list[str]:
    """The sites that a recording without inputs has."""
    return sorted(site for site in sites if ":in" not in site)


# -- local ---------------------------------------------------------------------------------------


def _compare_locally(held: _Held, seen: set[str], tell: Tell) -> Comparison:
    trace, side = held.trace, held.side
    device = next(held.loaded.model.parameters()).device
    probe = replace(trace.probe, passes=tuple(one.to(device) for one in trace.probe))
    comparing = Comparing(side, side, held.table, probe)
    for group in groups(probe):
        for one in group:
            tell(one.name)
            recorded: Trace = {
                site: _read(trace, one, site).to(device)
                for site in trace.recorded(one)
                if held.table.dims(site) is not None
            }
            recording = Recording(one, recorded, Calls(), Calls(), probe.past(one))
            comparing.hold(recording)
            seen |= recording.seen
            # Its own blocks are run in float64, on what was recorded: that is the truth here.
            recording.reference_calls, recording.port_calls = recording.port_calls, Calls()
        tell(f"{group[-1].name} in float64")
        comparing.judge()
    accounts = comparing.ledger.sites
    judgements = tuple(
        _judge(account, (trace.floors or {}).get(account.name), side.attention)
        for account in accounts.values()
    )
    return Comparison(trace.provenance.dtype, probe, judgements, accounts)


def _judge(account: SiteAccount, floor: RecordedFloor | None, kernel: str) -> Judgement:
    """The two questions of a site, with the port's own float64 for the truth.

    *Same care*: the port's distance from it is within the recorded floor, as in a proof. *Same
    function*: so is the recording's; where both are the same function that is the floor itself.
    """
    recorded = account.floors.pop(kernel, Distance())
    account.function_asked = False
    if floor is not None and floor.rms is not None and account.truth.per_channel is not None:
        account.floors["recorded"] = _as_distance(floor, account.truth)
    found = judge(account)
    if found.verdict is Verdict.exact or not account.unequal:
        return found
    if not account.floors:
        # Of a mask, or of logits made of equal heads, only equal is right; else rounding may be.
        unjudged = account.truth.per_channel is not None
        return replace(found, verdict=Verdict.inconclusive, kind=None) if unjudged else found
    if judge(replace(account, port=recorded)).verdict is Verdict.diverged:
        kind = "glue" if account.is_glue else "function"
        return replace(found, verdict=Verdict.diverged, kind=kind)
    return found


def _as_distance(floor: RecordedFloor, truth: Distance) -> Distance:
    """A recorded floor as sums of squares, of the tokens that the truth was summed over."""
    assert truth.per_channel is not None, "asked of a site with a truth"
    assert floor.rms is not None, "asked of a floor at a site"
    relative = torch.full_like(truth.per_channel, floor.rms)
    if floor.channels is not None:
        each = torch.tensor(floor.channels, dtype=relative.dtype, device=relative.device)
        relative = each.repeat_interleave(floor.pooled)[: len(relative)]
    return Distance(relative * relative * truth.per_channel, truth.num_rows)


# -- what a recording cannot show ----------------------------------------------------------------


def _never_shown(held: _Held) -> Iterator[NotVerified]:
    trace = held.trace
    dtype = trace.provenance.dtype
    yield NotVerified("the same function in float64", f"the recording is in {dtype}")
    yield NotVerified("parameters", "the recording has none: what they make is compared")
    yield NotVerified("generation", "it takes the recorded model to go on")
    yield NotVerified("known faults", "they are tried where the reference runs")
    if COMPUTE_DTYPES[dtype] != CARE:
        yield NotVerified("care in bfloat16", f"the recording is in {dtype}")
    if held.why_carried is not None:
        yield NotVerified("where errors are made", held.why_carried)
    if trace.provenance.engine == PORTKIT:
        yield NotVerified("the recording", "it is of portkit's own port: it shows what has changed")
    if trace.provenance.config_sha256 is None:
        yield NotVerified("the config", "the recording does not say of which it is")
    if trace.floors is None:
        yield NotVerified("what is rounding", "the recording has no floors")


def _left_out(held: _Held, seen: set[str], question: Question) -> Iterator[NotVerified]:
    trace = held.trace
    expected = sorted(seen) if trace.has_inputs else _outputs(seen)
    unseen = [site for site in expected if site not in trace.sites]
    if unseen:
        yield NotVerified(f"sites {names(unseen)} ({len(unseen)})", "the recording has not")
    foreign = [site for site in trace.sites if held.table.dims(site) is None]
    if foreign and question.layers is None:
        yield NotVerified(f"sites {names(foreign)} ({len(foreign)})", "only the recording has them")
    if trace.last_tokens is not None:
        yield NotVerified(
            "all but the last tokens", f"the recording keeps {trace.last_tokens} of each pass"
        )
    for key in held.loaded.blueprint.ignored:
        yield NotVerified(f"config: {key}", "not understood, and ignored on request")
    if question.layers is not None:
        named = f"{question.layers.start} to {question.layers.stop - 1}"
        yield NotVerified(f"everything but the layers {named}", "--layers left it out")


def _notes(trace: TraceFile) -> Iterator[str]:
    said = trace.provenance
    version = said.versions.get(said.engine)
    yield f"held against {trace.path.name}, a recording of {said.model} by {said.engine}" + (
        f" {version}" if version else ""
    )
    if said.threads not in {None, torch.get_num_threads()}:
        yield f"recorded with {said.threads} threads, which can move the last bit"
