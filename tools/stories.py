"""Write small children's stories: python tools/stories.py [--seed N] [--count N]

Knows how a plot of `story_world` becomes text: which sentence of several is told, and that a name,
a pronoun, a colour or a place, once drawn, stays the same to the story's end. Story number `index`
of `seed` is the same text everywhere. Knows no word of any story, and nothing of tokens or models.

A plot is text. One line is one sentence or a few; a line that starts with `|` is another way to
tell the line above it, and a bare `|` is leaving it out; a line that starts with a space goes on
with the line above. `[a|b]` inside a line is a choice of words. An empty line ends a paragraph.
`{slot}` is a word drawn from the tables, `{Slot}` the same with a capital, `{a_slot}` with its
article. Words may hold slots themselves.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from story_world import PLOTS, TABLES

CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Story:
    """One story, and what was spent on it.

    `nats` is the sum of ln(number of options) over the draws that made the text: what it costs to
    tell this story from all others. Its mean over stories is an upper bound of the text's entropy,
    and close to it, so it is what a reader who knew the whole grammar would lose on a story.
    """

    text: str
    plot: str
    nats: float


def write_story(seed: int, index: int) -> Story:
    """Story number `index` (from 0) of `seed`; the same arguments give the same text everywhere."""
    return _Teller(random.Random(f"{seed}/{index}")).tell()


def write_stories(seed: int, count: int, start: int = 0) -> Iterator[Story]:
    """Stories `start` up to `start + count` of `seed`, in order."""
    for index in range(start, start + count):
        yield write_story(seed, index)


class _Teller:
    """Tells one story: draws what is needed when it is needed, and remembers it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.nats = 0.0
        self.words: dict[str, str] = {}

    def tell(self) -> Story:
        plot = self.draw(sorted(PLOTS))
        paragraphs = [self.paragraph(text) for text in PLOTS[plot].strip().split("\n\n")]
        return Story("\n\n".join(paragraphs), plot, self.nats)

    def draw(self, options: Sequence[Any]) -> Any:
        self.nats += math.log(len(options))
        return self.rng.choice(options)

    def paragraph(self, text: str) -> str:
        steps: list[list[str]] = []
        for line in text.replace("\n ", " ").split("\n"):
            if line.startswith("|"):
                steps[-1].append(line[1:].strip())
            else:
                steps.append([line])
        told = (self.fill(self.draw(step)) for step in steps)
        return " ".join(sentence for sentence in told if sentence)

    def fill(self, line: str) -> str:
        line = CHOICE.sub(lambda match: str(self.draw(match[1].split("|"))), line)
        return SLOT.sub(lambda match: self.word(match[1]), line)

    def word(self, slot: str) -> str:
        if slot.startswith("a_"):
            word = self.word(slot[2:])
            return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
        if slot[0].isupper():
            word = self.word(slot[0].lower() + slot[1:])
            return word[0].upper() + word[1:]
        if slot not in self.words:
            columns, rows = next(entry for entry in TABLES.items() if slot in entry[0].split())
            row = self.draw(rows)
            row = (row,) if isinstance(row, str) else row
            self.words.update(zip(columns.split(), row, strict=True))
        self.words[slot] = self.fill(self.words[slot])
        return self.words[slot]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write small children's stories to stdout.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=3)
    options = parser.parse_args()
    stories = write_stories(options.seed, options.count)
    print("\n\n* * *\n\n".join(story.text for story in stories))


if __name__ == "__main__":
    main()
