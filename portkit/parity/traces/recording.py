"""Recording a trace: one side runs a probe, and what it had at each site goes into a file.

Of the reference, or of the port where there is none. Knows which sites and tokens are kept, and
how the floors are measured that stand beside them: as a proof measures them, and once more over the
whole way from the tokens, for those who cannot judge locally.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from portkit.checkpoint import CONFIG, Checkpoint, Files
from portkit.errors import TraceError
from portkit.loading import draw, materialize, open_checkpoint, resolve_dtype
from portkit.parity.comparing import Tell, groups
from portkit.parity.judging.free_truth import FreeTruth
from portkit.parity.judging.judge import channel_floors, floor_of, pool_width, relative
from portkit.parity.judging.ledger import Distance, Ledger, squares_of
from portkit.parity.judging.local import Calls, Recording, Trace, calls_kept, recorder
from portkit.parity.judging.precision import ran_out_of_memory
from portkit.parity.judging.truth import Truth
from portkit.parity.judging.whole import WholeTruth
from portkit.parity.probes.probe import Pass, Probe, as_json, check_fits
from portkit.parity.prove import memory_watched
from portkit.parity.question import Question, check_layers
from portkit.parity.reference import Reference, load_reference
from portkit.parity.sides.port import PortSide
from portkit.parity.sides.routing import EXPERTS
from portkit.parity.sides.sites import LOGITS, CannotRun, Side, SiteTable, watching
from portkit.parity.subject.dims import apart, is_steady, rows, sizes, token_dim
from portkit.parity.subject.discovery import discover
from portkit.parity.subject.traits import traits_of
from portkit.parity.traces.trace_file import Provenance, RecordedFloor, description_of, names
from portkit.parity.traces.trace_writer import TraceWriter, new_trace
from portkit.registry import is_ported

TRANSFORMERS, PORTKIT = "transformers", "portkit"
"""Engines: the reference, and our port."""
_DIGITS, _CHANNEL_DIGITS = 6, 3
"""Of a floor and of a channel's: enough to judge by, and a channel is a number in a header."""


@dataclass(frozen=True)
class Keep:
    """What of a run goes into a trace."""

    patterns: tuple[str, ...] = ()
    """Of sites, with `*`; none: all."""
    last_tokens: int | None = None
    """Of each pass; None: all."""
    inputs: bool = False
    """The inputs of modules too, so that errors can be judged where they are made."""
    floors: bool = True

    def site(self, name: str) -> bool:
        """Whether a site is kept. An input is if it is asked for by name, or all are."""
        base, _, role = name.partition(":")
        if role and self.inputs and any(fnmatchcase(base, one) for one in self.patterns or "*"):
            return True
        return any(fnmatchcase(name, one) for one in self.patterns or ("*",)) and (
            not role or any(":" in one for one in self.patterns)
        )

    @property
    def is_whole(self) -> bool:
        """Every site's output at every token."""
        return not self.patterns and self.last_tokens is None

    def tokens(self, tensor: Tensor, dims: str, one: Pass) -> Tensor:
        """The last tokens of a site."""
        place = token_dim(dims)
        if place is None or self.last_tokens is None:
            return tensor
        tensor = apart(tensor, dims, one)
        kept = min(self.last_tokens or tensor.shape[place], tensor.shape[place])
        return tensor.narrow(place, tensor.shape[place] - kept, kept)


@dataclass
class Recorded:
    """What was recorded, beside the file."""

    sites: dict[str, str] = field(default_factory=dict)
    floors: dict[str, RecordedFloor] | None = None
    not_finite: list[str] = field(default_factory=list)
    """Sites with NaN at a real token, as `PASS/SITE`."""
    refused: dict[str, str] = field(default_factory=dict)
    """Passes that the side does not run, and why."""


class Recorder:
    """Runs one side over a probe and writes what it had."""

    def __init__(
        self,
        side: Side,
        table: SiteTable,
        keep: Keep,
        writer: TraceWriter,
        truth: type[Truth | WholeTruth] = Truth,
    ) -> None:
        self._side, self._table, self._keep, self._writer = side, table, keep, writer
        self._caches: dict[str, Any] = {}
        self.cache: str | None = None
        """The kind of cache that the side made."""
        self._ledger = Ledger(table, ())
        self._truth = truth(side, side, table, self._ledger)
        self._free: FreeTruth | None = FreeTruth(side, table, whole=truth is WholeTruth)
        self._carried: defaultdict[str, Distance] = defaultdict(Distance)
        self._free_truth: defaultdict[str, Distance] = defaultdict(Distance)
        self.found = Recorded()

    @torch.no_grad()
    def run(self, probe: Probe, tell: Tell, expect: Callable[[int], None]) -> Recorded:
        """Record every pass. `expect` is told about how many bytes it will be, after the first."""
        continued, told = {one.continues for one in probe}, False
        for group in groups(probe):
            recordings = []
            for one in group:
                tell(one.name)
                try:
                    recording = self._record(one, probe.past(one))
                except CannotRun as reason:
                    self.found.refused[one.name] = str(reason)
                    continue
                if not told:
                    told = True
                    expect(self._estimate(recording, probe))
                recordings.append(recording)
                if one.name not in continued:
                    self._caches.pop(one.name, None)
            if self._keep.floors and recordings:
                tell(f"{group[-1].name} in float64")
                self._measure(recordings)
        if not told:
            reasons = "; ".join(dict.fromkeys(self.found.refused.values()))
            raise TraceError(f"no pass was recorded: the model does not run ({reasons})")
        if self._keep.floors:
            self.found.floors = {
                name: floor for name in self.found.sites if (floor := self._floor(name))
            }
        return self.found

    def _record(self, one: Pass, num_past: int) -> Recording:
        trace: Trace = {}
        with (
            watching(self._side, self._table, recorder(trace)),
            calls_kept(self._side, self._table) as calls,
        ):
            logits = self._side.run(one, self._caches)
        left = self._caches.get(one.name)
        self.cache = self.cache if left is None else type(left).__name__
        if self._table.dims(LOGITS) is not None:
            trace[LOGITS] = logits
        for name in filter(self._keep.site, trace):
            dims = self._ledger.site(name).dims
            self.found.sites.setdefault(name, dims)
            if trace[name].is_floating_point() and bool(rows(trace[name], dims, one).isnan().any()):
                self.found.not_finite.append(f"{one.name}/{name}")
            self._writer.add(f"{one.name}/{name}", self._keep.tokens(trace[name], dims, one))
        if not self.found.sites:
            raise TraceError(
                f"no site matches {', '.join(self._keep.patterns)}; there are {names(trace)}"
            )
        return Recording(one, trace, calls, Calls(), num_past, seen=set(trace))

    def _estimate(self, recording: Recording, probe: Probe) -> int:
        """Bytes of all passes, by the first one's sites: what is cached counts to the full."""
        total, first = 0, recording.run
        for name, dims in self.found.sites.items():
            tensor = recording.trace[name]
            words, shape = dims.split(), sizes(tensor.shape, dims, first)
            assert shape is not None, f"{name} was measured"
            for one in probe:
                past = probe.past(one)
                reach = past if name.endswith(("#key", "#value")) else 0
                size = tensor.itemsize
                for word, had in zip(words, shape, strict=True):
                    if word == "batch" and had == len(first.input_ids):
                        size *= len(one.input_ids)
                    elif word in {"position", "query"}:
                        head = name == LOGITS or name.startswith("lm_head")
                        tokens = (one.num_logits if head else None) or one.num_tokens + reach
                        size *= min(tokens, self._keep.last_tokens or tokens)
                    else:
                        size *= one.num_tokens + past if word == "key" else had
                total += size
        return total

    def _measure(self, recordings: list[Recording]) -> None:
        for each in recordings:
            one, trace = each.run, each.trace

            def add(name: str, truth: Tensor, one: Pass = one, trace: Trace = trace) -> None:
                if truth.shape != trace[name].shape:  # experts that take other turns in float64
                    return
                dims = self._ledger.site(name).dims
                held = rows(truth, dims, one)
                gap = squares_of(rows(trace[name], dims, one), held)
                self._carried[name].add(gap, len(held))
                self._free_truth[name].add(squares_of(held), len(held))

            self._run_freely(one, trace, add)
            if isinstance(self._truth, Truth):
                trace.pop(LOGITS, None)  # given its input it has no truth; the head has
        self._truth.judge(recordings)

    def _run_freely(self, one: Pass, trace: Trace, add: Callable[[str, Tensor], None]) -> None:
        """Where the model does not run in float64 there is no truth to be carried from."""
        if self._free is None:
            return
        try:
            self._free.run(one, trace, add)
        except (CannotRun, RuntimeError, TypeError) as error:
            if isinstance(self._truth, Truth) or ran_out_of_memory(error):
                raise
            self._free = None
            self._carried.clear()
            self._free_truth.clear()

    def _floor(self, name: str) -> RecordedFloor | None:
        account = self._ledger.site(name)
        carried = relative(self._carried[name], self._free_truth[name])
        rms = floor_of(account)
        if rms is None and carried is None:  # a mask
            return None
        if carried is None:  # a rotary table: nothing comes before it
            carried = rms
        channels, pooled = None, 1
        if rms is not None and self._keep.is_whole and is_steady(account.dims):
            pooled = pool_width(account.truth)
            channels = tuple(
                _rounded(one, _CHANNEL_DIGITS) for one in channel_floors(account).tolist()
            )
        return RecordedFloor(
            None if rms is None else _rounded(rms, _DIGITS),
            channels,
            pooled,
            None if carried is None else _rounded(carried, _DIGITS),
        )


def _rounded(value: float, digits: int) -> float:
    """A number as a header holds it; none where the truth is zero."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else 0.0


@dataclass(frozen=True)
class Order:
    """What is to be recorded, and by what."""

    question: Question
    engine: str = TRANSFORMERS
    keep: Keep = Keep()
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the packages that the values may depend on."""


def record(
    order: Order,
    path: Path,
    tell: Tell = lambda _: None,
    expect: Callable[[int], None] = lambda _: None,
) -> Recorded:
    """Record a checkpoint's trace into `path`, whole or not at all.

    `tell` is given a line for each step, `expect` about how many bytes it will be. Raises a
    `PortkitError` on bad input.
    """
    question = order.question
    with new_trace(path) as writer, memory_watched():
        tell("load")
        checkpoint = open_checkpoint(question.repo, question.revision)
        dtype = resolve_dtype(question.dtype, checkpoint)
        side = _side(order, checkpoint, dtype)
        traits = traits_of(side.model)
        check_layers(question, traits.num_layers)
        probe = question.choose_probe(traits, checkpoint.files)
        check_fits(probe, traits.vocab_size, traits.max_positions)
        if isinstance(side, PortSide):
            side.length = probe.longest
        table = discover(side, traits).of_layers(question.layers)
        truth = Truth if is_ported(checkpoint.config) else WholeTruth
        recorder_ = Recorder(side, table, order.keep, writer, truth)
        device = side.device
        found = recorder_.run(
            replace(probe, passes=tuple(p.to(device) for p in probe)), tell, expect
        )
        ran = tuple(one for one in probe if one.name not in found.refused)
        provenance = Provenance(
            model=_name(question.repo),
            engine=order.engine,
            dtype=str(dtype).removeprefix("torch."),
            revision=getattr(checkpoint.files, "commit", question.revision),
            config_sha256=config_digest(checkpoint.files),
            attention=question.attention,
            experts=_experts(side, found.sites),
            cache=recorder_.cache,
            cast="on load",
            device=device.type,
            threads=torch.get_num_threads(),
            versions=order.versions,
        )
        writer.description = description_of(
            provenance,
            as_json(replace(probe, passes=ran)),
            found.sites,
            found.floors,
            order.keep.last_tokens,
            is_whole=order.keep.is_whole and question.layers is None and not found.refused,
        )
    return found


def config_digest(files: Files) -> str:
    """The SHA-256 of the bytes of `config.json`."""
    return hashlib.sha256(files.path(CONFIG).read_bytes()).hexdigest()


def _side(order: Order, checkpoint: Checkpoint, dtype: torch.dtype) -> PortSide | Reference:
    question = order.question
    if order.engine == PORTKIT:
        blueprint = draw(checkpoint, question.attention, question.ignore_config)
        word = str(dtype).removeprefix("torch.")
        return PortSide(materialize(blueprint, word, question.device).model)
    for file in checkpoint.weight_files:
        checkpoint.files.path(file)  # a repository's are fetched
    folder = checkpoint.files.path(CONFIG).parent
    return load_reference(folder, dtype, question.attention, question.device)


def _experts(side: Side, sites: Mapping[str, str]) -> str | None:
    """The form in which the reference runs its experts, where it has any."""
    has_experts = any(site.endswith(EXPERTS) for site in sites)
    return side.experts if has_experts and isinstance(side, Reference) else None


def _name(repo: str | Path) -> str:
    """A repository's id, or a folder's own name: its path is nobody's business."""
    return Path(repo).resolve().name if Path(repo).is_dir() else str(repo)
