"""Finding the port for a `model_type`: families are entry points, a third party's like ours.

Knows the entry-point group; imports a family only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any

from portkit.architecture import Architecture
from portkit.errors import UnsupportedConfig

GROUP = "portkit.architectures"


def find(model_type: str) -> Architecture:
    """The architecture of a `model_type`; `UnsupportedConfig` lists what there is."""
    found = registered().get(model_type)
    if found is None:
        raise UnsupportedConfig(
            f"config.json: model_type is {model_type!r}; supported: {', '.join(registered())}"
        )
    architecture = found.load()
    assert isinstance(architecture, Architecture), f"{found.value} is not an Architecture"
    assert architecture.model_type == model_type, f"{found.value} is registered as {model_type}"
    return architecture


def registered() -> dict[str, EntryPoint]:
    """Entry points by `model_type`, sorted; none of them imported."""
    return {entry.name: entry for entry in _installed()}


def variants() -> dict[str, Path]:
    """Configs to train from scratch, by name: `variants/NAME.json` in a package with families."""
    packages = {entry.module.partition(".")[0] for entry in registered().values()}
    return {
        path.stem: path
        for package in sorted(packages)
        for path in sorted(Path(str(files(package))).glob("variants/*.json"))
    }


@cache
def _installed() -> tuple[EntryPoint, ...]:
    # Looked up once: it reads the metadata of every package there is, a tenth of a small load.
    return tuple(sorted(entry_points(group=GROUP), key=lambda entry: entry.name))


def is_ported(config: Mapping[str, Any]) -> bool:
    """Whether there is a port of a `config.json`'s family, whatever else stands in it."""
    return config.get("model_type") in registered()


def architecture_of(config: Mapping[str, Any], ignore: Collection[str] = ()) -> Architecture:
    """The architecture of a `config.json`; a quantised one is refused by its method's name, unless
    the key that says so is among those to `ignore`.
    """
    if isinstance(config.get("quantization"), Mapping) and "quantization" not in ignore:
        raise UnsupportedConfig(
            "config.json: quantization: this checkpoint is quantised by MLX and no port of a "
            "quantised checkpoint exists yet; take the unquantised repository, or write one with "
            "mlx_lm.convert --dequantize"
        )
    quantization = config.get("quantization_config")
    if quantization is not None and "quantization_config" not in ignore:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise UnsupportedConfig(
            f"config.json: quantization_config: this checkpoint is quantised "
            f"({method or 'method not named'}) and no port of a quantised checkpoint exists yet; "
            "take the unquantised repository, or, where its weights are plain all the same, go on "
            "with --ignore-config quantization_config"
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedConfig(
            "config.json: model_type is missing or not a word; supported: "
            f"{', '.join(registered())}"
        )
    return find(model_type)
