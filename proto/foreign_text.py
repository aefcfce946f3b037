"""Make text of a guest, a container or an image safe to show on a terminal.

A terminal obeys escape sequences: they can hide what was printed, change the title, answer in the user's place.  They
begin with ESC or with a C1 control (U+0080 to U+009F, such as CSI, U+009B).  Sources: ECMA-48; Unicode, UTR 36.
"""

from __future__ import annotations

import codecs
import re

#: A whole control sequence or string, dropped for the sake of what stays readable.  Bounded: a longer one shows.
SEQUENCE = re.compile(r"(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,8}[@-~]|\x1b[ -/]{0,8}[0-Z\\^-~]")

#: What a line may not hold: controls but the tab, DEL, C1, line and paragraph separators, and what turns the direction.
CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

#: Characters that a filter keeps back for a sequence that may go on.
MAX_PENDING = 80


def one_line(text: str) -> str:
    """Return text as one line without control characters: each stands as ``\\xNN`` or ``\\uNNNN``."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable(text: str) -> str:
    """Return text of any number of lines without escape sequences and control characters, but for tabs and line ends.

    A carriage return ends a line, too: else what follows could be written over what precedes it.
    """
    text = SEQUENCE.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return "\n".join(CONTROLS.sub("", line) for line in text.split("\n"))


class TerminalFilter:
    """Filter a stream of bytes: UTF-8 in, printable UTF-8 out, whatever the pieces are in which it comes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = ""

    def __call__(self, data: bytes, *, final: bool = False) -> bytes:
        """Return what can be shown of the stream so far; ``final`` where nothing follows."""
        text = self._pending + self._decoder.decode(data, final)
        self._pending = ""
        # What may be the beginning of a sequence, or of a line's end, waits for the rest.
        start = max(text.rfind("\x1b"), text.rfind("\x9b"))
        if text.endswith("\r"):
            start = len(text) - 1 if start < 0 else min(start, len(text) - 1)
        elif start >= 0 and SEQUENCE.match(text, start):
            start = -1
        if start >= 0 and len(text) - start <= MAX_PENDING and not final:
            text, self._pending = text[:start], text[start:]
        return printable(text).encode()
