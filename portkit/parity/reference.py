"""The reference: Transformers, as a black box that is loaded faithfully, run and watched.

Loaded by `from_pretrained(dtype=...)` (`pretrained`), never cast afterwards: `.to(bfloat16)` would
round the rotary frequencies. What the load report says is checked, because the reference itself
goes on with random values where a tensor is missing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from portkit.errors import ReferenceUnavailable
from portkit.parity.pretrained import Loading, accepted, check_code, from_pretrained
from portkit.parity.probes.probe import Pass
from portkit.parity.sides.attention import visit_inputs
from portkit.parity.sides.experts import form_of_experts, plain_experts
from portkit.parity.sides.returned import Returned
from portkit.parity.sides.roles import Visit, visit_value
from portkit.parity.sides.routing import routing_as, routing_of, visit_routing
from portkit.parity.sides.sites import (
    AGAIN,
    ROTARY,
    CannotRun,
    watch_tables_of,
    weights_of,
)

# Where a multimodal model keeps the text model that sites are named after.
_TEXT_PREFIX = "model.language_model."
_EAGER = "eager_attention_forward"
_CACHES = ("past_key_values", "cache_params")
"""What families call the argument, and the field, that holds their cache."""


class Reference:
    """A checkpoint in the reference implementation, in evaluation mode; a side of a comparison."""

    def __init__(
        self,
        model: nn.Module,
        attention: str = "sdpa",
        notes: tuple[str, ...] = (),
        is_partial: bool = False,
    ) -> None:
        self.model, self.attention, self.notes = model, attention, notes
        self.is_partial = is_partial
        """It stands in the port's place, and what it lacks is not amiss."""
        self._sites = _text_modules(model)
        self._takes = frozenset(signature(model.forward).parameters)
        self._cache = next((one for one in _CACHES if one in self._takes), _CACHES[0])
        self._returned = Returned()

    @property
    def takes_positions(self) -> bool:
        return "position_ids" in self._takes

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def run(self, one: Pass, caches: dict[str, Any]) -> Tensor:
        """Raises `CannotRun` where the model lacks what the pass is made of."""
        if one.inputs is not None:
            return self._returned.of(self.model, one.inputs, self.dtype)
        given: dict[str, Any] = {"input_ids": one.input_ids, "use_cache": True}
        if self.takes_positions:
            given["position_ids"] = one.positions
        elif not (one.counts_on or one.counts_real):
            raise CannotRun("it takes no position_ids")
        if "attention_mask" in self._takes:
            given["attention_mask"] = self._mask(one)
        elif not bool(one.real.all()):
            raise CannotRun("it takes no attention_mask")
        if one.continues:
            if one.continues not in caches:
                raise CannotRun("it leaves no cache behind")
            given[self._cache] = caches.pop(one.continues)
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = one.num_logits or 0
        output = self.model(**{key: value for key, value in given.items() if key in self._takes})
        cache = getattr(output, self._cache, None)
        if cache is not None:
            caches[one.name] = cache
        logits: Tensor = output.logits
        return logits[:, -one.num_logits :] if one.num_logits else logits

    def _mask(self, one: Pass) -> Tensor | None:
        """Of past and new tokens; a model whose cache is a state is told of the new ones alone."""
        if one.attention_mask is None or self._cache == _CACHES[0]:
            return one.attention_mask
        return one.attention_mask[:, -one.num_tokens :]

    def differentiable_logits(self, input_ids: Tensor) -> Tensor:
        """Logits of (batch, tokens) ids in one pass without a cache, with their graph."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def module_sites(self) -> Mapping[str, nn.Module]:
        return self._sites

    def visit_output(self, name: str, output: Any, visit: Visit) -> Any:
        """A router's parts by what they are; of anything else each tensor."""
        routing = routing_of(output)
        if routing is None or any(True for _ in self._sites[name.partition(AGAIN)[0]].children()):
            return visit_value(name, output, visit)
        return routing_as(output, visit_routing(name, visit, routing), routing)

    def points_of(self, name: str) -> bool:
        return False

    def parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters by the port's names, those that there are."""
        return by_name(weights_of(self), names)

    @property
    def experts(self) -> str | None:
        """The form in which its experts run, in its own word; None where it has one form alone."""
        return form_of_experts(self.model)

    def plain_experts(self) -> Any:
        return plain_experts(self.model)

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
                causal = options.get("is_causal", getattr(module, "is_causal", None))
                query, key, value, mask = visit_inputs(
                    name, visit, (query, key, value), attention_mask, causal
                )
                context, weights = kernel(module, query, key, value, mask, **options)
                return visit(f"{name}#context", context), weights

            return watched

        with self._kernels_replaced(spy), self._returned.shown_to(visit):
            yield

    @contextmanager
    def other_kernel(self) -> Iterator[None]:
        """Run with the attention kernel that was not asked for: rounding of another kind.

        A model that has one kernel goes on with it.
        """
        model: Any = self.model
        asked = self.attention
        other = "eager" if asked == "sdpa" else "sdpa"
        if other not in self.kernels():
            yield
            return
        try:
            model.set_attn_implementation(other)
        except (ValueError, ImportError):  # it says itself that it has not
            yield
            return
        self.attention = other
        try:
            yield
        finally:
            self.attention = asked
            model.set_attn_implementation(asked)

    def kernels(self) -> dict[str, Callable[..., Any]]:
        """Those of its attention interface; none where it has an attention of its own."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        homes = self._homes()
        if not homes:
            return {}
        found = {"eager": getattr(homes[0], _EAGER)}
        if getattr(self.model, "_supports_sdpa", False):
            found["sdpa"] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return found

    def _homes(self) -> list[Any]:
        """The modules of Python in which an eager kernel lies that the model's classes use."""
        found = dict.fromkeys(sys.modules[type(m).__module__] for m in self._sites.values())
        return [home for home in found if hasattr(home, _EAGER)]

    @contextmanager
    def _kernels_replaced(self, wrap: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        with ExitStack() as stack:
            if self.attention == "sdpa":
                ALL_ATTENTION_FUNCTIONS["sdpa"] = wrap(ALL_ATTENTION_FUNCTIONS["sdpa"])
                stack.callback(ALL_ATTENTION_FUNCTIONS.pop, "sdpa")
            else:
                for home in self._homes():
                    before = getattr(home, _EAGER)
                    setattr(home, _EAGER, wrap(before))
                    stack.callback(setattr, home, _EAGER, before)
            yield

    def table_modules(self) -> Mapping[str, nn.Module]:
        return {n: m for n, m in self._sites.items() if n.endswith(ROTARY)}

    def watch_tables(self, visit: Visit) -> Any:
        """Called once a layer type where they differ, and then told which by its name."""
        return watch_tables_of(self.table_modules(), visit)


def is_of_transformers(model: object) -> bool:
    """Whether a model is one of the reference's own, told without importing it."""
    config = getattr(model, "config", None)
    return (
        isinstance(model, nn.Module)
        and hasattr(model, "set_attn_implementation")
        and hasattr(config, "get_text_config")
    )


def reference_of(model: nn.Module, *, is_partial: bool = False) -> Reference:
    """A model of Transformers that is at hand, as it is, in evaluation mode.

    `is_partial`: it stands in the port's place.
    """
    config: Any = model.config
    runs = getattr(config, "_attn_implementation", None) or "eager"
    notes = ("the reference was in training mode; it was compared in evaluation",)
    was_training = model.training
    return Reference(model.eval(), runs, notes if was_training else (), is_partial)


def _text_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the names that the text-only reference would give them."""
    modules = dict(model.named_modules())
    if _TEXT_PREFIX[:-1] not in modules:
        return modules
    text = {
        f"model.{n.removeprefix(_TEXT_PREFIX)}": m
        for n, m in modules.items()
        if n.startswith(_TEXT_PREFIX)
    }
    return {**text, "lm_head": modules["lm_head"]}


def by_name(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The reference's tensors under the port's names, those that there are.

    It stacks a layer's experts in blocks, gate over up: where the port holds an expert's matrix by
    itself (`experts.gate_proj.7`), it is taken out of its block.
    """
    found = {}
    for name in names:
        if (held := tensors.get(name)) is None:
            held = _out_of_a_block(tensors, name)
        if held is not None:
            found[name] = held
    return found


def _out_of_a_block(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    place = re.fullmatch(r"(.+)\.(gate|up|down)_proj\.(\d+)", name)
    if place is None:
        return None
    experts, part, number = place[1], place[2], int(place[3])
    block = tensors.get(f"{experts}.{'down' if part == 'down' else 'gate_up'}_proj")
    if block is None or number >= len(block):
        return None
    if part == "down":
        return block[number]
    return block[number].chunk(2)[part == "up"]


def is_available() -> bool:
    """Whether the reference is installed; it is an optional extra."""
    from importlib.util import find_spec

    return find_spec("transformers") is not None


def load_reference(
    directory: str | Path,
    dtype: torch.dtype,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
    *,
    by_inputs: bool = False,
    trusts_code: bool = False,
) -> Reference:
    """Load a checkpoint's folder. `attention`: sdpa or eager.

    `by_inputs`: it need be no causal language model. `trusts_code`: the checkpoint's own may run.

    A config that the reference rejects for the type of a value, as in `rms_norm_eps: 1`, is given
    to it in a patched copy, as is one whose `quantization_config` the user chose to ignore; the
    notes of the result say so. Raises `ReferenceUnavailable` where it
    is not installed, or did not load every tensor.
    """
    if not is_available():
        raise ReferenceUnavailable(
            "the reference, Transformers, is not installed: pip install 'portkit[parity]'"
        )
    import transformers

    said: Any = transformers.utils.logging
    said.set_verbosity_error()  # once it is imported, which sets a level of its own
    notes: list[str] = []
    how = Loading(dtype, attention, by_inputs, trusts_code)
    check_code(Path(directory), trusts_code, notes)
    try:
        with accepted(Path(directory), how, notes) as folder:
            model, report = from_pretrained(folder, how, notes)
    except Exception as error:  # it raises many kinds, and its own message is what helps
        reason = " ".join(str(error).split())
        raise ReferenceUnavailable(f"the reference cannot load {directory}: {reason}") from error
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := [one for one in map(str, report.get(key) or ()) if not _is_beside(one, model)]:
            names = ", ".join(sorted(keys)[:3])
            raise ReferenceUnavailable(
                f"the reference reports {key.replace('_', ' ')} in {directory}: {names}"
            )
    if not by_inputs:
        check_takes_tokens(model)
    # To a device and never to a dtype: that would round its constants.
    runs = getattr(model.config, "_attn_implementation", None) or attention
    return Reference(model.eval().to(torch.device(device)), runs, tuple(notes))


def check_takes_tokens(model: Any) -> None:
    """Raise `ReferenceUnavailable` where a model is no causal language model."""
    takes, named = signature(model.forward).parameters, type(model).__name__
    if (
        "input_ids" not in takes
        or getattr(model.config, "is_encoder_decoder", False)
        or model.get_output_embeddings() is None
        or any("ForMaskedLM" in one for one in (named, *(model.config.architectures or ())))
    ):
        raise ReferenceUnavailable(
            f"{next(iter(model.config.architectures or ()), named)} is no causal language model: "
            "give --inputs FILE (inputs= in Python), by the names of its arguments, such as "
            f"{', '.join(list(takes)[:2])}"
        )


def _is_beside(key: str, model: Any) -> bool:
    """Whether a tensor is of another part of a multimodal checkpoint whose text model was loaded.

    That no tensor of the text model is missing is asked separately, and that none is too many is
    the weight map's to say.
    """
    is_text_of_more = str(model.config.model_type).endswith("_text")
    return is_text_of_more and key.partition(".")[0] not in ("language_model", "model", "lm_head")
