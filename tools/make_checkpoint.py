"""Make a checkpoint of random weights for a config.json, at full size:

    python tools/make_checkpoint.py CONFIG_DIR OUT [--layers N] [--dtype bfloat16] [--seed 0]
        [--max-shard-bytes N]

What cannot be downloaded can at least be had in its own size: for tests and benchmarks at the
shapes that are released. Of a multimodal config the language model alone is made.

Knows how weights must be spread so that activations stay sane through many layers, and how a config
is cut to fewer of them. What the tensors are called and how large they are the port knows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from portkit.checkpoint import CONFIG, Checkpoint, LocalFiles
from portkit.layout import MAX_SHARD_BYTES, new_folder, write_json, write_weights
from portkit.loading import COMPUTE_DTYPES, draw
from portkit.registry import architecture_of


def make_checkpoint(
    config: Mapping[str, Any],
    out: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write `config` and weights drawn from `seed` into the folder `out`; return their bytes.

    Raises a `PortkitError` where no port computes the config, or where `out` cannot be written;
    nothing is then left behind. Holds the weights once.
    """
    text = architecture_of(config).text_config(config)
    named = [key for key in ("dtype", "torch_dtype") if key in text] or ["dtype"]
    text |= dict.fromkeys(named, str(dtype).removeprefix("torch."))
    with new_folder(out) as folder:
        write_json(folder, CONFIG, text)
        blueprint = draw(Checkpoint(LocalFiles(folder)))
        skeleton = blueprint.skeleton
        plan = blueprint.architecture.weight_map.written(skeleton)
        weights = plan.split(random_weights(skeleton, dtype, seed))
        write_weights(folder, weights, max_shard_bytes)
    return sum(tensor.nbytes for tensor in weights.values())


def random_weights(skeleton: nn.Module, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """A tensor for each parameter of a model on the meta device, tied ones once.

    Matrices have the standard deviation 1 / sqrt(columns), which keeps the size of what they
    multiply; embeddings a quarter of it, or a head that is tied to one would say the last token
    again and again. Norms' weights lie around 0.5, away from the one and from the zero that would
    hide whether `weight` or `1 + weight` is meant.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = skeleton.named_modules()
    embeddings = {f"{name}.weight" for name, one in modules if isinstance(one, nn.Embedding)}
    weights = {}
    for name, parameter in skeleton.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=dtype)
        mean, std = (0.5, 0.2) if tensor.dim() == 1 else (0.0, tensor.shape[-1] ** -0.5)
        std *= 0.25 if name in embeddings else 1.0
        weights[name] = tensor.normal_(mean, std, generator=generator)
    return weights


def cut_layers(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The same config with the first `num_layers` layers, in every list with an entry a layer."""
    whole = config.get("num_hidden_layers")
    cut = dict(config)
    for key, value in config.items():
        if key == "text_config":
            cut[key] = cut_layers(value, num_layers)
        elif key == "num_hidden_layers":
            cut[key] = num_layers
        elif isinstance(value, list) and len(value) == whole:
            cut[key] = value[:num_layers]
    return cut


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make a checkpoint of random weights for a config.json, at full size."
    )
    parser.add_argument("config_dir", type=Path, help="a folder with a config.json")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--layers", type=int, help="keep only so many of the first layers")
    parser.add_argument("--dtype", choices=sorted(COMPUTE_DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-bytes", type=int, default=MAX_SHARD_BYTES)
    options = parser.parse_args()
    config = Checkpoint(LocalFiles(options.config_dir)).config
    if options.layers is not None:
        config = cut_layers(config, options.layers)
    num_bytes = make_checkpoint(
        config,
        options.out,
        dtype=COMPUTE_DTYPES[options.dtype],
        seed=options.seed,
        max_shard_bytes=options.max_shard_bytes,
    )
    print(f"{options.out}: {num_bytes:,} bytes of weights", file=sys.stderr)


if __name__ == "__main__":
    main()
