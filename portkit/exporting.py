"""Writing a loaded model back as a Hugging Face folder.

The weight map is run backwards: each parameter goes to disk as the tensors it was read from, under
the text model's names, beside the text model's config.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from portkit.checkpoint import CONFIG, LocalFiles
from portkit.errors import ExportError
from portkit.layout import MAX_SHARD_BYTES, new_folder, write_json, write_weights
from portkit.loading import LoadedModel

_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def export(
    loaded: LoadedModel, directory: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Write `loaded` as config, safetensors and tokenizer files; the text model alone.

    `directory` must not exist, or be empty. Raises `ExportError`; nothing is then left behind.
    """
    target = Path(directory)
    source = loaded.files
    if isinstance(source, LocalFiles) and target.resolve() == source.directory.resolve():
        raise ExportError(
            f"{target} is the checkpoint itself, and its file is mapped; name another"
        )
    tensors = state_dict(loaded)
    with new_folder(target, needed_bytes=sum(one.nbytes for one in tensors.values())) as folder:
        write_json(folder, CONFIG, exported_config(loaded))
        for name in filter(source.has, _COMPANIONS):
            shutil.copyfile(source.path(name), folder / name)
        write_weights(folder, tensors, max_shard_bytes)
    return target


def state_dict(loaded: LoadedModel) -> dict[str, Tensor]:
    """The tensors of an export by name, in the model's order; a shared one once."""
    parameters = loaded.model.named_parameters(remove_duplicate=False)
    held = {name: one.detach() for name, one in parameters}
    tensors = loaded.plan.split(held)
    for tied in loaded.plan.tied:
        if tied not in loaded.report.tied:
            tensors[tied.parameter] = held[tied.parameter]
    return tensors


def exported_config(loaded: LoadedModel) -> dict[str, Any]:
    """`config.json` of the exported text model, naming the dtype that its tensors have."""
    config = loaded.architecture.text_config(loaded.blueprint.checkpoint.config)
    named = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return {**config, **dict.fromkeys(named, loaded.report.dtype)}
