"""Properties of a container's unit requested by annotations: org.systemd.property.NAME, as runc reads them.

A value is one of D-Bus in GVariant's text format, such as "uint64 5000000", "'inactive-or-failed'" or "['a.service']";
systemd-run(1) takes it in unit file syntax.
"""

from __future__ import annotations

import re
from ast import literal_eval

from caisson.agent.libcontainer.cgroups.base import CgroupError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    Value = bool | int | float | str | list[str]

PREFIX = "org.systemd.property."
#: Bits of the integer types, by keyword and by the letter of a signature; negative if signed.
INTEGERS = {
    "byte": 8, "int16": -16, "uint16": 16, "int32": -32, "uint32": 32, "int64": -64, "uint64": 64,
    "y": 8, "n": -16, "q": 16, "i": -32, "u": 32, "x": -64, "t": 64,
}  # fmt: skip
OTHERS = {"boolean": bool, "double": float, "string": str, "b": bool, "d": float, "s": str, "as": list}
NAME = re.compile(r"[A-Za-z]{3,}")
TYPE = re.compile(r"(?:@(?P<letter>[a-z]+)|(?P<word>[a-z]+[0-9]*))\s+(?=\S)")
STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
STRINGS = re.compile(rf"\[\s*(?:(?:{STRING})\s*(?:,\s*(?:{STRING})\s*)*)?\]", re.DOTALL)
NUMBER = re.compile(r"[+-]?(?:0x[0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
FLOAT = re.compile(r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][+-]?[0-9]+)?")
INFINITY = (1 << 64) - 1
#: Properties whose D-Bus form is not the unit file's with another unit of time.
PER_SECOND = "CPUQuotaPerSecUSec"


def properties(annotations: Mapping[str, str]) -> list[str]:
    """Return assignments as systemd-run(1) takes them, "TimeoutStopSec=5000000us".  Raises CgroupError."""
    return [_property(key, value) for key, value in annotations.items() if key.startswith(PREFIX)]


def _property(key: str, text: str) -> str:
    name = key.removeprefix(PREFIX)
    if not NAME.fullmatch(name):
        why = "too short" if len(name) < 3 else "contains non-alphabetic character"
        raise CgroupError(f"annotation {key} name incorrect: {why}")
    try:
        value = parse(text)
        if re.search(r"[a-z]Sec$", name):
            if isinstance(value, (bool, str, list)):
                raise ValueError("not a number")
            name, value = f"{name.removesuffix('Sec')}USec", int(value * 1_000_000)
    except ValueError as error:
        raise CgroupError(f"annotation {key}={text} value parse error: {error}") from None
    return _assignment(name, value)


def _assignment(name: str, value: Value) -> str:
    if isinstance(value, bool):
        return f"{name}={'yes' if value else 'no'}"
    if isinstance(value, list):
        return f"{name}={' '.join(value)}"
    if name == PER_SECOND and isinstance(value, int):
        return f"CPUQuota={value / 10_000:g}%"
    if name.endswith("USec") and isinstance(value, int):
        return f"{name.removesuffix('USec')}Sec={'infinity' if value == INFINITY else f'{value}us'}"
    return f"{name}={'infinity' if value == INFINITY else value}"


def parse(text: str) -> Value:
    """Parse a value: a boolean, a number, a string or an array of strings.  Raises ValueError."""
    rest, kind = text.strip(), ""
    found = TYPE.match(rest)
    if found:
        kind, rest = found["letter"] or found["word"], rest[found.end() :]
        if kind not in INTEGERS and kind not in OTHERS:
            raise ValueError(f"{kind!r} is not a type that a property may have here")
    value = _untyped(rest, as_float=OTHERS.get(kind) is float)
    if kind in INTEGERS:
        return _integer(value, INTEGERS[kind], kind)
    if kind and not isinstance(value, OTHERS[kind]):
        raise ValueError(f"{rest} is not of type {kind}")
    return value if kind or isinstance(value, (bool, str, float, list)) else _integer(value, -32, "int32")


def _untyped(text: str, *, as_float: bool) -> Value:
    if text in ("true", "false"):
        return text == "true"
    if NUMBER.fullmatch(text) and not as_float:
        digits = text.lstrip("+-")
        return int(text, 8 if digits.isdecimal() and digits.startswith("0") else 0)
    if FLOAT.fullmatch(text):
        return float(text)
    if re.fullmatch(STRING, text, re.DOTALL) or STRINGS.fullmatch(text):
        value: Value = literal_eval(text)  # its strings are Python's, too
        return value
    raise ValueError(f"{text!r} is not a value")


def _integer(value: Value, bits: int, kind: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not of type {kind}")
    low, high = (0, (1 << bits) - 1) if bits > 0 else (-(1 << (-bits - 1)), (1 << (-bits - 1)) - 1)
    if not low <= value <= high:
        raise ValueError(f"{value} does not fit {kind}")
    return value
