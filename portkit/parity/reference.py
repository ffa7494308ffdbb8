"""The reference: Transformers, as a black box that is loaded faithfully and run.

The only file that imports `transformers`. Loaded by `from_pretrained(dtype=...)`, never cast
afterwards: `.to(bfloat16)` would round the rotary frequencies. What the load report says is
checked, because the reference itself goes on with random values where a tensor is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from portkit.errors import ReferenceUnavailable
from portkit.parity.probe import Pass, Probe


class Reference:
    """A checkpoint in the reference implementation, in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def logits(self, probe: Probe) -> Iterator[Tensor]:
        """Logits (batch, tokens, vocab_size) of each pass in turn, run when it is asked for."""
        caches: dict[str, Any] = {}
        for one in probe:
            yield self._run(one, caches)

    @torch.no_grad()
    def _run(self, one: Pass, caches: dict[str, Any]) -> Tensor:
        output = self.model(
            input_ids=one.input_ids,
            position_ids=one.positions,
            attention_mask=one.attention_mask,
            past_key_values=caches.pop(one.continues) if one.continues else None,
            use_cache=True,
        )
        caches[one.name] = output.past_key_values
        logits: Tensor = output.logits
        return logits


def is_available() -> bool:
    """Whether the reference is installed; it is an optional extra."""
    from importlib.util import find_spec

    return find_spec("transformers") is not None


def load_reference(directory: str | Path, dtype: torch.dtype, attention: str = "sdpa") -> Reference:
    """Load a checkpoint's folder on the CPU. `attention`: sdpa or eager.

    Raises `ReferenceUnavailable` where it is not installed, or did not load every tensor.
    """
    if not is_available():
        raise ReferenceUnavailable(
            "the reference, Transformers, is not installed: pip install 'portkit[parity]'"
        )
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    progress: Any = transformers.utils.logging
    logging.getLogger("transformers").setLevel(logging.ERROR)
    progress.disable_progress_bar()
    try:
        model, report = auto.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as error:  # it raises many kinds, and its own message is what helps
        reason = " ".join(str(error).split())
        raise ReferenceUnavailable(f"the reference cannot load {directory}: {reason}") from error
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(key):
            names = ", ".join(sorted(map(str, report[key]))[:3])
            raise ReferenceUnavailable(
                f"the reference reports {key.replace('_', ' ')} in {directory}: {names}"
            )
    return Reference(model.eval())
