"""Text to token ids and back, as a checkpoint's own `tokenizer.json` says.

Knows how to turn a growing list of ids into text piece by piece. Knows no chat format and no model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from portkit.checkpoint import Files
from portkit.errors import TokenizerError
from portkit.tokenizer_backend import Backend
from portkit.tokenizer_files import Beside, read_beside

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """The tokenizer of one checkpoint; `open` reads it.

    `special_tokens` maps roles to text as the files beside it name them
    (`{"bos_token": "<bos>", …}`); `config` is `tokenizer_config.json`, {} where there is none.
    """

    def __init__(self, backend: Backend, beside: Beside) -> None:
        self._backend = backend
        self.config, self.special_tokens = beside.config, beside.roles
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")

    @classmethod
    def open(cls, files: Files) -> Tokenizer:
        """Read `tokenizer.json` and what there is beside it.

        Raises TokenizerError where the first is missing or one of them cannot be understood.
        """
        if not files.has("tokenizer.json"):
            raise TokenizerError(
                f"{files.origin} has no tokenizer.json: have Transformers write one with "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR), or give a checkpoint "
                "that comes with it"
            )
        beside = read_beside(files)
        backend = Backend(files.path("tokenizer.json"), files.origin, beside.added)
        return cls(backend, beside)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`; special tokens written out in it become their own ids.

        With `special`, the file's post-processor adds what a prompt begins with (BOS, as a rule):
        it alone decides, as it does for Transformers, whatever `add_bos_token` says. Without,
        nothing is added: so goes a rendered chat template, which spells its own BOS.
        Raises TokenizerError for text that is no Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                "the text is not valid Unicode, it holds half a surrogate pair or bytes that are "
                "not UTF-8: give it in UTF-8"
            ) from error
        return self._backend.encode(text, special)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text without anything added; the library shares them out to its threads.

        Raises TokenizerError where one cannot be encoded.
        """
        return self._backend.encode_many(texts)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return self._backend.vocab_size

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out, bytes that are no UTF-8 as U+FFFD.

        Ids beyond the vocabulary (a padded embedding has rows for them) have no text.
        """
        return self._backend.decode(ids)

    def stream(self, after: Sequence[int] = ()) -> Detokenizer:
        """A decoder for ids that arrive one by one behind the ids of `after`, a prompt's."""
        return Detokenizer(self, after)

    def has_text(self, token_id: int) -> bool:
        """Whether an id can add to a text: neither special nor beyond the vocabulary."""
        return (
            token_id not in self._backend.special_ids
            and self._backend.id_to_token(token_id) is not None
        )

    def is_byte(self, token_id: int) -> bool:
        """Whether an id stands for one raw byte (`<0xE2>`), of which several make a character."""
        return _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or "") is not None

    def _id_of(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self._backend.token_to_id(text)


class Detokenizer:
    """Text from ids that arrive one by one, never half a character.

    The pieces in a row are `decode(after + ids)` without its beginning `decode(after)`: a word
    keeps the space in front of it, which decoding it alone would lose.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Each id is decoded together with the settled ids just before it, not with all of them:
        # decoders look back no further, and a long text would take quadratic time.
        self._context = [token_id for token_id in after if tokenizer.has_text(token_id)]
        self._pending: list[int] = []
        self._num_sent = len(tokenizer.decode(self._context))

    def push(self, token_id: int) -> str:
        """Take in the next id; returns the text that no later id can change, maybe none."""
        if not self._tokenizer.has_text(token_id):
            return ""
        self._pending.append(token_id)
        if self._tokenizer.is_byte(token_id):
            # One bad byte turns a whole run of byte tokens into U+FFFD: nothing of it is certain.
            return ""
        text = self._tokenizer.decode(self._context + self._pending)
        # The beginning of a character reads as one U+FFFD at the very end.
        piece = self._send(text, len(text) - text.endswith(_REPLACEMENT))
        if self._num_sent == len(text):
            self._context, self._pending = self._pending, []
            self._num_sent = len(self._tokenizer.decode(self._context))
        return piece

    def finish(self) -> str:
        """What is left when no more ids come; half a character becomes U+FFFD."""
        text = self._tokenizer.decode(self._context + self._pending)
        return self._send(text, len(text))

    def _send(self, text: str, end: int) -> str:
        piece = text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        return piece
