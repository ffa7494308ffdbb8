"""What portkit says when it cannot go on.

Every error that a user can cause is a `PortkitError` whose message is one line and names the way
out; its `exit_code` is what the command returns. Our own broken invariants are `assert`s, never
these.
"""

from __future__ import annotations


class PortkitError(Exception):
    """Base of everything that is the input's fault, not ours. Exit code 2: bad input or usage."""

    exit_code = 2


class UnsupportedConfig(PortkitError):
    """`config.json` says something that no port here computes; names the key, value and choice."""


class InvalidConfig(PortkitError):
    """`config.json` is absent, unreadable, incomplete, or contradicts itself."""


class CheckpointError(PortkitError):
    """A checkpoint's files cannot be read as what they claim to be, or must not be trusted."""


class HubError(PortkitError):
    """A repository, revision or file cannot be had from the Hub or its cache."""


class TokenizerError(PortkitError):
    """Text cannot be turned into tokens, or a chat template cannot be rendered."""


class GenerationError(PortkitError):
    """Sampling options that contradict each other, or a prompt that does not fit the model."""


class QuantizationError(PortkitError):
    """A model that cannot be quantised in the way that was asked for."""


class BenchError(PortkitError):
    """Something cannot be measured here: an engine does not start, or its package is missing."""


class ImportFormatError(PortkitError):
    """A foreign file is not of the format that was named."""


class ReferenceUnavailable(PortkitError):
    """The reference implementation is missing or cannot load this checkpoint faithfully."""


class DataError(PortkitError):
    """Training text or a token file is missing, empty, damaged, or not what it should be."""


class TrainingError(PortkitError):
    """A training run cannot start, go on, or be saved as it was asked for."""


class ProbeError(PortkitError):
    """A probe that cannot be read, or that a model cannot be asked: no such token or position."""


class SiteError(PortkitError):
    """A site that is named and that is none, or a table of site pairs that cannot be read."""


class PortError(PortkitError):
    """A foreign port or reference that cannot be made, or does not do what it is to do."""


class TraceError(PortkitError):
    """A trace file that cannot be read or written, or is of another model or probe."""


class ReportError(PortkitError):
    """A report cannot be written where it should go."""


class OutOfMemory(PortkitError):
    """The machine's memory does not hold what was asked for; says what asks for less."""


class Mismatch(PortkitError):
    """A readable checkpoint that does not fit its config: tensors missing, extra or misshapen."""

    exit_code = 1


class CheckFailed(PortkitError):
    """The bytes themselves are wrong: values that are not finite, or not the promised digest."""

    exit_code = 1


class ExportError(PortkitError):
    """A checkpoint cannot be written where it should go; nothing was left half-written."""
