"""Extract the agent's log from a console: a guest without a log port prints it there."""

from __future__ import annotations

import json
from collections.abc import Callable


class AgentLines:
    """Pass on the agent's lines of a console's output (JSON with a level), which may come in any pieces."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._rest = b""

    def __call__(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        found = [line.rstrip(b"\r") for line in lines if _is_logged(line)]
        if found:
            self._write(b"\n".join([*found, b""]))


def _is_logged(line: bytes) -> bool:
    try:
        document = json.loads(line)
    except ValueError:
        return False
    return isinstance(document, dict) and {"level", "msg"} <= document.keys()
