"""`portkit inspect`: what a checkpoint is, from its config and header alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from portkit.cli import options
from portkit.cli.output import human_bytes, plural, print_json
from portkit.columns import table

if TYPE_CHECKING:
    from portkit.loading import Blueprint


def command(
    repo: options.Repo,
    revision: options.Revision = None,
    dtype: options.DTypeOption = options.DType.auto,
    ignore_config: options.IgnoreConfig = None,
    json: options.Json = False,
) -> None:
    """Say what a checkpoint is: architecture, sizes, bytes, cost of its cache. Reads no tensor."""
    from portkit.loading import draw, open_checkpoint, resolve_dtype

    checkpoint = open_checkpoint(repo, revision)
    blueprint = draw(checkpoint, ignore_config=ignore_config or ())
    itemsize = resolve_dtype(dtype, checkpoint).itemsize
    facts = {
        "model_type": blueprint.architecture.model_type,
        "parameters": blueprint.num_parameters,
        "weight_bytes": blueprint.num_parameters * itemsize,
        "stored_bytes": _stored_bytes(blueprint),
        "kv_bytes_at": _kv_bytes_at(blueprint, itemsize),
        "layers": blueprint.config.num_hidden_layers,
        "dtype": str(resolve_dtype(dtype, checkpoint)).removeprefix("torch."),
        "tensors": len(checkpoint.tensors) if checkpoint.has_weights else None,
        "files": checkpoint.weight_files if checkpoint.has_weights else [],
        "config": _config_fields(blueprint),
        "notes": list(blueprint.notes),
    }
    if json:
        print_json("inspect", **facts)
        return
    rows = [
        ("model", f"{repo}: {facts['model_type']} ({blueprint.architecture.summary})"),
        (
            "parameters",
            f"{facts['parameters']:,}, {human_bytes(facts['weight_bytes'])} in {facts['dtype']}",
        ),
    ]
    if checkpoint.has_weights:
        files = plural(len(facts["files"]), "file")
        stored = human_bytes(facts["stored_bytes"])
        rows.append(("on disk", f"{plural(facts['tensors'], 'tensor')}, {stored} in {files}"))
    else:
        rows.append(("on disk", "no weights here; sizes are from the config"))
    rows += [(key, str(value)) for key, value in facts["config"].items()]
    rows += [
        (f"cache at {tokens:,} tokens", human_bytes(count))
        for tokens, count in facts["kv_bytes_at"].items()
    ]
    rows += [("note", note) for note in blueprint.notes]
    print(table(rows))


def _stored_bytes(blueprint: Blueprint) -> int | None:
    if not blueprint.checkpoint.has_weights:
        return None
    return sum(info.num_bytes for info in blueprint.checkpoint.tensors.values())


def _kv_bytes_at(blueprint: Blueprint, itemsize: int) -> dict[int, int]:
    """Bytes of one row's keys and values at a few lengths up to the longest that it may have."""
    longest = blueprint.config.max_position_embeddings
    lengths = [n for n in (1024, 8192, 32768, 131072) if n < longest] + [longest]
    cache = blueprint.skeleton.new_cache(1, longest)
    return {length: cache.num_bytes(length, itemsize) for length in lengths}


def _config_fields(blueprint: Blueprint) -> dict[str, object]:
    """The family's config, with a list that repeats a pattern told as counts."""
    import dataclasses

    found: dict[str, object] = {}
    for field in dataclasses.fields(blueprint.config):
        value = getattr(blueprint.config, field.name)
        if isinstance(value, tuple):
            counts = {str(one): value.count(one) for one in dict.fromkeys(value)}
            found[field.name] = ", ".join(f"{count} x {one}" for one, count in counts.items())
        elif isinstance(value, (int, float, bool, str)) or value is None:
            found[field.name] = value
        elif isinstance(value, frozenset):
            found[field.name] = _layers_in_words(value)
        else:
            found[field.name] = _rope_in_words(value)
    return found


def _layers_in_words(layers: frozenset[int]) -> str:
    """`{0, 1, 2, 4}` as `0-2, 4`."""
    from itertools import groupby

    # Numbers that follow each other are as far from their places in the list.
    runs = groupby(enumerate(sorted(layers)), key=lambda place: place[1] - place[0])
    spans = [[number for _, number in run] for _, run in runs]
    words = (f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
    return ", ".join(words) or "none"


def _rope_in_words(value: object) -> str:
    import dataclasses
    from collections.abc import Mapping

    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_rope_in_words(one)}" for key, one in value.items())
    assert dataclasses.is_dataclass(value)
    given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return ", ".join(f"{name} {one}" for name, one in given.items() if one is not None)
