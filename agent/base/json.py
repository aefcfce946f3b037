"""JSON through only the standard library's C code.

`import json` imports regular expressions, which take a command as long as all its other imports.
If Python has no C code for JSON (other implementations), the package is used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SPACE = " \t\n\r"


class JsonError(ValueError):
    """Invalid JSON; str() says where."""


class _Context:
    """The attributes of a decoder that the scanner needs."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int = float, int

    @staticmethod
    def parse_constant(name: str) -> Any:
        raise JsonError(f"{name} is not a JSON value")


def loads(text: str) -> Any:
    """Decode one value.  Raises JsonError."""
    try:
        from _json import make_scanner
    except ImportError:  # not CPython
        return _slow_loads(text)
    start = len(text) - len(text.lstrip(SPACE))
    try:
        value, end = make_scanner(_Context())(text, start)  # type: ignore[arg-type]
    except StopIteration as stop:
        raise JsonError(f"no JSON value at character {stop.value}") from None
    except RecursionError:
        raise JsonError("nested too deeply") from None
    except (SystemError, ValueError):  # it has no error messages unless the package is imported
        return _slow_loads(text)
    if text[end:].strip(SPACE):
        raise JsonError(f"more than one JSON value: extra data at character {end}")
    return value


def _slow_loads(text: str) -> Any:
    import json

    try:
        return json.loads(text, parse_constant=_Context.parse_constant)
    except (ValueError, RecursionError) as error:
        raise JsonError(str(error)) from None


def dumps(value: Any, indent: int = 0) -> str:
    """Encode a value: on one line without blanks, or with members on lines of their own."""
    return "".join(_pieces(value, " " * indent, "\n"))


def _pieces(value: Any, step: str, line: str) -> list[str]:
    if isinstance(value, str):
        from _json import encode_basestring

        return [encode_basestring(value)]
    if value is None or isinstance(value, bool):
        return [{None: "null", True: "true", False: "false"}[value]]
    if isinstance(value, (int, float)):
        return [repr(value)]
    inner = line + step
    open_, close = "{}" if isinstance(value, dict) else "[]"
    if not value:
        return [open_, close]
    pieces = [open_]
    for number, item in enumerate(value):
        pieces.append(("," if number else "") + (inner if step else ""))
        if isinstance(value, dict):
            pieces += [*_pieces(item, step, inner), ": " if step else ":", *_pieces(value[item], step, inner)]
        else:
            pieces += _pieces(item, step, inner)
    pieces.append((line if step else "") + close)
    return pieces
