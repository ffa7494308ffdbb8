"""The question of parity from Python: in a notebook, or in a porter's own tests.

    result = portkit.parity.compare(model, "google/gemma-3-270m", sites=PAIRS)
    result.verdict, result.first, result.causes, result.report("report")

Knows what a user has at hand, a model, a factory, its name, and turns it into a `Question`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import torch
from torch import Tensor, nn

from portkit.envelope import envelope
from portkit.errors import PortError, ProbeError, SiteError
from portkit.parity.judging.judge import Judgement, Verdict
from portkit.parity.probes import probing
from portkit.parity.probes.named import checked, read_inputs
from portkit.parity.probes.probe import Probe
from portkit.parity.prove import prove
from portkit.parity.question import Question
from portkit.parity.reports import report, schema, summary
from portkit.parity.result import ParityResult
from portkit.parity.teeth.diagnose import Cause
from portkit.parity.traces.golden import prove_by
from portkit.parity.traces.trace_file import TraceFile
from portkit.shown import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from portkit.checkpoint import Files
    from portkit.parity.decoding.proof import DecodeParity
    from portkit.parity.subject.traits import Traits

Port = nn.Module | Callable[..., Any] | str | None
Choice = str | Sequence[int] | Probe
_Asked = ParamSpec("_Asked")
_PROBES = {
    "default": probing.default_probe,
    "quick": probing.quick_probe,
    "thorough": probing.thorough_probe,
}


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
    def first(self) -> Judgement | None:
        """The first culprit; None where there is none."""
        return next(iter(self.culprits), None)

    @property
    def causes(self) -> dict[str, Cause]:
        """Why a site differs, as far as it is known, by its name; the first dtype's word counts."""
        return {
            site: cause
            for each in reversed(self.comparisons)
            for site, cause in each.causes.items()
        }

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


def compare(  # noqa: PLR0913  # one name for each thing that may be asked
    port: Port,
    repo: str | Path | nn.Module | Callable[..., Any],
    *,
    reference: Port = None,
    sites: str | Path | None = None,
    probe: Choice = "default",
    seed: int = 0,
    gate: Literal["exact", "rounding"] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    attention: Literal["sdpa", "eager"] = "sdpa",
    reference_attention: Literal["sdpa", "eager"] | None = None,
    layers: range | None = None,
    backward: bool = False,
    faults: Literal["full", "sampled", "off"] = "off",
    golden: str | Path | None = None,
    inputs: Mapping[str, Tensor] | str | Path | None = None,
    threads: int = 1,
    revision: str | None = None,
    ignore_config: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Result:
    """Hold a port against the reference, at every site that both have.

        result = portkit.parity.compare(model, "google/gemma-3-270m", sites="my.sites")
        print(result)                   # the report, in words
        result.verdict                  # exact, rounding, inconclusive or diverged
        result.first                    # the first culprit: its site, kind and errors, or None
        result.causes[result.first.site].sentence
        result.report("report")         # a page, and what machines read

    The port:

    port         a model, or any callable that gives logits; a factory (directory, dtype, device)
                 that makes one; the name of a factory, "module:factory" or "file.py:factory"; None
                 for portkit's own port
    repo         the checkpoint's folder, or its name on the Hub; or the very thing that is held to
                 be right, a model of Transformers or any callable that gives logits: the same model
                 with its adapter unmerged, say
    sites        which of its modules is which site: a table of pairs, or the file that holds one
    revision     of the repository on the Hub: a branch, a tag or a commit
    ignore_config
                 keys of config.json to go on without
    trust_remote_code
                 run the code that a checkpoint brings, as the reference; else it is refused

    A callable takes input_ids and, as far as it likes, positions, attention_mask and cache, by
    these names or by those of Hugging Face. It returns logits (batch, tokens, vocab_size), a pair
    (logits, cache), or an object with .logits. What it does not take is in result.not_verified.

    What it is held against:

    reference    None for Transformers; else anything that a port may be, or the path of a recording
    golden       a recording (portkit record) that portkit's own port is held against
    attention    the attention kernel of portkit's own port, and of the reference: sdpa or eager
    reference_attention
                 another kernel for the reference

    How:

    probe        "default", "quick" or "thorough"; token ids; or a Probe
    seed         of the probe's token ids
    inputs       of a model that is no causal language model, an encoder, a vision tower, an
                 encoder-decoder: what both are called with, tensors by the names of the reference's
                 arguments, or the safetensors file that holds them. What needs tokens, such as
                 generation, is not asked
    dtype        to compute in: a torch.dtype or its name. "auto" is the model's own where one is
                 given, else the checkpoint's; a factory is asked in bfloat16 as well
    device       to compute on
    layers       range(4, 8) holds the layers 4 to 7 against the truth, and leaves the others out
    threads      how many compute; bits depend on it

    What else is asked:

    gate         what result.holds lets pass: "exact" or "rounding". None is rounding, and for
                 portkit's own port on a CPU exact
    backward     gradients too (result.gradients); portkit's own port alone
    faults       how many known mistakes to try: would this probe see them? (result.teeth)

    Raises a PortkitError, in one line, on input that is no port, no checkpoint, or no table.
    """
    if isinstance(reference, str) and Path(reference).suffix == ".safetensors":
        golden, reference = reference, None
    if golden is not None and not (port is None and reference is None and probe == "default"):
        raise PortError("golden: the recording is the reference, with a probe of its own")
    if golden is not None and inputs is not None:
        raise PortError("golden: a recording has its own probe, and no named inputs")
    if inputs is not None:
        if probe != "default":
            raise ProbeError("inputs: they are the probe: leave probe out")
        inputs = read_inputs(inputs) if isinstance(inputs, (str, Path)) else checked(inputs)
    subject = None if isinstance(repo, (str, Path)) else repo
    for model in (port, subject):
        if dtype == "auto" and isinstance(model, nn.Module):
            dtype = _dtype_of(model)
    if subject is not None and dtype == "auto":
        dtype = "float32"
    of_ours = port is None and reference is None
    passing = gate or ("exact" if of_ours and str(device) == "cpu" else "rounding")
    name = str(repo) if subject is None else type(subject).__name__
    question = Question(
        name,
        subject=subject,
        revision=revision,
        dtype=_word(dtype),
        device=str(device),
        attention=attention,
        reference_attention=reference_attention,
        layers=layers,
        ignore_config=tuple(ignore_config),
        backward=backward,
        gate=passing,
        faults=faults,
        choose_probe=_choice(probe, seed),
        port=_given(port),
        reference=_given(reference),
        sites=_table(sites),
        inputs=inputs,
        trust_remote_code=trust_remote_code,
        is_made=subject is not None or any(map(_is_made, (port, reference))),
    )
    with _threads(threads):
        found = prove(question) if golden is None else prove_by(TraceFile(Path(golden)), question)
        known = {one.name: getattr(found, one.name) for one in fields(found)}
        return Result(
            **known,
            repo=name,
            gate=passing,
            device=str(device),
            threads=torch.get_num_threads(),
        )


def _asserted(ask: Callable[_Asked, Result]) -> Callable[_Asked, Result]:
    @wraps(ask)
    def assert_parity(*args: _Asked.args, **kwargs: _Asked.kwargs) -> Result:
        __tracebackhide__ = True  # to pytest: the line that matters is the caller's
        result = ask(*args, **kwargs)
        if not result.holds:
            raise AssertionError(str(result))
        return result

    assert_parity.__name__ = assert_parity.__qualname__ = "assert_parity"
    assert_parity.__doc__ = (
        "Fail with the report where the gate does not let the port pass.\n\n"
        "    Takes what `compare` takes, and returns what it returns.\n    "
    )
    return assert_parity


assert_parity = _asserted(compare)


def decode(  # noqa: PLR0913  # as above
    repo: str | Path,
    *,
    probe: Choice | None = None,
    seed: int = 0,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    reference_attention: Literal["sdpa", "eager"] | None = None,
    revision: str | None = None,
    ignore_config: Sequence[str] = (),
    threads: int = 1,
) -> DecodeParity:
    """Hold every way in which portkit decodes against the reference, as `portkit parity --decode`.

        portkit.parity.decode("google/gemma-3-270m").verdict

    Prefill, chunks, token by token, padded and batch rows, the fast path; not what is compiled.
    `probe`: token ids, say, for the prompt; None draws random ones from `seed`. The others are
    those of `compare`. Raises a PortkitError on bad input.
    """
    from portkit.parity.decoding.proof import prove_decoding

    question = Question(
        repo,
        revision=revision,
        dtype=_word(dtype),
        device=str(device),
        reference_attention=reference_attention,
        ignore_config=tuple(ignore_config),
        choose_probe=_choice(probe or "default", seed),
    )
    with _threads(threads):
        return prove_decoding(question, seed, prompt=probe is not None, packages=None)


def _given(port: Port) -> Any:
    """What is made already, as a factory of it; names and factories as they are."""
    if port is not None and not isinstance(port, str) and not callable(port):
        raise PortError(f"{port!r:.60} is no port: give a model, a callable, or module:factory")
    if not _is_made(port):
        return port

    def made(*_: object) -> Any:
        return port

    made.__name__ = type(port).__name__
    made.is_made = True  # type: ignore[attr-defined]
    sites = getattr(port, "sites", "")
    made.sites = sites if isinstance(sites, str) else ""  # type: ignore[attr-defined]
    return made


def _is_made(port: Port) -> bool:
    """Whether it is the port itself, and no name or factory of one."""
    if port is None or isinstance(port, (str, nn.Module)):
        return isinstance(port, nn.Module)
    try:
        names = inspect.signature(port).parameters
    except (TypeError, ValueError):  # something built in
        return True
    return not {"dtype", "device"} <= names.keys()


def _dtype_of(model: nn.Module) -> str | torch.dtype:
    held = (one.dtype for one in model.parameters() if one.is_floating_point())
    return next(held, "auto")


def _word(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _choice(probe: Choice, seed: int) -> Callable[[Traits, Files | None], Probe]:
    if isinstance(probe, Probe):
        return lambda *_: probe
    if isinstance(probe, str):
        if probe not in _PROBES:
            raise ProbeError(f"probe {probe!r}: choose one of {', '.join(_PROBES)}, or token ids")
        return lambda traits, _: _PROBES[probe](traits, seed)
    return lambda *_: probing.probe_of_tokens("tokens", probe)


def _table(sites: str | Path | None) -> str | None:
    """A table as it is; of a file, what is in it."""
    if sites is None or (isinstance(sites, str) and ("=" in sites or not sites.strip())):
        return sites
    try:
        return Path(sites).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SiteError(f"the site pairs in {sites} cannot be read: {error}") from error


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads, on which bits depend, and then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
