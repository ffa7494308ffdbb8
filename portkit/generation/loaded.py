"""A loaded checkpoint that speaks: what `portkit.load` returns, with its tokenizer.

    loaded = portkit.load("google/gemma-3-270m")
    print(loaded.generate("Once upon a time", max_new_tokens=40))

Runs the readable model. Knows neither terminals nor engines: `portkit generate` has those.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch

from portkit import loading
from portkit.errors import GenerationError
from portkit.generation.loop import generate
from portkit.generation.settings import GenerationSettings
from portkit.loading import LoadedModel
from portkit.tokenizer import Tokenizer


@dataclass(frozen=True)
class Loaded(LoadedModel):
    """A model ready to run, where it came from, and its tokenizer."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read when it is first asked for; `TokenizerError` where the checkpoint has none."""
        return Tokenizer.open(self.files)

    def generate(  # noqa: PLR0913  # the field's own names for what may be asked
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> str:
        """The text that follows `prompt`, in the way that generation_config.json says.

        What is None is as that file has it; `seed` is then drawn, and what only sampling reads asks
        for sampling. Raises a `PortkitError` on options that contradict each other, and where the
        prompt does not fit.
        """
        drawing = temperature, top_k, top_p, min_p
        if do_sample is None and any(one is not None for one in drawing):
            do_sample = True
        settings = GenerationSettings.read(
            self.files,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=secrets.randbits(32) if seed is None else seed,
            stop=tuple(stop) or None,
        )
        token_ids = self.tokenizer.encode(prompt)
        if not token_ids:
            raise GenerationError("an empty prompt has nothing to go on from: give some text")
        if max(token_ids) >= self.config.vocab_size:
            raise GenerationError(
                f"the tokenizer gives token {max(token_ids)}, outside a vocabulary of "
                f"{self.config.vocab_size}: is it another model's?"
            )
        limit = self.config.max_position_embeddings
        steps = generate(
            self.model, [token_ids], settings, context_length=limit, tokenizer=self.tokenizer
        )
        return "".join(step.text for step in steps)


def load(
    repo: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    attention: str = "sdpa",
) -> Loaded:
    """Load a checkpoint into portkit's port, in evaluation mode.

    `repo`: a directory or a Hub id. `dtype`: auto (the checkpoint's own), float32, bfloat16 or
    float16, or that of torch. `device`: auto, cpu, cuda or mps. `attention`: sdpa or eager. Raises
    a `PortkitError` on anything unfit.
    """
    word = str(dtype).removeprefix("torch.")
    loaded = loading.load(
        repo, revision=revision, dtype=word, device=str(device), attention=attention
    )
    return Loaded(**{one.name: getattr(loaded, one.name) for one in fields(loaded)})
