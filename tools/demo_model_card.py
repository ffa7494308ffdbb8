"""The model card of the demo checkpoint, written from what was measured.

Knows the card's words and layout; `make_demo_checkpoint.py` knows everything that is in it. Tests
read the figures back from the card, so that each stands in one place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """The figures and samples of one making; `nats_per_token` is on the held-out stories."""

    num_parameters: int
    num_steps: int
    batch_size: int
    context: int
    seed: int
    held_out_seed: int
    num_held_out: int
    nats_per_token: float
    bits_per_byte: float
    grammar_nats_per_token: float
    greedy: str
    sampled: str
    versions: str


CARD = """---
license: apache-2.0
language: en
library_name: portkit
pipeline_tag: text-generation
---

# portkit's demo checkpoint

A Gemma 3 in miniature ({num_parameters:,} parameters, bfloat16) that tells small children's stories
about small animals. It ships inside the package so that `portkit demo` needs no download. It knows
nothing but its stories.

Its shape is awkward on purpose, so that a port which is wrong about it is seen to be wrong: sliding
and full layers in an order that no pattern gives, a window shorter than the context, grouped
key-value heads, `hidden_size` other than heads times `head_dim`, `query_pre_attn_scalar` other
than `head_dim`, query and key norms, a tied head, a prime vocabulary.

## Making it

    python tools/make_demo_checkpoint.py --steps {num_steps} --seed {seed}

makes all of it from nothing: the text, which `tools/stories.py` writes from a grammar of our own;
then `portkit train` on it, which trains the tokenizer, a byte-level BPE, and the model, from random
weights by Muon and AdamW for {num_steps:,} steps of {batch_size} rows of {context} tokens; and this
card. This one was made on a CPU with {versions}. Training is seeded, but
another processor or another number of threads rounds differently and gives other weights of the
same kind.

## What was measured

On held-out stories, none of which was trained on, with the weights as they are stored and computing
in bfloat16. The stories are those of

    python tools/stories.py --seed {held_out_seed} --count {num_held_out}

| measure | value |
|---|---|
| held-out loss, nats per token | {nats_per_token:.4f} |
| held-out loss, bits per byte | {bits_per_byte:.4f} |
| the grammar's own choices, nats per token | {grammar_nats_per_token:.4f} |

The last line is what the choices that the generator made in writing these stories cost: about what
a reader would lose who knew the grammar by heart.

## What it says

The likeliest continuation of "Once upon a time":

{greedy}

One that is sampled as `generation_config.json` says:

{sampled}
"""


def write_card(file: Path, measured: Measured) -> None:
    """Write the card; samples become quoted paragraphs."""
    fields = {
        **vars(measured),
        "greedy": _quoted(measured.greedy),
        "sampled": _quoted(measured.sampled),
    }
    file.write_text(CARD.format(**fields), encoding="utf-8")


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))
