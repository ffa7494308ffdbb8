"""Engines side by side: each in a process of its own, in turn, medians of several rounds.

Knows how rounds are arranged and what a row of the result is; how an engine runs it does not know.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import Any

import torch

from portkit.architecture import CausalLM
from portkit.bench.agreement import Agreement, compare_tokens, judge_paths, losses
from portkit.bench.engines import EXACT, FAST, LLAMA_CPP
from portkit.errors import BenchError
from portkit.gguf import write_gguf
from portkit.json_reading import parse_object
from portkit.loading import load
from portkit.parity.decoding.approximate import Loss


@dataclass(frozen=True)
class Plan:
    """What is measured. `num_tokens` per run, the first of which the prefill gives.

    Once and untimed, each engine continues a prompt of `compared_prompt` tokens by `num_compared`:
    what a few tokens hide many show. 0 leaves that out.
    """

    repo: str
    dtype: str
    engines: tuple[str, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    num_tokens: int
    rounds: int
    threads: int
    vocab_size: int
    gguf: str | None = None
    device: str = "cpu"
    compared_prompt: int = 0
    num_compared: int = 0


@dataclass(frozen=True)
class Row:
    """An engine at one context and batch; seconds are medians over the rounds.

    `agreement` is that of the tokens it was timed with, `compared` that of the long continuation.
    """

    engine: str
    dtype: str
    batch: int
    context: int
    prefill_s: float
    step_s: float
    peak_rss_bytes: int
    peak_device_bytes: int | None
    compile_s: float
    bytes_per_token: int | None
    agreement: Agreement
    compared: Agreement | None = None
    loss: Loss | None = None
    """Of a path that is another model by intent."""

    @property
    def same_tokens(self) -> bool:
        """In both continuations."""
        return self.agreement.same and (self.compared is None or self.compared.same)

    @property
    def tokens_per_s(self) -> float:
        """Of all rows of the batch together."""
        return self.batch / self.step_s

    def fields(self, bandwidth: float) -> dict[str, Any]:
        """As JSON has it; `bandwidth` in bytes per second."""
        read = self.bytes_per_token
        return {
            "engine": self.engine,
            "dtype": self.dtype,
            "batch": self.batch,
            "context": self.context,
            "tokens_per_s": self.tokens_per_s,
            "ms_per_token": 1000 * self.step_s,
            "prefill_ms": 1000 * self.prefill_s,
            "compile_s": self.compile_s,
            "peak_rss_bytes": self.peak_rss_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "bytes_per_token": read,
            "bandwidth_fraction": None if read is None else read / self.step_s / bandwidth,
            "same_tokens": self.same_tokens,
            "first_difference": self.agreement.first_difference,
            "compared": None if self.compared is None else self.compared.fields(),
            "verdict": self.agreement.verdict,
            "loss": None if self.loss is None else self.loss.fields(),
        }


class Worker:
    """A running engine. Raises BenchError where it cannot start or stops answering."""

    def __init__(self, plan: Plan, engine: str) -> None:
        options = {
            "engine": engine,
            "repo": plan.repo,
            "dtype": plan.dtype,
            "threads": plan.threads,
            "device": plan.device,
            "gguf": plan.gguf,
            "context": max(
                max(plan.contexts) + plan.num_tokens, plan.compared_prompt + plan.num_compared
            ),
        }
        self._engine = engine
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "portkit.bench.worker", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.load_s: float = self._read()["load_s"]

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        request = json.dumps({"prompts": prompts, "num_tokens": num_tokens})
        with suppress(BrokenPipeError):  # then its last words are to be read
            print(request, file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        what = f"what {self._engine} answers"
        answer = parse_object(line, what, BenchError) if line else {"error": self._last_words()}
        if "error" in answer:
            raise BenchError(f"{self._engine} cannot be measured: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        said = self._process.stderr.read().strip().splitlines()
        if self._process.wait() == -signal.SIGKILL:
            return "it was killed, as is done where memory runs out: take smaller batches"
        return said[-1] if said else "it said nothing"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def with_gguf(plan: Plan) -> Iterator[Plan]:
    """The plan with a file for llama.cpp, made for as long as it is needed where none is given.

    Where the system lets processes open each other's files it has no name: whatever ends this
    process, nothing is left behind.
    """
    if plan.gguf is not None or LLAMA_CPP not in plan.engines:
        yield plan
        return
    opened = Path(f"/proc/{os.getpid()}/fd")
    with TemporaryFile() if opened.is_dir() else NamedTemporaryFile(suffix=".gguf") as file:
        path = opened / str(file.fileno()) if opened.is_dir() else Path(file.name)
        write_gguf(load(plan.repo, dtype=plan.dtype, device="cpu"), path)
        yield replace(plan, gguf=str(path))


def measure(plan: Plan, advance: Callable[[str], None] = lambda _: None) -> list[Row]:
    """All engines at each context and batch, in turn within each round; a warm-up comes first.

    `advance` is called before each of `num_steps(plan)` steps, with what comes.
    """
    workers: dict[str, Worker] = {}
    cells, long = [], {}
    try:
        for engine in plan.engines:
            workers[engine] = Worker(plan, engine)
        for context in plan.contexts:
            for batch in plan.batches:
                cells.append(_Cell(plan, workers, context, batch, advance))
        if plan.num_compared:
            long = _continued(plan, workers, advance)
    finally:
        for worker in workers.values():
            worker.close()
    # Only now, when nothing is measured any more.
    advance("the verdicts")
    loaded = load(plan.repo, dtype=plan.dtype, device=plan.device)
    verdicts = judge_paths(loaded.model, plan.engines, plan.vocab_size)
    lost = losses(loaded, plan.engines)
    advance("whether tokens agree")
    prompts = prompts_of(plan.vocab_size, plan.compared_prompt, 1)
    compared = compare_tokens(loaded.model, prompts, long, verdicts) if long else {}
    return [
        replace(row, compared=compared.get(row.engine), loss=lost.get(row.engine))
        for cell in cells
        for row in cell.rows(loaded.model, verdicts)
    ]


def _continued(
    plan: Plan, workers: Mapping[str, Worker], advance: Callable[[str], None]
) -> dict[str, list[list[int]]]:
    """Each engine's tokens behind the long prompt."""
    found = {}
    for engine, worker in workers.items():
        advance(f"{engine}, {plan.num_compared} tokens behind {plan.compared_prompt}")
        prompts = prompts_of(plan.vocab_size, plan.compared_prompt, 1)
        found[engine] = worker.run(prompts, plan.num_compared)["token_ids"]
    return found


def num_steps(plan: Plan) -> int:
    """How often `measure` advances."""
    per_context = sum((plan.rounds + 1) * len(_taking_part(plan, one)) for one in plan.batches)
    long = len(plan.engines) if plan.num_compared else 0
    return len(plan.contexts) * per_context + long + 2


class _Cell:
    """The answers of all engines at one context and batch."""

    def __init__(
        self,
        plan: Plan,
        workers: Mapping[str, Worker],
        context: int,
        batch: int,
        advance: Callable[[str], None],
    ) -> None:
        self._plan, self._context, self._batch = plan, context, batch
        self._prompts = prompts_of(plan.vocab_size, context, batch)
        engines = _taking_part(plan, batch)
        self._answers: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
        for number in range(plan.rounds + 1):
            turn = f"round {number} of {plan.rounds}" if number else "warm-up"
            for engine in engines:
                advance(f"{engine}, context {context}, {turn}")
                answer = workers[engine].run(self._prompts, plan.num_tokens)
                if number > 0:
                    self._answers[engine].append(answer)

    def rows(self, model: CausalLM, verdicts: Mapping[str, str]) -> list[Row]:
        """Medians, and whether the tokens agree."""
        tokens = {engine: found[-1]["token_ids"] for engine, found in self._answers.items()}
        agreements = compare_tokens(model, self._prompts, tokens, verdicts)
        return [
            Row(
                engine=engine,
                dtype=self._plan.dtype,
                batch=self._batch,
                context=self._context,
                prefill_s=median(one["prefill_s"] for one in found),
                step_s=median(median(one["step_s"]) for one in found),
                peak_rss_bytes=found[-1]["peak_rss_bytes"],
                peak_device_bytes=found[-1]["peak_device_bytes"],
                compile_s=found[-1]["compile_s"],
                bytes_per_token=found[-1].get("bytes_per_token"),
                agreement=agreements[engine],
            )
            for engine, found in self._answers.items()
        ]


def _taking_part(plan: Plan, batch: int) -> list[str]:
    """On a CPU a single row alone is compiled or has an exact head; llama.cpp continues one."""
    alone = (FAST, EXACT, LLAMA_CPP) if plan.device == "cpu" else (LLAMA_CPP,)
    return [one for one in plan.engines if batch == 1 or one not in alone]


def prompts_of(vocab_size: int, context: int, batch: int) -> list[list[int]]:
    """Token ids that every engine continues, the same in every run."""
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(vocab_size, (batch, context), generator=generator)
    return [list(row) for row in ids.tolist()]
