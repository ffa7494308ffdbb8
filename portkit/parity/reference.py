"""The reference: Transformers, as a black box that is loaded faithfully, run and watched.

The only file that imports `transformers`. Loaded by `from_pretrained(dtype=...)`, never cast
afterwards: `.to(bfloat16)` would round the rotary frequencies. What the load report says is
checked, because the reference itself goes on with random values where a tensor is missing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from portkit.errors import ReferenceUnavailable
from portkit.parity.probe import Pass, Probe
from portkit.parity.sites import Visit, visit_inputs

# Where a multimodal model keeps the text model that sites are named after.
_TEXT_PREFIX = "model.language_model."
_EAGER = "eager_attention_forward"


class Reference:
    """A checkpoint in the reference implementation, in evaluation mode; a side of a comparison."""

    def __init__(self, model: nn.Module, attention: str = "sdpa") -> None:
        self.model = model
        self.attention = attention

    def logits(self, probe: Probe) -> Iterator[Tensor]:
        """Logits (batch, tokens, vocab_size) of each pass in turn, run when it is asked for."""
        caches: dict[str, Any] = {}
        for one in probe:
            yield self.run(one, caches)

    @torch.no_grad()
    def run(self, one: Pass, caches: dict[str, Any]) -> Tensor:
        """One pass; `caches` holds what earlier ones left, by name, and takes what this does."""
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

    def module_sites(self) -> Mapping[str, nn.Module]:
        modules = dict(self.model.named_modules())
        if _TEXT_PREFIX[:-1] not in modules:
            return modules
        text = {
            f"model.{n.removeprefix(_TEXT_PREFIX)}": m
            for n, m in modules.items()
            if n.startswith(_TEXT_PREFIX)
        }
        return {**text, "lm_head": modules["lm_head"]}

    @contextmanager
    def watch_attention(self, visit: Visit) -> Iterator[None]:
        """The kernel that was asked for, a spy before and behind it; masks stay as they are."""
        names = {module: name for name, module in self.module_sites().items()}

        def spy(kernel: Callable[..., Any]) -> Callable[..., Any]:
            def watched(
                module: nn.Module,
                query: Tensor,
                key: Tensor,
                value: Tensor,
                attention_mask: Tensor | None,
                **options: Any,
            ) -> Any:
                name = names.get(module)
                if name is None:  # the vision tower's
                    return kernel(module, query, key, value, attention_mask, **options)
                query, key, value, mask = visit_inputs(
                    name, visit, query, key, value, attention_mask
                )
                context, weights = kernel(module, query, key, value, mask, **options)
                return visit(f"{name}#context", context), weights

            return watched

        with self._kernels_replaced(spy):
            yield

    def kernels(self) -> dict[str, Callable[..., Any]]:
        """The reference's own attention kernels: (module, query, key, value, mask, …) each."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attention = next(m for n, m in self.module_sites().items() if n.endswith(".self_attn"))
        eager = getattr(sys.modules[type(attention).__module__], _EAGER)
        return {"sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"], "eager": eager}

    @contextmanager
    def _kernels_replaced(self, wrap: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        with ExitStack() as stack:
            if self.attention == "sdpa":
                ALL_ATTENTION_FUNCTIONS["sdpa"] = wrap(ALL_ATTENTION_FUNCTIONS["sdpa"])
                stack.callback(ALL_ATTENTION_FUNCTIONS.pop, "sdpa")
            else:
                homes = {
                    sys.modules[type(m).__module__]
                    for n, m in self.module_sites().items()
                    if n.endswith(".self_attn")
                }
                for home in homes:
                    before = getattr(home, _EAGER)
                    setattr(home, _EAGER, wrap(before))
                    stack.callback(setattr, home, _EAGER, before)
            yield

    @contextmanager
    def watch_tables(self, visit: Visit) -> Iterator[None]:
        """Called once a layer type where they differ, and then told which by its name."""
        name, module = next(
            (n, m) for n, m in self.module_sites().items() if n.endswith("rotary_emb")
        )
        prefix = name.removesuffix(".rotary_emb")

        def after(_: nn.Module, args: Any, kwargs: dict[str, Any], tables: Any) -> Any:
            kinds = [one for one in (*args, *kwargs.values()) if isinstance(one, str)]
            suffix = f".{kinds[0]}" if kinds else ""
            cos, sin = tables
            return visit(f"{prefix}#cos{suffix}", cos), visit(f"{prefix}#sin{suffix}", sin)

        handle = module.register_forward_hook(after, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the eager kernel wants it: zero where visible, else the dtype's lowest."""
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest)


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
    return Reference(model.eval(), attention)
