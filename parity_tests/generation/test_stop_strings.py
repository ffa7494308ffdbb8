"""Stop strings across token boundaries: found wherever they fall, and never shown in part."""

from __future__ import annotations

import random

import pytest

from portkit.generation.streaming import TextStream


class Letters:
    """Stands in for a detokenizer: an id is an index into a list of pieces."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def finish(self) -> str:
        return self.rest


def run(pieces: list[str], stop: tuple[str, ...], rest: str = "") -> tuple[list[str], str, bool]:
    stream = TextStream(Letters(pieces, rest), stop)
    shown = []
    for token_id in range(len(pieces)):
        shown.append(stream.push(token_id))
        if stream.stopped:
            break
    return shown, stream.finish(), stream.stopped


@pytest.mark.parametrize(
    ("pieces", "stop", "shown", "left", "stopped"),
    [
        (["ab", "cd"], (), ["ab", "cd"], "", False),
        (["abSTOPcd"], ("STOP",), ["ab"], "", True),
        (["STOP"], ("STOP",), [""], "", True),
        (["a", "bS", "TO", "Pc"], ("STOP",), ["a", "b", "", ""], "", True),
        (["a", "bS", "TO", "X", "c"], ("STOP",), ["a", "b", "", "STOX", "c"], "", False),
        (["a", "ST"], ("STOP",), ["a", ""], "ST", False),  # it ended before it was decided
        (["SSS", "TOP"], ("SSTOP",), ["S", ""], "", True),
        (["a\n", "\n", "b"], ("\n\n",), ["a", ""], "", True),
        (["xaby"], ("xaby", "ab"), ["x"], "", True),  # "ab" is complete first
        (["x", "a", "b", "y"], ("xaby", "ab"), ["", "", "x"], "", True),
        (["xab"], ("ab", "xab"), [""], "", True),  # complete together: the longer
        (["a", "b", "c"], ("abcd", "bx"), ["", "", ""], "abc", False),
    ],
)
def test_examples(pieces, stop, shown, left, stopped):
    assert run(pieces, stop) == (shown, left, stopped)


def test_a_stop_string_that_only_the_end_completes():
    stream = TextStream(Letters(["a", "\n"], rest="\nb"), ("\n\n",))
    assert [stream.push(0), stream.push(1)] == ["a", ""]
    assert (stream.finish(), stream.stopped) == ("", True)


def test_nothing_comes_after_the_stop():
    stream = TextStream(Letters(["aXb", "c"], rest="d"), ("X",))
    assert [stream.push(0), stream.push(1), stream.finish()] == ["a", "", ""]


def test_the_text_does_not_depend_on_where_tokens_end():
    draw = random.Random(5)
    num_stopped = 0
    for _ in range(3000):
        text = "".join(draw.choices("ab\n", k=draw.randrange(1, 14)))
        stop = tuple(
            "".join(draw.choices("ab\n", k=draw.randrange(1, 5))) for _ in range(draw.randrange(3))
        )
        whole = []
        for pieces in (list(text), cut(text, draw), [text]):
            shown, left, stopped = run(pieces, stop)
            whole.append(("".join(shown) + left, stopped))
            for end in range(len(shown)):  # what is shown is never taken back
                assert whole[-1][0].startswith("".join(shown[:end]))
        assert len(set(whole)) == 1
        assert whole[0][1] == any(one in text for one in stop)
        assert not any(one in whole[0][0] for one in stop)
        num_stopped += whole[0][1]
    assert num_stopped > 500


def cut(text: str, draw: random.Random) -> list[str]:
    places = sorted(draw.choices(range(len(text) + 1), k=3))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
