"""Test guests' text on a terminal: no control character gets through, in one piece or in several."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caisson.proto.foreign_text import TerminalFilter, one_line, printable

HOSTILE = "\x1b]0;title\x07 \x1b[31mred\x1b[0m \x9b2J \x1bc gone\rover \x00\x7f \u202eevil"


#: Classes of characters that change the direction of the text after or around them.
DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def harmless(text: str) -> bool:
    return all(
        letter in "\n\t"
        or (
            unicodedata.category(letter) not in ("Cc", "Zl", "Zp")
            and unicodedata.bidirectional(letter) not in DIRECTIONS
        )
        for letter in text
    )


def test_sequences_are_dropped_and_words_stay() -> None:
    assert printable("\x1b[1;31mred\x1b[0m\r\n") == "red\n"
    assert harmless(printable(HOSTILE))
    assert "red" in printable(HOSTILE)
    assert printable("50%\r100%\n") == "50%\n100%\n"


def test_one_line_shows_what_was_there() -> None:
    assert one_line("a\nb\x1b[2J\x9b") == "a\\nb\\x1b[2J\\x9b"
    assert one_line("größe\t✓") == "größe\t✓"


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\x1b\x9b[]\r\n;0mHJ")), max_size=200))
def test_no_control_character_gets_through(text: str) -> None:
    assert harmless(printable(text))
    assert harmless(one_line(text))
    assert "\n" not in one_line(text)


@given(st.lists(st.binary(max_size=20), max_size=20))
def test_a_stream_in_pieces_is_harmless_too(pieces: list[bytes]) -> None:
    filtered = TerminalFilter()
    out = b"".join([*(filtered(piece) for piece in pieces), filtered(b"", final=True)])
    assert harmless(out.decode())


@pytest.mark.parametrize("text", ["plain ✓ text\n", "\x1b[31mred\x1b[0m\r\nnext\r\n", HOSTILE])
def test_pieces_make_no_difference(text: str) -> None:
    filtered = TerminalFilter()
    data = text.encode()
    out = b"".join(filtered(data[number : number + 1]) for number in range(len(data))) + filtered(b"", final=True)
    assert out.decode() == printable(text)


def test_an_endless_sequence_is_not_kept() -> None:
    filtered = TerminalFilter()
    out = filtered(b"\x1b[" + b"0" * 1000) + filtered(b"0" * 100000)
    assert len(out) > 100000
