"""What is timed: each engine continues a batch of token ids greedily and says when.

Knows how ours, the reference and llama.cpp are called; the parent process knows none of it. Ids go
in and come out: no text, no sampling, no stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from portkit.bench.roofline import bytes_per_token
from portkit.errors import BenchError
from portkit.loading import COMPUTE_DTYPES, load
from portkit.quantizing import SCHEMES, quantize

if TYPE_CHECKING:
    from portkit.decoding.runners import Runner

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Run:
    """One continuation: the prefill's time, each further token's, and the tokens, by row."""

    prefill_s: float
    step_s: list[float]
    token_ids: list[list[int]]


class Timed(Protocol):
    """An engine with a loaded model."""

    compile_s: float

    def run(self, prompts: Prompts, num_tokens: int) -> Run: ...


class Ours:
    """The readable model, or its fast path: as torch runs it, by kernels, compiled, and with the
    exact head.
    """

    def __init__(self, repo: str, dtype: str, name: str, device: str) -> None:
        from portkit.decoding.fast import FastModel
        from portkit.decoding.packages import Packages, default_folder, has_compiler

        self._model = load(repo, dtype=dtype, device=device).model
        if name in QUANTIZED:
            quantize(self._model, QUANTIZED[name])
        self._name = name
        self._on_gpu = device == "cuda"
        has_packages = name in COMPILED and not self._on_gpu
        has_packages = has_packages and (name not in QUANTIZED or has_compiler())
        self._packages = Packages(default_folder(), _fail) if has_packages else None
        self._fast = FastModel(self._model, self._packages, runner=runner_of(name, device, _fail))
        self._prepare_s = 0.0

    @property
    def compile_s(self) -> float:
        return self._packages.compile_s if self._packages else self._prepare_s

    def bytes_per_token(self, context: int, batch: int) -> int:
        exact = self._name == EXACT and batch == 1
        return bytes_per_token(self._model, context, batch, int8_head=exact)

    def run(self, prompts: Prompts, num_tokens: int) -> Run:
        if self._name == READABLE:
            from portkit.readable import ReadableBatch

            readable = ReadableBatch(self._model, prompts, num_tokens)
            return _timed(readable.prefill, readable.greedy, num_tokens)
        largest = 1 if self._name == EXACT else None
        session = self._fast.start(prompts, num_tokens, largest)

        def prepare() -> None:
            started = time.perf_counter()
            session.prepare(wait=True)
            if self._on_gpu:  # the first time kernels are compiled, later steps are recorded only
                self._prepare_s = max(self._prepare_s, time.perf_counter() - started)

        return _timed(session.prefill, session.greedy, num_tokens, prepare)


class Reference:
    """Transformers' own `generate`, with the cache that it takes by default or a static one."""

    compile_s = 0.0

    def __init__(self, repo: str, dtype: str, name: str, device: str) -> None:
        from portkit.parity.reference import load_reference

        model: Any = load_reference(Path(repo), COMPUTE_DTYPES[dtype], device=device).model
        self._device = device
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        self._generate = model.generate
        self._options = {"cache_implementation": "static"} if name == STATIC else {}

    def run(self, prompts: Prompts, num_tokens: int) -> Run:
        ids, mask = (one.to(self._device) for one in _padded(prompts))
        clock = _Clock()
        out = self._generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_tokens,
            do_sample=False,
            streamer=clock if len(prompts) == 1 else None,
            **self._options,
        )
        ended = time.perf_counter()
        tokens = out[:, ids.shape[1] :].tolist()
        if len(prompts) == 1:
            prefill, *steps = clock.intervals()
            return Run(prefill, steps, tokens)
        # Batches cannot be streamed: a continuation by one token is the prefill's share.
        whole = ended - clock.started
        clock = _Clock()
        self._generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, **self._options)
        prefill = time.perf_counter() - clock.started
        return Run(prefill, [(whole - prefill) / (num_tokens - 1)] * (num_tokens - 1), tokens)


class GgufEngine:
    """llama.cpp through its Python package, from a GGUF file of the same weights.

    Called by its C interface: the package's own loop does more for a token than to choose it.
    """

    compile_s = 0.0

    def __init__(self, gguf: str, num_threads: int, context: int) -> None:
        import llama_cpp  # type: ignore[import-not-found,unused-ignore]

        self._llama: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C holds no reference
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            gguf.encode(), llama_cpp.llama_model_default_params()
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = context
        options.n_threads = options.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(model, options) if model else None
        if not self._context:
            raise BenchError(f"llama.cpp cannot read {gguf}, or has no memory for it")
        self._batch_size: int = options.n_batch
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def run(self, prompts: Prompts, num_tokens: int) -> Run:
        (prompt,) = prompts
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        times: list[float] = []
        tokens: list[int] = []
        while len(tokens) < num_tokens:
            started = time.perf_counter()
            tokens.append(self._likeliest_after(tokens[-1:] or list(prompt)))
            times.append(time.perf_counter() - started)
        return Run(times[0], times[1:], [tokens])

    def _likeliest_after(self, tokens: list[int]) -> int:
        for start in range(0, len(tokens), self._batch_size):
            part = tokens[start : start + self._batch_size]
            ids = (self._llama.llama_token * len(part))(*part)
            failed = self._llama.llama_decode(
                self._context, self._llama.llama_batch_get_one(ids, len(part))
            )
            if failed:
                raise BenchError(f"llama.cpp cannot decode: error {failed}")
        logits = self._llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


READABLE, EAGER, FAST, EXACT = "readable", "fast, not compiled", "fast", "fast, exact head"
TRANSFORMERS, STATIC = "transformers", "transformers, static cache"
LLAMA_CPP = "llama.cpp"
KERNELS = "fast, Triton kernels"
QUANTIZED = {f"fast, {scheme}": scheme for scheme in SCHEMES}
COMPILED = frozenset({FAST, EXACT, *QUANTIZED})


def runner_of(engine: str, device: str, say: Callable[[str], None]) -> Runner | None:
    """How the engine runs its regions on a GPU; None on the CPU, which has packages for it."""
    if device != "cuda":
        return None
    from portkit.decoding import runners

    if engine == KERNELS:
        return runners.by_kernels()
    return runners.compiling(say) if engine == FAST else runners.AS_TORCH_RUNS_IT


@torch.inference_mode()
def _timed(
    prefill: Callable[[], Tensor],
    greedy: Callable[[Tensor], Tensor],
    num_tokens: int,
    prepare: Callable[[], None] = lambda: None,
) -> Run:
    started = time.perf_counter()
    logits = prefill()
    token = logits.float().argmax(-1)
    rows = [token.tolist()]
    prefill_s = time.perf_counter() - started
    if num_tokens > 1:  # or there is no room for the step that is tried
        prepare()
    steps = []
    while len(rows) < num_tokens:
        started = time.perf_counter()
        token = greedy(token)[:, -1]
        rows.append(token.tolist())
        steps.append(time.perf_counter() - started)
    return Run(prefill_s, steps, [list(column) for column in zip(*rows, strict=True)])


class _Clock:
    """What `generate` streams to: it is called with the prompt, and then with every token."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self._times: list[float] = []

    def put(self, _: Tensor) -> None:
        self._times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def intervals(self) -> list[float]:
        ends = self._times[1:]
        return [b - a for a, b in zip([self.started, *ends], ends, strict=False)]


def _padded(prompts: Prompts) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    pads = torch.tensor([[longest - len(prompt)] for prompt in prompts])
    return ids, (torch.arange(longest) >= pads).long()


def _fail(line: str) -> None:
    raise BenchError(line)
