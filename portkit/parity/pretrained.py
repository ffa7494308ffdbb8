"""A checkpoint's folder as Transformers loads it: by which class, with which config, whose code.

Knows the loader's public ways; what was loaded is `reference`'s to check.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import get_annotations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from portkit.errors import ReferenceUnavailable
from portkit.json_reading import read_object

CODE = "auto_map"
"""Where a config names classes of Python files beside it."""


@dataclass(frozen=True)
class Loading:
    """What is asked of the loader."""

    dtype: torch.dtype
    attention: str
    by_inputs: bool = False
    """The checkpoint's own class, and not the causal language model that could be made of it."""
    trusts_code: bool = False


def from_pretrained(folder: Path, how: Loading, notes: list[str]) -> tuple[Any, Any]:
    """The model and what was loaded; of a multimodal one whose other parts need packages that are
    not installed, the text model by its own class.
    """
    import transformers

    configs: Any = transformers.AutoConfig
    progress: Any = transformers.utils.logging
    progress.disable_progress_bar()
    trusted = {"trust_remote_code": True} if how.trusts_code else {}
    whole = configs.from_pretrained(folder, local_files_only=True, **trusted)
    loader = _loader(whole, how)
    options: dict[str, Any] = {
        "dtype": how.dtype,
        "attn_implementation": how.attention,
        "output_loading_info": True,
        "local_files_only": True,
        **trusted,
    }
    try:
        try:
            model, report = loader.from_pretrained(folder, **options)
        except ValueError as error:
            if "attn_implementation" not in str(error):
                raise
            del options["attn_implementation"]
            model, report = loader.from_pretrained(folder, **options)
            notes.append(f"the reference has no {how.attention} attention: it runs its own")
    except ImportError:
        text = whole.get_text_config()
        if text is whole or how.by_inputs:
            raise
        causal: Any = transformers.AutoModelForCausalLM
        model, report = causal._model_mapping[type(text)].from_pretrained(
            folder, config=text, **options
        )
        others = report.pop("unexpected_keys")
        notes.append(
            f"the reference is the text model by itself, {type(model).__name__}: the other parts "
            f"need packages that are not installed ({len(others)} of their tensors were not read)"
        )
    return model, report


def _loader(config: Any, how: Loading) -> Any:
    """The class that loads a checkpoint of this config."""
    import transformers

    causal: Any = transformers.AutoModelForCausalLM
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    brought: Mapping[str, str] = getattr(config, CODE, None) or {} if how.trusts_code else {}
    own = getattr(transformers, named, None)
    if brought:
        of_own = (auto for auto, where in brought.items() if where.endswith(f".{named}"))
        is_causal = causal.__name__ in brought and not how.by_inputs
        auto = causal.__name__ if is_causal else next(of_own, "AutoModel")
        return getattr(transformers, auto)
    is_causal = type(config) in causal._model_mapping
    if is_causal and not (how.by_inputs and own is not None):
        return causal
    return transformers.AutoModel if own is None else own


def check_code(folder: Path, trusts: bool, notes: list[str]) -> None:
    """Raise `ReferenceUnavailable` where a model is code of the checkpoint, and that is not to run.

    Where it is, say so.
    """
    import transformers

    raw = read_object(folder / "config.json", "config.json", ReferenceUnavailable)
    files = ", ".join(code_files(raw))
    kinds: Any = transformers.CONFIG_MAPPING
    if not files:
        return
    if trusts:
        notes.append(f"the reference ran code of the checkpoint ({files}), which was trusted")
    elif raw.get("model_type") not in kinds:
        raise ReferenceUnavailable(
            f"the reference is code that the checkpoint brings ({files}): read it, and give "
            "--trust-remote-code (trust_remote_code=True in Python) to have it run"
        )


def code_files(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The Python files that a raw config names: `modeling_x.Model` is in `modeling_x.py`."""
    named = config.get(CODE)
    found = named.values() if isinstance(named, dict) else ()
    classes = [one.rpartition("--")[2] for one in found if isinstance(one, str)]
    return tuple(dict.fromkeys(f"{one.partition('.')[0]}.py" for one in classes))


@contextmanager
def accepted(folder: Path, how: Loading, notes: list[str]) -> Iterator[Path]:
    """The folder itself, or one of links to its files beside a config that the reference takes."""
    import transformers

    auto: Any = transformers.AutoConfig
    raw = read_object(folder / "config.json", "config.json", ReferenceUnavailable)
    changed = []
    if raw.pop("quantization_config", None) is not None:
        changed.append("quantization_config was left out")
    try:
        trusted = {"trust_remote_code": True} if how.trusts_code else {}
        auto.from_pretrained(folder, local_files_only=True, **trusted)
    except Exception:  # again of many kinds
        changed += _retyped(raw)
        if not changed:
            raise
    if not changed:
        yield folder
        return
    notes += [f"the reference was given a patched config.json: {one}" for one in changed]
    with TemporaryDirectory() as made:
        for file in folder.iterdir():
            if file.name != "config.json":
                (Path(made) / file.name).symlink_to(file.resolve())
        (Path(made) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        yield Path(made)


def _retyped(raw: dict[str, Any]) -> list[str]:
    """Give values the types that the reference's config declares; change `raw`, and say how."""
    import transformers

    kinds: Any = transformers.CONFIG_MAPPING
    if raw.get("model_type") not in kinds:
        return []
    kind = kinds[raw["model_type"]]
    changed = []
    for section, declared in (
        (raw, kind),
        (raw.get("text_config"), kind.sub_configs.get("text_config")),
    ):
        if not isinstance(section, dict) or declared is None:
            continue
        types = {k: v for each in declared.__mro__[::-1] for k, v in get_annotations(each).items()}
        for key, value in section.items():
            named = types.get(key)
            new = _as_one_of(value, named.__name__ if isinstance(named, type) else str(named))
            if new is not value:
                section[key] = new
                changed.append(f"{key} {json.dumps(value)} became {json.dumps(new)}")
    return changed


def _as_one_of(value: Any, types: str) -> Any:
    """A number as the first of the named types that holds it; anything else as it is."""
    named = set(re.findall(r"\w+", types))
    if type(value).__name__ in named or type(value) not in (int, float):
        return value
    for kind in (float, int, bool):
        if kind.__name__ in named and (kind is bool or kind(value) == value):
            return kind(value)
    return value
