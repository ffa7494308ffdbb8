"""Engines side by side: each in a process of its own, in turn, medians of several rounds.

Knows how rounds are arranged and what a row of the result is; how an engine runs it does not know.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import Any

import torch

from portkit.architecture import CausalLM
from portkit.bench.agreement import Agreement, compare_tokens, judge_paths, losses
from portkit.bench.engines import COMPILED, EXACT, FAST, LLAMA_CPP, READABLE
from portkit.errors import BenchError
from portkit.gguf import write_gguf
from portkit.json_reading import parse_object
from portkit.loading import load
from portkit.parity.decoding.approximate import Loss

_SHORT_PROMPT = 16
_LEAST_COMPARED = 32
Tell = Callable[[str], None]
"""Takes a line for people, at once."""


@dataclass(frozen=True)
class Plan:
    """What is measured. `num_tokens` per run, the first of which the prefill gives.

    Once and untimed, each engine continues a prompt of `compared_prompt` tokens by `num_compared`:
    what a few tokens hide many show. 0 leaves that out.

    Both are upper bounds: no round is begun once those of its context and batch have taken
    `rounds_s`, and no more tokens are compared than fit into `compared_s` at the speeds measured.
    One round is always measured, and so are a few tokens.
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
    num_compared: int = 0
    windows: tuple[int, ...] = ()
    limit: int = 0
    rounds_s: float = inf
    compared_s: float = inf

    def compared_prompt(self, num_tokens: int) -> int:
        """The length of a prompt behind which as many tokens cross the widest window midway."""
        reached = [one for one in self.windows if one + num_tokens < self.limit]
        prompt = max(_SHORT_PROMPT, max(reached, default=0) - num_tokens // 2)
        return min(prompt, self.limit - num_tokens)

    def beforehand(self) -> str:
        """How long it takes, as far as that is known, in words."""
        num_cells = len(self.contexts) * len(self.batches)
        bound_s = num_cells * self.rounds_s + (self.compared_s if self.num_compared else 0)
        takes = f"{self.rounds} rounds and {self.num_compared} tokens to compare, as asked for"
        if bound_s < inf:
            takes = f"up to {bound_s:.0f} s, and warm-up and verdicts about as long again"
        compiled = self.device == "cpu" and not COMPILED.isdisjoint(self.engines)
        more = "; a minute or two more where regions are to be compiled first" if compiled else ""
        return f"measuring {len(self.engines)} engines: {takes}{more}"

    @property
    def longest(self) -> int:
        """Tokens of the longest text that is made."""
        compared = self.compared_prompt(0) + self.num_compared if self.num_compared else 0
        return max(max(self.contexts) + self.num_tokens, min(compared, self.limit))


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
    rounds: int
    agreement: Agreement | None
    """None of a measurement that was interrupted before tokens were compared."""
    compared: Agreement | None = None
    loss: Loss | None = None
    """Of a path that is another model by intent."""

    @property
    def same_tokens(self) -> bool | None:
        """In both continuations; None where they were not compared."""
        if self.agreement is None:
            return None
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
            "rounds": self.rounds,
            "tokens_per_s": self.tokens_per_s,
            "ms_per_token": 1000 * self.step_s,
            "prefill_ms": 1000 * self.prefill_s,
            "compile_s": self.compile_s,
            "peak_rss_bytes": self.peak_rss_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "bytes_per_token": read,
            "bandwidth_fraction": None if read is None else read / self.step_s / bandwidth,
            "same_tokens": self.same_tokens,
            "first_difference": self.agreement and self.agreement.first_difference,
            "compared": None if self.compared is None else self.compared.fields(),
            "verdict": self.agreement and self.agreement.verdict,
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
            "context": plan.longest,
        }
        self._engine = engine
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "portkit.bench.worker", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for whoever keeps what was measured
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


class Measurement:
    """All engines at each context and batch, in turn within each round; a warm-up comes first.

    `tell` gets a line for each run as it ends. What was measured is here, however `run` is left.
    """

    def __init__(self, plan: Plan, tell: Tell = lambda _: None) -> None:
        self._plan, self._tell = plan, tell
        self._cells: list[_Cell] = []

    def run(self) -> list[Row]:
        """Measure everything, and judge it when nothing is measured any more."""
        plan, workers = self._plan, dict[str, Worker]()
        long: dict[str, list[list[int]]] = {}
        prompts: list[list[int]] = []
        try:
            for engine in plan.engines:
                workers[engine] = Worker(plan, engine)
            for context in plan.contexts:
                for batch in plan.batches:
                    self._cells.append(_Cell(plan, context, batch))
                    self._cells[-1].measure(workers, self._tell)
            if plan.num_compared:
                num_tokens = self._num_compared()
                length = plan.compared_prompt(num_tokens)
                prompts = prompts_of(plan.vocab_size, length, 1)
                for engine, worker in workers.items():
                    self._tell(f"{engine}, {num_tokens} tokens behind {length}, to compare")
                    long[engine] = worker.run(prompts, num_tokens)["token_ids"]
        finally:
            for worker in workers.values():
                worker.close()
        self._tell("the verdicts, and whether tokens agree")
        loaded = load(plan.repo, dtype=plan.dtype, device=plan.device)
        verdicts = judge_paths(loaded.model, plan.engines, plan.vocab_size)
        lost = losses(loaded, plan.engines)
        compared = compare_tokens(loaded.model, prompts, long, verdicts) if long else {}
        return [
            replace(row, compared=compared.get(row.engine), loss=lost.get(row.engine))
            for cell in self._cells
            for row in cell.rows(cell.agreements(loaded.model, verdicts))
        ]

    def rows(self) -> list[Row]:
        """What there is so far: speeds, of the rounds that were whole or begun; no verdicts."""
        return [row for cell in self._cells for row in cell.rows({})]

    def _num_compared(self) -> int:
        """Tokens that fit into the time, the readable model's in comparing them counted too."""
        most, rows = self._plan.num_compared, self._cells[0].rows({})
        if self._plan.compared_s == inf or not rows:
            return most
        longer = self._plan.compared_prompt(most) / self._cells[0].context
        again = (len(rows) - 1) * next(
            (one.step_s for one in rows if one.engine == READABLE), rows[0].step_s
        )
        left = self._plan.compared_s - sum(one.prefill_s for one in rows) * max(1, longer)
        fitting = int(left / (again + sum(one.step_s for one in rows)))
        return min(most, max(_LEAST_COMPARED, fitting))


class _Cell:
    """The answers of all engines at one context and batch."""

    def __init__(self, plan: Plan, context: int, batch: int) -> None:
        self._plan, self.context, self._batch = plan, context, batch
        self._prompts = prompts_of(plan.vocab_size, context, batch)
        self._answers: dict[str, list[dict[str, Any]]] = {}

    def measure(self, workers: Mapping[str, Worker], tell: Tell) -> None:
        """Rounds until there are enough of them, or their time is over."""
        plan, engines = self._plan, _taking_part(self._plan, self._batch)
        at = f"context {self.context}" + (f", {self._batch} rows" if self._batch > 1 else "")
        for engine in engines:
            answer = self._ask(workers[engine])
            tell(f"{engine}, {at}, warm-up: {_speed(answer, self._batch)}")
        started = time.perf_counter()
        for number in range(1, plan.rounds + 1):
            for engine in engines:
                answer = self._ask(workers[engine])
                self._answers.setdefault(engine, []).append(answer)
                turn = f"round {number} of {'at most ' * (plan.rounds_s < inf)}{plan.rounds}"
                tell(f"{engine}, {at}, {turn}: {_speed(answer, self._batch)}")
            taken = time.perf_counter() - started
            if taken + taken / number > plan.rounds_s:
                return

    def _ask(self, worker: Worker) -> dict[str, Any]:
        return worker.run(self._prompts, self._plan.num_tokens)

    def agreements(self, model: CausalLM, verdicts: Mapping[str, str]) -> dict[str, Agreement]:
        """Whether the tokens agree."""
        tokens = {engine: found[-1]["token_ids"] for engine, found in self._answers.items()}
        return compare_tokens(model, self._prompts, tokens, verdicts)

    def rows(self, agreements: Mapping[str, Agreement]) -> list[Row]:
        """Medians, and what is known of the tokens."""
        return [
            Row(
                engine=engine,
                dtype=self._plan.dtype,
                batch=self._batch,
                context=self.context,
                prefill_s=median(one["prefill_s"] for one in found),
                step_s=median(median(one["step_s"]) for one in found),
                peak_rss_bytes=found[-1]["peak_rss_bytes"],
                peak_device_bytes=found[-1]["peak_device_bytes"],
                compile_s=found[-1]["compile_s"],
                bytes_per_token=found[-1].get("bytes_per_token"),
                rounds=len(found),
                agreement=agreements.get(engine),
            )
            for engine, found in self._answers.items()
        ]


def _speed(answer: Mapping[str, Any], batch: int) -> str:
    compiled = f", compiled in {answer['compile_s']:.0f} s" if answer["compile_s"] else ""
    speed = batch / median(answer["step_s"])
    return f"{speed:.1f} tokens/s, {1000 * answer['prefill_s']:.0f} ms to the first{compiled}"


def _taking_part(plan: Plan, batch: int) -> list[str]:
    """On a CPU a single row alone is compiled or has an exact head; llama.cpp continues one."""
    alone = (FAST, EXACT, LLAMA_CPP) if plan.device == "cpu" else (LLAMA_CPP,)
    return [one for one in plan.engines if batch == 1 or one not in alone]


def prompts_of(vocab_size: int, context: int, batch: int) -> list[list[int]]:
    """Token ids that every engine continues, the same in every run."""
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(vocab_size, (batch, context), generator=generator)
    return [list(row) for row in ids.tolist()]
