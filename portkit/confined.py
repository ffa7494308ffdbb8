"""A child process in which a stranger's program runs: its time and its memory have an end.

A tokenizer's patterns and a chat template are programs that came with a checkpoint. They run in a
process of their own, which the system ends when a request has used up its seconds of computing or
asks for more memory than it may: whatever happens there is an answer or one error here. Knows
requests, answers and limits; what a module's `answerer()` gives answers them there.

A message is eight bytes of length and so much JSON. Imports neither torch nor numpy, and a module
that is served should not either: a child starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import IO, Any

_LENGTH_BYTES = 8
_SECONDS = 5
"""Of computing, for any request; and a second more for so many bytes of it:"""
_BYTES_PER_SECOND = 200_000
_MEMORY_BYTES = 2 << 30
"""Of address space; and so many bytes more for each byte of the largest request:"""
_BYTES_PER_BYTE = 200
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from portkit.confined import serve
serve(sys.argv[2])
"""


class Exhausted(Exception):
    """The child is no more; says which limit ended it, or how it died."""


class Refused(Exception):
    """What the stranger's program raised, in one line."""


class Confined:
    """A child that serves `module`. It ends with this object, or after any `Exhausted`."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        """Whether the child that answered last is still there."""
        return self._process is not None

    def ask(self, request: Mapping[str, Any], counted_bytes: int = 0) -> Any:
        """The module's answer.

        `counted_bytes` are what the request stands for beside its own length, as a file that it
        names. Raises `Refused` or `Exhausted`.
        """
        raw = json.dumps(request).encode()
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        allowed = (len(raw) + counted_bytes).to_bytes(_LENGTH_BYTES, "little")
        try:
            process.stdin.write(allowed + _framed(raw))
            process.stdin.flush()
            answer = _read(process.stdout)
        except BrokenPipeError:
            answer = None
        except BaseException:  # interrupted between question and answer: the next would be amiss
            self.close()
            raise
        if answer is None:
            raise Exhausted(self._last_words(process))
        found = json.loads(answer)
        if "refused" in found:
            raise Refused(found["refused"])
        return found["answer"]

    def close(self) -> None:
        """End the child; the next question starts another."""
        if self._process is not None:
            self._end()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # By our own path, and without the folder that we happen to stand in.
            path = json.dumps([*filter(None, sys.path)])
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, path, self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # An arena reserves 64 MB of address space, and each thread would have its own.
                env={**os.environ, "MALLOC_ARENA_MAX": "2"},
            )
            self._end = weakref.finalize(self, _end, self._process)
        return self._process

    def _last_words(self, process: subprocess.Popen[bytes]) -> str:
        code = process.wait()
        self.close()
        if code == -getattr(signal, "SIGXCPU", 0):
            return "it ran out of the time that is given to it"
        if code in (-signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV):
            return "it ran out of the memory that is given to it, or crashed"
        return f"it ended by itself, with {code}"


def one_line(error: BaseException) -> str:
    """What an exception is and says, short and without line breaks."""
    said = " ".join(str(error)[:2000].split())[:400]
    return said if type(error) is Exception else f"{type(error).__name__}: {said}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):  # what was not sent yet
            if stream is not None:
                stream.close()
    process.wait()


def _framed(raw: bytes) -> bytes:
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw


def _read(stream: IO[bytes]) -> bytes | None:
    """The next message; None where the other side has gone."""
    length = stream.read(_LENGTH_BYTES)
    if len(length) < _LENGTH_BYTES:
        return None
    size = int.from_bytes(length, "little")
    raw = stream.read(size)
    return raw if len(raw) == size else None


# -- the child ---------------------------------------------------------------------------------


def serve(module: str) -> None:
    """Answer requests to a module until there are no more."""
    answer: Callable[[dict[str, Any]], Any] = import_module(module).answerer()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    # Ctrl-C reaches the whole group; whoever asks decides when this ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while counted := requests.read(_LENGTH_BYTES):
        raw = _read(requests)
        if raw is None:
            return
        limit(int.from_bytes(counted, "little"))
        try:
            found = {"answer": answer(json.loads(raw))}
            said = json.dumps(found)
        except MemoryError:
            os.abort()
        except BaseException as error:  # a panic in a library is no Exception
            said = json.dumps({"refused": one_line(error)})
        answers.write(_framed(said.encode()))
        answers.flush()


def limit(num_bytes: int) -> None:
    """Let this process compute and hold only so much more, for a request of so many bytes."""
    try:
        import resource
    except ImportError:  # on Windows there is no such limit
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = usage.ru_utime + usage.ru_stime + _SECONDS + num_bytes / _BYTES_PER_SECOND
    memory = _MEMORY_BYTES + num_bytes * _BYTES_PER_BYTE
    for which, wanted in ((resource.RLIMIT_CPU, int(seconds) + 1), (resource.RLIMIT_AS, memory)):
        soft, hard = resource.getrlimit(which)
        # What an earlier request holds it goes on holding; its time is its own.
        held = soft if which == resource.RLIMIT_AS and soft != resource.RLIM_INFINITY else 0
        most = max(wanted, held)
        with suppress(ValueError, OSError):  # macOS has no limit of memory
            allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(which, (allowed, hard))
