"""An engine in a process of its own: reads requests, a JSON object a line, and answers in kind.

    python -m portkit.bench.worker '{"engine": …, "repo": …, "dtype": …, "threads": …}'

Knows requests and answers; what an engine is `engines` knows. So no engine's memory, threads or
imports are another's.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any, TextIO

from portkit.errors import BenchError, PortkitError
from portkit.json_reading import parse_object


def main(options: dict[str, Any]) -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    try:
        _serve(options, answers)
    except PortkitError as error:
        _answer(answers, {"error": str(error)})


def _serve(options: dict[str, Any], answers: TextIO) -> None:
    started = time.perf_counter()
    import torch

    from portkit.bench.devices import peak_bytes

    torch.set_num_threads(options["threads"])
    engine = _engine(options)
    _answer(answers, {"load_s": time.perf_counter() - started})
    for line in sys.stdin:
        request = parse_object(line, "a request", BenchError)
        run = engine.run(request["prompts"], request["num_tokens"])
        answer = {
            "prefill_s": run.prefill_s,
            "step_s": run.step_s,
            "token_ids": run.token_ids,
            "compile_s": engine.compile_s,
            "peak_device_bytes": peak_bytes(torch.device(options["device"])),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        if hasattr(engine, "bytes_per_token"):
            context = len(request["prompts"][0])
            answer["bytes_per_token"] = engine.bytes_per_token(context, len(request["prompts"]))
        _answer(answers, answer)


def _engine(options: dict[str, Any]) -> Any:
    from portkit.bench import engines

    name = options["engine"]
    if name == engines.LLAMA_CPP:
        return engines.GgufEngine(options["gguf"], options["threads"], options["context"])
    kind = engines.Reference if name in (engines.TRANSFORMERS, engines.STATIC) else engines.Ours
    return kind(options["repo"], options["dtype"], name, options["device"])


def _answer(answers: TextIO, fields: dict[str, Any]) -> None:
    print(json.dumps(fields), file=answers, flush=True)


if __name__ == "__main__":
    main(parse_object(sys.argv[1], "the options", BenchError))
