"""The reference's own class, loaded once more, with every module under another name.

The one port of which it is known beforehand that it is right at every module, for any family.
`renamed(directory, dtype, device)` is a factory as a porter writes one; its table of site pairs
says which name was which.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "zz_"


class Renamed(nn.Module):
    """A causal language model of Transformers whose modules have other names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sites = rename(model, f"{PREFIX}whole")
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self.add_module(f"{PREFIX}whole", model)

    def named(self, name: str) -> nn.Module:
        """The module that the reference calls so."""
        names = dict(reversed(line.split(" = ")) for line in self.sites.splitlines())
        return self.get_submodule(names[name])

    def forward(
        self, input_ids: Tensor, positions: Tensor, attention_mask: Any, cache: Any = None
    ) -> tuple[Tensor, Any]:
        model = self.get_submodule(f"{PREFIX}whole")
        given = {"position_ids": positions} if "position_ids" in self._takes else {}
        memory = "past_key_values" if "past_key_values" in self._takes else "cache_params"
        if memory == "cache_params" and attention_mask is not None:
            attention_mask = attention_mask[:, -input_ids.shape[1] :]  # of the new tokens alone
        output = model(
            input_ids, attention_mask=attention_mask, use_cache=True, **given, **{memory: cache}
        )
        return output.logits, output[memory]


def renamed(directory: Path, dtype: torch.dtype, device: torch.device) -> Renamed:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map=device)
    return Renamed(model.eval())


def renamed_eager(directory: Path, dtype: torch.dtype, device: torch.device) -> Renamed:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map=device, attn_implementation="eager"
    )
    return Renamed(model.eval())


def rename(model: nn.Module, root: str = "") -> str:
    """Rename each module below `model`, in place; the table that says what each was.

    `root` is what `model` itself will be called. Numbers in lists stay, and so do the names by
    which the code finds its modules: they are not in `named_modules` any more.
    """
    names = {module: name for name, module in model.named_modules()}
    for module in names:
        if isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        held = module._modules
        if not held:
            continue
        module._modules = {f"{PREFIX}{name}": child for name, child in held.items()}
        module.__class__ = _under_old_names(type(module))
    within = f"{root}." if root else ""
    return "\n".join(
        f"{within}{new} = {names[module]}" for new, module in model.named_modules() if new
    )


_ALIASED: dict[type[nn.Module], type[nn.Module]] = {}


def _under_old_names(kind: type[nn.Module]) -> type[nn.Module]:
    """The class, whose instances also find a child by the name that it had."""
    if kind not in _ALIASED:
        own: Callable[[Any, str], Any] = kind.__getattr__

        def find(self: Any, name: str) -> Any:
            child = self.__dict__["_modules"].get(f"{PREFIX}{name}")
            return own(self, name) if child is None else child

        _ALIASED[kind] = type(kind.__name__, (kind,), {"__getattr__": find})
    return _ALIASED[kind]
