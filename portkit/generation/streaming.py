"""One row's text as its tokens arrive: stop strings end it, and are never shown in part.

Knows text and ids. Knows nothing of models, batches or end-of-sequence tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from portkit.tokenizer import Detokenizer


class TextStream:
    """Text in pieces, each held back while it may be the beginning of a stop string.

    Of several stop strings the one that is complete first ends the text, however the tokens happen
    to cut it. `stopped` says that this has happened.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take in the next id; returns the text that is now certain, maybe none."""
        return self._release(self._detokenizer.push(token_id), last=False)

    def finish(self) -> str:
        """What is left when no more ids come: nothing, where a stop string has ended the text."""
        return self._release(self._detokenizer.finish(), last=True)

    def _release(self, piece: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(text.find(stop) + len(stop), stop) for stop in self._stop if stop in text]
        if found:
            self.stopped = True
            end, stop = min(found, key=lambda match: (match[0], -len(match[1])))
            return text[: end - len(stop)]
        num_certain = len(text) - (0 if last else self._num_undecided(text))
        self._held = text[num_certain:]
        return text[:num_certain]

    def _num_undecided(self, text: str) -> int:
        """How many of the last characters may turn out to begin a stop string."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, len(stop))
                if text.endswith(stop[:length])
            ),
            default=0,
        )
