"""What each process of `torchrun` does in test_ranks.py: `python -m … '[inputs, habits, runs]'`.

One start serves several runs: starting takes longer than they do. Each run is a folder, a recipe,
and the step behind which the first rank is told to stop, or 0.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from portkit.training.recipe import Habits, Recipe
from portkit.training.run import Inputs, train


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    inputs, habits, runs = json.loads(sys.argv[1])
    for folder, recipe, stop in runs:

        def watch(record: Mapping[str, Any], stop: int = stop) -> None:
            if record["event"] == "step" and record["step"] == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            train(Inputs(**inputs), Recipe(**recipe), Path(folder), Habits(**habits), watch)
        except KeyboardInterrupt:
            assert stop
    # Together, and without taking the interpreter down: a rank whose peer has gone first can abort
    # in gloo's threads, with its work done.
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
