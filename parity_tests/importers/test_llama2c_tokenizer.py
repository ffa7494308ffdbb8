"""Imported tokenizers encode and decode as SentencePiece and llama2.c do.

SentencePiece itself is the judge of its `.model` files; of llama2.c's a slow reading of its rule.
"""

from __future__ import annotations

import math
import random
import re
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from portkit.errors import ImportFormatError
from portkit.importers.llama2c_tokenizer import read_llama2c_tokenizer
from portkit.importers.sentencepiece import read_sentencepiece
from portkit.importers.vocabulary import Kind, Piece, Vocabulary, to_tokenizer

Entries = list[tuple[float, bytes]]  # score and text of each piece, as llama2.c has them

TRAINED = {  # options of SentencePiece's trainer that change how a text is read
    "as Llama's": {"byte_fallback": True, "remove_extra_whitespaces": False},
    "without bytes": {"byte_fallback": False},
    "no prefix": {"byte_fallback": True, "add_dummy_prefix": False},
    "across words": {
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "split_by_whitespace": False,
    },
}


def random_texts(seed: int, alphabets: list[str], number: int = 400) -> list[str]:
    rng = random.Random(seed)
    return [
        "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 40)))
        for alphabet in alphabets
        for _ in range(number)
    ]


STRANGE = [
    "",
    " ",
    "   ",
    "  two  spaces  ",
    "a \n b \n\n  c\t",
    "na\u00efve \u2603 \U0001f642\U0001f642 \u65e5\u672c\u8a9e",
    "e\u0301\u200d\u00a0\ufeff",
    "<0x41> <unk",
    "aaaaaaaaaaaaaaaaaaaaaaaaa",
]


def corpus() -> list[str]:
    """Lines of made-up words, common ones more often, so that training finds long pieces."""
    rng = random.Random(5)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "an", "er", "ing")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(300)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    return [
        " ".join(rng.choices(words, weights, k=rng.randint(3, 12))) + rng.choice([".", "!", " 1."])
        for _ in range(1500)
    ]


def train(folder: Path, **options: object) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(folder / "tok"),
        minloglevel=2,
        num_threads=1,
        **{
            "vocab_size": 700,
            "model_type": "bpe",
            "character_coverage": 1.0,
            "normalization_rule_name": "identity",
            "allow_whitespace_only_pieces": True,
            **options,
        },
    )
    return folder / "tok.model"


def to_llama2c(model: Path) -> bytes:
    """What llama2.c writes of a SentencePiece model."""
    judge = sentencepiece.SentencePieceProcessor(model_file=str(model))
    names = {1: "\n<s>\n", 2: "\n</s>\n"}
    texts = [
        names.get(id_, judge.id_to_piece(id_)).replace("\u2581", " ").encode()
        for id_ in range(judge.vocab_size())
    ]
    return llama2c_bytes([(judge.get_score(id_), text) for id_, text in enumerate(texts)])


def llama2c_bytes(entries: Entries) -> bytes:
    return struct.pack("<i", max(len(text) for _, text in entries)) + b"".join(
        struct.pack("<fi", score, len(text)) + text for score, text in entries
    )


def llama2c_entries(data: bytes) -> Entries:
    entries, at = [], 4
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        entries.append((score, data[at + 8 : at + 8 + size]))
        at += 8 + size
    return entries


class Llama2c:
    """llama2.c's rule, said slowly: join the best pair of neighbours until there is none."""

    def __init__(self, entries: Entries) -> None:
        self.texts = [text for _, text in entries]
        self.scores = [score for score, _ in entries]
        self.ids = {text: id_ for id_, text in enumerate(self.texts)}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for character in " " + text if text else "":
            data = character.encode()
            ids += [self.ids[data]] if data in self.ids else [byte + 3 for byte in data]
        while True:
            best_score, best = -math.inf, None
            for index in range(len(ids) - 1):
                joined = self.ids.get(self.texts[ids[index]] + self.texts[ids[index + 1]])
                if joined is not None and self.scores[joined] > best_score:
                    best_score, best = self.scores[joined], (index, joined)
            if best is None:
                return [1, *ids]
            ids[best[0] : best[0] + 2] = [best[1]]

    def decode(self, ids: list[int]) -> bytes:
        data = b""
        for previous, id_ in pairwise(ids):
            text = self.texts[id_]
            byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", text)
            if byte:
                text = bytes([int(byte[1], 16)])
            elif previous == 1:
                text = text.removeprefix(b" ")
            data += text
        return data


@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_sentencepiece_models_encode_and_decode_as_the_library_does(tmp_path, options):
    model = train(tmp_path, **options)
    judge = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = to_tokenizer(read_sentencepiece(model))
    letters = "".join(sorted(set("".join(corpus()))))
    texts = [
        *STRANGE,
        *corpus()[:300],
        *random_texts(0, [letters, " ae.", "  \n\u2581bane\u00e9\u2603"]),
    ]
    for text in texts:
        ids = [1, *judge.encode(text)]
        assert tokenizer.encode(text).ids == ids, text
        if judge.unk_id() not in ids:
            assert tokenizer.decode(ids) == judge.decode(ids), text
    assert max(map(len, tokenizer.get_vocab())) > 8  # merges were really at work


def test_the_same_vocabulary_from_llama2c_encodes_the_same(tmp_path):
    model = train(tmp_path, **TRAINED["as Llama's"])
    (tmp_path / "tok.bin").write_bytes(to_llama2c(model))
    from_model = to_tokenizer(read_sentencepiece(model))
    from_llama2c = to_tokenizer(read_llama2c_tokenizer(tmp_path / "tok.bin"))
    assert from_llama2c.to_str() == from_model.to_str()


@pytest.mark.parametrize("seed", range(40))
def test_any_scores_encode_as_the_slow_rule_does(tmp_path, seed):
    """Vocabularies that no trainer makes: pieces longer than their parts score higher, or cannot
    be reached, and most texts can be cut in several ways."""
    rng = random.Random(seed)
    texts = {"".join(rng.choices("ab ", k=rng.randint(2, 5))) for _ in range(rng.randint(3, 40))}
    ordinary = [*"ab ", *sorted(texts)]
    scores = rng.sample(range(-1000, 1000), len(ordinary))
    entries = [(0.0, b"<unk>"), (0.0, b"\n<s>\n"), (0.0, b"\n</s>\n")]
    entries += [(0.0, f"<0x{byte:02X}>".encode()) for byte in range(256)]
    entries += [(float(score), text.encode()) for score, text in zip(scores, ordinary, strict=True)]
    (tmp_path / "tok.bin").write_bytes(llama2c_bytes(entries))
    slow = Llama2c(entries)
    tokenizer = to_tokenizer(read_llama2c_tokenizer(tmp_path / "tok.bin"))
    for text in [*STRANGE, *random_texts(seed, ["ab ", "abc"], number=100)]:
        ids = slow.encode(text)
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids).encode() == slow.decode(ids) == text.encode()


def test_tok512_encodes_and_decodes_as_llama2c_does(stories260k, data_folder):
    slow = Llama2c(
        llama2c_entries((data_folder / "weights" / "stories260K" / "tok512.bin").read_bytes())
    )
    tokenizer = Tokenizer.from_file(str(stories260k / "tokenizer.json"))
    text = (data_folder / "text" / "tinystories-v2-gpt4-sample.txt").read_text("utf-8")
    in_vocabulary = "".join(slow.texts[id_].decode() for id_ in range(259, 512))
    alphabets = [in_vocabulary, " tehand\n\u00fc"]
    for one in [*STRANGE, *text.split("\n")[:150], *random_texts(3, alphabets)]:
        ids = slow.encode(one)
        assert tokenizer.encode(one).ids == ids, one
        assert tokenizer.decode(ids).encode() == slow.decode(ids) == one.encode()
    rng = random.Random(4)
    for _ in range(300):  # a model's own choice of tokens is seldom what encoding would give
        ids = [1, *rng.choices([0x20 + 3, 0x0A + 3, *range(259, 512)], k=rng.randint(1, 20))]
        assert tokenizer.decode(ids).encode() == slow.decode(ids)


def test_tok105_encodes_as_sentencepiece_does(babyllama105, data_folder):
    model = data_folder / "weights" / "babyllama105" / "tok105.model"
    judge = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = Tokenizer.from_file(str(babyllama105 / "tokenizer.json"))
    text = (data_folder / "text" / "tinystories-v2-gpt4-sample.txt").read_text("utf-8")
    alphabet = "".join(map(judge.id_to_piece, range(3, 105)))
    texts = [
        *STRANGE,
        *text.split("<|endoftext|>")[:300],
        *random_texts(6, [alphabet, " a\n\u00fc\u2603"]),
    ]
    for one in texts:
        ids = [1, *judge.encode(one)]
        assert tokenizer.encode(one).ids == ids, one
        if judge.unk_id() not in ids:
            assert tokenizer.decode(ids) == judge.decode(ids), one
    assert judge.encode("a\u2603\u2603b").count(0) == 1  # unknown characters in a row are one token


@pytest.mark.parametrize("checkpoint", ["stories260k", "babyllama105"])
def test_transformers_opens_the_same_tokenizer(request, checkpoint):
    folder = request.getfixturevalue(checkpoint)
    ours, theirs = (
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        AutoTokenizer.from_pretrained(folder),
    )
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
    assert (
        len(theirs)
        == ours.get_vocab_size()
        == {"stories260k": 512, "babyllama105": 105}[checkpoint]
    )
    for text in [*STRANGE, *corpus()[:50], "Once upon a time , there 's a can n't ."]:
        ids = ours.encode(text).ids
        assert theirs(text).input_ids == ids
        assert theirs(text, add_special_tokens=False).input_ids == ids[1:]
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    pair = theirs("one", "two").input_ids
    assert pair == theirs("one").input_ids + theirs("two").input_ids


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "its type is unigram"),
        ({"model_type": "char"}, "its type is character"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it maps characters ('nmt_nfkc')"),
        ({"user_defined_symbols": ["<mask>"]}, "its piece '<mask>' is user-defined"),
        ({"treat_whitespace_as_suffix": True}, "it takes spaces as suffixes"),
        ({"bos_id": 2, "eos_id": 1, "unk_id": 3, "pad_id": 0}, "wants <unk>, <s>, </s> as pieces"),
    ],
)
def test_sentencepiece_models_that_are_no_llamas_are_refused(tmp_path, options, reason):
    model = train(tmp_path, **{"vocab_size": 120, "hard_vocab_limit": False, **options})
    with pytest.raises(ImportFormatError, match=re.escape(reason)):
        read_sentencepiece(model)


def test_scores_that_leave_the_order_open_are_refused():
    ends = [Piece("<unk>", 0, Kind.UNKNOWN), Piece("<s>", 0, Kind.CONTROL)]
    texts = [Piece(text, score, Kind.NORMAL) for text, score in (("a", 0), ("b", 0), ("c", 0))]
    tied = [Piece("ab", 1.5, Kind.NORMAL), Piece("bc", 1.5, Kind.NORMAL)]
    vocabulary = Vocabulary((*ends, Piece("</s>", 0, Kind.CONTROL), *texts, *tied), True, False)
    with pytest.raises(ImportFormatError, match="'ab' and 'bc' have the same score"):
        to_tokenizer(vocabulary)
