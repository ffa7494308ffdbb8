"""The question of parity from Python: in a notebook, or in a porter's own tests.

    result = portkit.parity.compare(model, "google/gemma-3-270m", sites=PAIRS)
    result.verdict, result.culprits, result.report("report")

Knows what a user has at hand, a model, a factory, its name, and turns it into a `Question`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import torch
from torch import nn

from portkit.envelope import envelope
from portkit.errors import PortError, ProbeError, SiteError
from portkit.json_reading import read_text
from portkit.parity.judging.judge import Judgement, Verdict
from portkit.parity.probes import probing
from portkit.parity.probes.probe import Probe
from portkit.parity.prove import prove
from portkit.parity.question import Question
from portkit.parity.reports import report, schema, summary
from portkit.parity.result import ParityResult
from portkit.shown import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from portkit.loading import Blueprint

Port = nn.Module | Callable[..., Any] | str | None
_PROBES = {
    "default": probing.default_probe,
    "quick": probing.quick_probe,
    "thorough": probing.thorough_probe,
}


class Options(TypedDict, total=False):
    """What else may be asked; words are the command's."""

    reference: Port
    """Stands in the reference's place; None: Transformers."""
    probe: str | Sequence[int] | Probe
    """default, quick, thorough, token ids, or a probe."""
    gate: Literal["exact", "rounding"]
    """What passes: rounding, or for our own port on the CPU exact, where nothing is said."""
    sites: str | Path
    """A table of site pairs, or the file that it is in."""
    dtype: str
    """auto: the model's own where one is given, else the checkpoint's."""
    device: str
    attention: str
    """sdpa or eager, of both sides where they are ours and Transformers."""
    layers: range
    threads: int
    revision: str
    ignore_config: tuple[str, ...]


@dataclass(frozen=True)
class Result(ParityResult):
    """A parity result that knows what was asked: it prints, shows and writes itself."""

    repo: str = ""
    gate: str = "rounding"
    device: str = "cpu"
    threads: int = 1

    @property
    def culprits(self) -> tuple[Judgement, ...]:
        """Sites that diverged where they are made, in order of execution, in each dtype."""
        return tuple(one for each in self.comparisons for one in each.culprits)

    @property
    def holds(self) -> bool:
        """Whether the gate lets it pass."""
        return self.verdict is Verdict.exact or (
            self.verdict is Verdict.rounding and self.gate == Verdict.rounding
        )

    def report(self, directory: str | Path) -> Path:
        """Write report.html, parity.json, junit.xml and summary.md; returns the page's path."""
        surroundings = {"gate": self.gate, "device": self.device, "threads": self.threads}
        printed = envelope("parity", **surroundings, **schema.as_fields(self))
        command = f"portkit.parity.compare(…, {self.repo!r})"
        report.write(Path(directory), self, report.Asked(self.repo, command, printed))
        return Path(directory) / "report.html"

    def __str__(self) -> str:
        first = shown(f"{self.verdict}: {self.repo}, gate {self.gate}")
        return "\n".join([first, *summary.text(self)])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def compare(port: Port, repo: str | Path, **options: Unpack[Options]) -> Result:
    """Hold a port against the reference, at every site that both have.

    `port`: a model or another callable `(input_ids, positions, attention_mask, cache=None)`, one of
    portkit's own models, the name of a factory as `module:factory`, or None for our own port.
    `repo`: the checkpoint's folder or its name on the Hub. Raises a `PortkitError` on bad input.
    """
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"compare() takes no {', '.join(sorted(unknown))}")
    reference = options.get("reference")
    device = options.get("device", "cpu")
    dtype = options.get("dtype", "auto")
    if dtype == "auto" and isinstance(port, nn.Module):
        dtype = _dtype_of(port)
    of_ours = port is None and reference is None
    gate = options.get("gate") or ("exact" if of_ours and device == "cpu" else "rounding")
    question = Question(
        repo,
        revision=options.get("revision"),
        dtype=dtype,
        device=device,
        attention=options.get("attention", "sdpa"),
        layers=options.get("layers"),
        ignore_config=options.get("ignore_config", ()),
        gate=gate,
        faults="off",
        choose_probe=_choice(options.get("probe", "default")),
        port=_given(port),
        reference=_given(reference),
        sites=_table(options.get("sites")),
        is_made=any(not isinstance(one, str | None) for one in (port, reference)),
    )
    with _threads(options.get("threads", 1)):
        found = prove(question)
        known = {one.name: getattr(found, one.name) for one in fields(found)}
        return Result(
            **known, repo=str(repo), gate=gate, device=device, threads=torch.get_num_threads()
        )


def assert_parity(port: Port, repo: str | Path, **options: Unpack[Options]) -> Result:
    """Fail with the report where the gate does not let `compare(port, repo, …)` pass."""
    __tracebackhide__ = True  # to pytest: the line that matters is the caller's
    result = compare(port, repo, **options)
    if not result.holds:
        raise AssertionError(str(result))
    return result


def _given(port: Port) -> Any:
    """What is made already, as a factory of it; names as they are."""
    if port is None or isinstance(port, str):
        return port
    if not callable(port):
        raise PortError(f"{port!r:.60} is no port: give a model, a callable, or module:factory")

    def made(*_: object) -> Any:
        return port

    made.__name__ = type(port).__name__
    sites = getattr(port, "sites", "")
    made.sites = sites if isinstance(sites, str) else ""  # type: ignore[attr-defined]
    return made


def _dtype_of(model: nn.Module) -> str:
    held = next((one.dtype for one in model.parameters() if one.is_floating_point()), None)
    return "auto" if held is None else str(held).removeprefix("torch.")


def _choice(probe: str | Sequence[int] | Probe) -> Callable[[Blueprint], Probe]:
    if isinstance(probe, Probe):
        return lambda _: probe
    if isinstance(probe, str):
        if probe not in _PROBES:
            raise ProbeError(f"probe {probe!r}: choose one of {', '.join(_PROBES)}, or token ids")
        return lambda drawn: _PROBES[probe](drawn.skeleton)
    return lambda _: probing.probe_of_tokens("tokens", probe)


def _table(sites: str | Path | None) -> str | None:
    if isinstance(sites, Path):
        return read_text(sites, f"{sites} with its site pairs", SiteError)
    return sites


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads, on which bits depend, and then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
