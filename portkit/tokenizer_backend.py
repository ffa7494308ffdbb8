"""The `tokenizers` library behind a wall: a checkpoint's `tokenizer.json` runs in a limited child.

That file is a program: patterns that may search for ever, replacements that double a text at every
step, code in another language that panics or ends the process. Both sides of the wall are here:
`Backend` asks, and `answerer` answers in the child, where alone the library is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from portkit.confined import Confined, Exhausted, Refused
from portkit.errors import TokenizerError

_AS_IT_CAME = "fetch it again, or update the tokenizers library"


class Backend:
    """A `tokenizer.json` as its library runs it. Raises TokenizerError wherever that fails.

    `origin` is what messages call where the file is from; `added` are tokens that other files add,
    each a `content` with the library's flags and whether it `replaces` one; `child` may serve
    others before and after, one at a time.
    """

    def __init__(
        self,
        path: Path,
        origin: str,
        added: Sequence[Mapping[str, Any]] = (),
        child: Confined | None = None,
    ) -> None:
        self._path, self._origin, self._added = path, origin, list(added)
        self._child = Confined(__name__) if child is None else child
        self._texts: dict[int, str | None] = {}
        self.special_ids: frozenset[int] = frozenset(self._open())
        """Of added tokens that stand for no text."""

    def encode(self, text: str, special: bool) -> list[int]:
        """The ids of a text; with `special`, also what the file's post-processor adds."""
        ids: list[int] = self._ask("encode the text", "encode", text=text, special=special)
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text without anything added, shared out to the library's threads."""
        ids: list[list[int]] = self._ask("encode the text", "encode_many", texts=list(texts))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        text: str = self._ask("decode tokens", "decode", ids=list(ids))
        return text

    def id_to_token(self, token_id: int) -> str | None:
        """How the vocabulary spells an id; None beyond it."""
        if token_id not in self._texts:
            self._texts[token_id] = self._ask("name a token", "token", id=token_id)
        return self._texts[token_id]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its spelling."""
        token_id: int | None = self._ask("name a token", "id", token=token)
        return token_id

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        size: int = self._ask("count its tokens", "vocab_size")
        return size

    def _open(self) -> list[int]:
        num_bytes = self._path.stat().st_size
        file = str(self._path.resolve())
        request = {"do": "open", "file": file, "added": self._added}
        try:
            special: list[int] = self._child.ask(request, num_bytes)
        except (Refused, Exhausted) as error:
            raise TokenizerError(
                f"tokenizer.json of {self._origin} cannot be read: {error}; {_AS_IT_CAME}"
            ) from None
        return special

    def _ask(self, what: str, do: str, **request: Any) -> Any:
        if not self._child.is_running:
            self._open()
        try:
            return self._child.ask({"do": do, **request})
        except (Refused, Exhausted) as error:
            raise TokenizerError(
                f"the tokenizer of {self._origin} cannot {what}: {error}; {_AS_IT_CAME}"
            ) from None


# -- in the child ------------------------------------------------------------------------------


def answerer() -> Callable[[dict[str, Any]], Any]:
    """What answers, holding the tokenizer that was opened last."""
    import tokenizers

    held: list[tokenizers.Tokenizer] = []

    def answer(request: dict[str, Any]) -> Any:
        do = request["do"]
        if do == "open":
            held[:] = [tokenizers.Tokenizer.from_file(request["file"])]
            # A file may keep the truncation and padding of its training; a prompt is taken whole.
            held[0].no_truncation()
            held[0].no_padding()
            _add(held[0], request["added"])
            added = held[0].get_added_tokens_decoder()
            return [token_id for token_id, token in added.items() if token.special]
        return _ANSWERS[do](held[0], request)

    return answer


def _add(tokenizer: Any, tokens: Sequence[Mapping[str, Any]]) -> None:
    """Add what is not among the added tokens yet; one that replaces also gives it its flags."""
    from tokenizers import AddedToken

    there = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for flags in tokens:
        new = AddedToken(**{name: value for name, value in flags.items() if name != "replaces"})
        old = there.get(new.content)
        if old is None or (flags["replaces"] and old != new):
            add = tokenizer.add_special_tokens if new.special else tokenizer.add_tokens
            add([new])
            there[new.content] = new


_ANSWERS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "encode": lambda one, asked: one.encode(asked["text"], add_special_tokens=asked["special"]).ids,
    "encode_many": lambda one, asked: [
        each.ids for each in one.encode_batch_fast(asked["texts"], add_special_tokens=False)
    ],
    "decode": lambda one, asked: one.decode(asked["ids"], skip_special_tokens=True),
    "token": lambda one, asked: one.id_to_token(asked["id"]),
    "id": lambda one, asked: one.token_to_id(asked["token"]),
    "vocab_size": lambda one, _: 1 + max(one.get_vocab().values(), default=-1),
}
