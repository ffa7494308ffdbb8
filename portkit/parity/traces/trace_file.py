"""The trace file: what one model produced at every site of a probe, as a safetensors file.

Any framework can write one (docs/traces.md): a tensor is called `PASS/SITE`, and one JSON value in
the metadata, under `portkit.trace`, says what was run, on what, and how far from the truth it may
be. Knows the format and each way in which a file can be wrong; holds nothing against anything.
Tensors are views of the mapped file: of gigabytes only what is looked at is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from portkit.errors import ProbeError, TraceError
from portkit.json_reading import parse_object
from portkit.parity.probes.probe import Pass, Probe, from_json
from portkit.parity.subject.dims import KEY as KEYS
from portkit.parity.subject.dims import LENGTH, is_steady, sizes
from portkit.shown import as_json

FORMAT = 1
KEY = "portkit.trace"
"""Where the metadata holds the description."""
TOKENS = ("position", "query")
"""The dimensions that count new tokens; a site has one of them at the most."""
_COMPARABLE = frozenset(
    {"F64", "F32", "BF16", "F16", "BOOL", *(f"{sign}{n}" for sign in "IU" for n in (8, 16, 32, 64))}
)
"""Torch computes with no others throughout."""
_OUTER = {"batch", *TOKENS}
_MOST_WORDS = 16
"""Of dims."""
CACHED = ("#key", "#value")
"""Sites that reach back over the cache."""


@dataclass(frozen=True)
class Provenance:
    """Which model, run by what and how. None where the writer does not say."""

    model: str
    engine: str
    """What ran it: transformers, portkit, numpy, …"""
    dtype: str
    """Of the activations, in torch's words."""
    revision: str | None = None
    config_sha256: str | None = None
    """Of the bytes of `config.json`."""
    attention: str | None = None
    experts: str | None = None
    cache: str | None = None
    cast: str | None = None
    """How the parameters came into `dtype`: as they were loaded, or afterwards."""
    device: str | None = None
    threads: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordedFloor:
    """How far the recorded model itself is from the truth at a site, as relative RMS."""

    rms: float | None = None
    """Given the recorded input of the site; None of logits, which are what the head makes."""
    channels: tuple[float, ...] | None = None
    """The same of each channel, or of so many neighbours together as `pooled` says."""
    pooled: int = 1
    carried: float | None = None
    """Running freely from the tokens, as the truth then does."""


class TraceFile:
    """A trace, opened: its description checked, its tensors read when asked for."""

    def __init__(self, path: Path) -> None:
        """Raises `TraceError` on whatever is no trace, or contradicts itself."""
        self.path = path
        self._handle, description = _opened(path)
        self.provenance = _provenance(path, description)
        self.probe = _probe(path, description)
        self.sites = _sites(path, description.get("sites"))
        """Dimensions by name, in order of execution."""
        self.floors = _floors(path, description.get("floors"), self.sites)
        self.last_tokens = _last_tokens(path, description.get("last_tokens"))
        """Of how many last tokens of each pass the sites are kept; None: of all."""
        self.is_whole = description.get("whole") is True
        """Whether every site and token of the run is here: nothing was made elsewhere."""
        stored = {name: self._handle.get_slice(name) for name in self._handle.keys()}  # noqa: SIM118
        self._shapes = {name: tuple(one.get_shape()) for name, one in stored.items()}
        for name, one in stored.items():
            if one.get_dtype() not in _COMPARABLE:
                raise _wrong(
                    path, f"{name} is stored as {one.get_dtype()}, which is not compared: cast it"
                )
        self._check_tensors()

    def __str__(self) -> str:
        return str(self.path)

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def has_inputs(self) -> bool:
        """Whether inputs of modules are recorded too, so that errors can be judged where made."""
        return any(":in" in site for site in self.sites)

    def shape(self, one: Pass, site: str) -> tuple[int, ...] | None:
        """Of a site in a pass; None where it is not recorded there."""
        return self._shapes.get(f"{one.name}/{site}")

    def read(self, one: Pass, site: str) -> Tensor:
        """A site in a pass, on the CPU: a view of the mapped file."""
        tensor: Tensor = self._handle.get_tensor(f"{one.name}/{site}")
        return tensor

    def recorded(self, one: Pass) -> Iterator[str]:
        """The sites of a pass, in order of execution."""
        return (site for site in self.sites if self.shape(one, site) is not None)

    def _check_tensors(self) -> None:
        passes = {one.name: one for one in self.probe}
        found: set[str] = set()
        for name, shape in self._shapes.items():
            of, _, site = name.partition("/")
            if of not in passes or site not in self.sites:
                raise _wrong(self.path, f"holds {name!r:.90}, which its passes and sites lack")
            problem = self._misfit(passes[of], site, shape)
            if problem:
                raise _wrong(
                    self.path,
                    f"{name} of shape {list(shape)} does not fit {self.sites[site]!r}: {problem}",
                )
            floor = (self.floors or {}).get(site)
            if floor and floor.channels and not _covers(floor, self.sites[site], shape, passes[of]):
                raise _wrong(self.path, f"the floor of {site} has {len(floor.channels)} channels")
            found.add(site)
        for site in self.sites:
            if site not in found:
                raise _wrong(self.path, f"lists the site {site} and holds no tensor of it")

    def _misfit(self, one: Pass, site: str, shape: tuple[int, ...]) -> str | None:
        """Why a tensor cannot be what a site had in a pass; None where it can."""
        words = self.sites[site].split()
        fits = 0 < len(shape) <= len(words) or (shape and words[-1] == LENGTH)
        apart = sizes(shape, self.sites[site], one) if fits else None
        if apart is None:
            return f"it has {len(shape)} dimensions, which are not made of these"
        past = self.probe.past(one)
        for word, size in zip(words, apart, strict=True):
            most = one.num_tokens + (past if site.endswith(CACHED) or word == "key" else 0)
            if word == "batch" and size not in {1, len(one.input_ids)}:
                return f"the pass has {len(one.input_ids)} rows"
            if word in {*TOKENS, "key"} and size > most:
                return f"the pass has {most} tokens there"
            if word in TOKENS and size > (self.last_tokens or most):
                return f"last_tokens is {self.last_tokens}"
            if size == 0 and LENGTH not in words:
                return f"it has no {word}"
        return None


def description_of(
    provenance: Provenance,
    probe: Mapping[str, Any],
    sites: Mapping[str, str],
    floors: Mapping[str, RecordedFloor] | None,
    last_tokens: int | None = None,
    is_whole: bool = False,
) -> str:
    """The JSON value of a trace; `probe` as `probe.as_json` gives it."""
    described = {
        "format": FORMAT,
        **{k: dict(v) if isinstance(v, Mapping) else v for k, v in vars(provenance).items()},
        "probe": probe["name"],
        "is_complete": probe["is_complete"],
        "passes": probe["passes"],
        "last_tokens": last_tokens,
        "whole": is_whole,
        "sites": [{"name": name, "dims": dims} for name, dims in sites.items()],
        "floors": None
        if floors is None
        else {
            site: {key: value for key, value in vars(one).items() if value not in (None, ())}
            for site, one in floors.items()
        },
    }
    return as_json(described, separators=(",", ":"))


# -- reading the description ---------------------------------------------------------------------


def _opened(path: Path) -> tuple[Any, dict[str, Any]]:
    if not path.is_file():
        raise TraceError(f"{path} is no file: give a trace that portkit record, or you, wrote")
    try:
        handle: Any = safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise TraceError(
            f"{path} is truncated or no safetensors file ({error}): record it again"
        ) from None
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror or error}") from None
    metadata = handle.metadata() or {}
    if KEY not in metadata:
        raise TraceError(
            f"{path} is no trace: its metadata has no {KEY}; docs/traces.md says how one is written"
        )
    what, remedy = f"{path}: {KEY} in its metadata", "record it again, or mend what wrote it"
    described = parse_object(metadata[KEY], what, TraceError, remedy)
    if described.get("format") != FORMAT:
        raise TraceError(
            f"{path} is a trace of format {described.get('format')!r:.40}, this portkit reads "
            f"format {FORMAT}: record it again, or install the portkit that wrote it"
        )
    return handle, described


def _provenance(path: Path, described: Mapping[str, Any]) -> Provenance:
    kinds: dict[str, tuple[type, bool]] = {
        **dict.fromkeys(("model", "engine", "dtype"), (str, True)),
        **dict.fromkeys(("revision", "config_sha256", "attention", "experts"), (str, False)),
        **dict.fromkeys(("cache", "cast", "device"), (str, False)),
        "threads": (int, False),
        "versions": (dict, False),
    }
    given: dict[str, Any] = {}
    for key, (kind, is_needed) in kinds.items():
        value = described.get(key)
        if value is None and not is_needed:
            continue
        if not isinstance(value, kind):
            word = {str: "text", int: "a whole number", dict: "an object"}[kind]
            raise _wrong(path, f"{key} is {value!r:.40} where {word} is due")
        given[key] = value
    return Provenance(**given)


def _probe(path: Path, described: Mapping[str, Any]) -> Probe:
    name = described.get("probe") or "recorded"
    saved = {
        "name": name,
        "is_complete": described.get("is_complete"),
        "passes": described.get("passes"),
    }
    try:
        probe = from_json(saved)
    except (ProbeError, TypeError, AttributeError) as error:
        raise _wrong(path, f"its passes: {error}") from None
    for one in probe:
        if "/" in one.name or not one.name.isprintable():
            raise _wrong(path, f"a pass is called {one.name!r:.40}, which holds a slash or worse")
    return probe


def _sites(path: Path, listed: Any) -> dict[str, str]:
    if not isinstance(listed, list) or not listed:
        raise _wrong(path, "sites is no list of names and dims in order of execution")
    found: dict[str, str] = {}
    for each in listed:
        name, dims = (each.get("name"), each.get("dims")) if isinstance(each, dict) else (None,) * 2
        if not isinstance(name, str) or not name.isprintable() or not isinstance(dims, str):
            raise _wrong(path, f"sites lists {each!r:.80}, which has no name and dims")
        words = dims.split()
        if not 0 < len(words) <= _MOST_WORDS or len(set(words)) < len(words):
            raise _wrong(path, f"the dims of {name}, {dims!r:.60}, are not words, each there once")
        if sum(word in TOKENS for word in words) > 1:
            both = " and ".join(TOKENS)
            raise _wrong(path, f"the dims of {name}, {dims!r:.60}, have more than one of {both}")
        if name in found:
            raise _wrong(path, f"lists the site {name} twice")
        found[name] = " ".join(words)
    return found


def _floors(path: Path, given: Any, sites: Mapping[str, str]) -> dict[str, RecordedFloor] | None:
    if given is None:
        return None
    if not isinstance(given, dict):
        raise _wrong(path, "floors is neither null nor an object of sites")
    found = {}
    for site, one in given.items():
        if site not in sites:
            raise _wrong(path, f"floors names {site!r:.80}, which is none of its sites")
        values = one if isinstance(one, dict) else {"rms": one}
        listed, pooled = values.get("channels"), values.get("pooled", 1)
        if (
            not isinstance(listed, (list, type(None)))
            or not (type(pooled) is int and pooled > 0)
            or not all(map(_is_distance, listed or []))
            or not all(_is_distance(values.get(key, 0.0)) for key in ("rms", "carried"))
        ):
            raise _wrong(path, f"the floor of {site} is not made of numbers from 0 on")
        channels = None if listed is None else tuple(listed)
        found[site] = RecordedFloor(values.get("rms"), channels, pooled, values.get("carried"))
    return found


def _covers(floor: RecordedFloor, dims: str, shape: tuple[int, ...], one: Pass) -> bool:
    """Whether a floor's channels are those of a site: all that is neither a row nor a token."""
    if not is_steady(dims):
        return False  # a token has not as many of them in every pass
    apart, words = sizes(shape, dims, one), dims.split()
    assert apart is not None, "asked of a site that fits"
    outer = _OUTER if set(words) & set(TOKENS) else {*_OUTER, KEYS}
    inner = (n for word, n in zip(words, apart, strict=True) if word not in outer)
    assert floor.channels is not None, "asked of a floor with channels"
    return len(floor.channels) == math.ceil(math.prod(inner) / floor.pooled)


def _is_distance(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 <= value < 1e100  # its square is a number still, and so many digits a float
    )


def _last_tokens(path: Path, given: Any) -> int | None:
    if given is None or (type(given) is int and given > 0):
        return given
    raise _wrong(path, f"last_tokens is {given!r:.40} where a number from 1 on is due")


def _wrong(path: Path, what: str) -> TraceError:
    return TraceError(f"{path}: {what}; record it again, or mend what wrote it")


def names(some: Iterable[str], most: int = 3) -> str:
    """The first few of many names, and that there are more."""
    listed = list(some)
    return ", ".join(listed[:most]) + (", …" if len(listed) > most else "")
