"""Read a JSON object of an OCI configuration field by field, so that no field goes unread."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypeVar

    T = TypeVar("T")

U32_MAX = 0xFFFF_FFFF
I64_MIN, I64_MAX = -(1 << 63), (1 << 63) - 1
U64_MAX = (1 << 64) - 1


class SpecError(Exception):
    """A field of an OCI configuration that is invalid, or that asks for something this runtime does not support.

    `field` is its path as in config.json (`linux.namespaces[2].type`), `why` is a sentence fragment.
    """

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
        self.why = why


class UnknownField(SpecError):
    """An unknown field: a drop-in for runc ignores it, unless it differs from a known one only in case.

    `meant` is that known field, "" for none.
    """

    def __init__(self, field: str, why: str, holder: dict[str, Any], key: str, meant: str = "") -> None:
        super().__init__(field, why)
        self._holder = holder
        self._key = key
        self._meant = meant

    def remove(self) -> str:
        """Remove the field from the document; return what was done with it.

        Field names are case-insensitive, and the last of several counts, as in Go's decoder.
        """
        value = self._holder.pop(self._key, None)
        if not self._meant:
            return f"ignored: {self}"
        before = self._holder.get(self._meant)
        merged = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
        self._holder[self._meant] = merged
        return f"{self.field}: is taken as {self._meant}"


class Reader:
    """One JSON object being read.  Every accessor marks its key as read; `done()` rejects the rest.

    An absent key, null, and the key's empty value ("" [] {}) all count as not given: hosts that convert from protocol
    buffers cannot distinguish them.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise SpecError(where or "config", f"must be an object, not {type(value).__name__}")
        self._values: dict[str, Any] = value
        self._read: list[str] = []
        self._where = where

    def name(self, key: str) -> str:
        """Return the full path of `key`, for error messages."""
        return f"{self._where}.{key}" if self._where else key

    @property
    def keys(self) -> list[str]:
        """All keys, of an object whose keys are names of something."""
        return [check_text(key, self._where) for key in self._values]

    def raw(self, key: str) -> Any:
        """Read a value as it is, None if absent."""
        self._read.append(key)
        return self._values.get(key)

    def text(self, key: str, default: str = "") -> str:
        """Read a string without NUL (no string of an OCI configuration can carry one into the kernel)."""
        value = self.raw(key)
        if value is None:
            return default
        return check_text(value, self.name(key))

    def flag(self, key: str) -> bool:
        """Read a boolean, False when absent."""
        value = self.raw(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise SpecError(self.name(key), f"must be true or false, not {value!r}")
        return value

    def number(self, key: str, low: int, high: int) -> int | None:
        """Read an integer within [low, high], None when absent."""
        value = self.raw(key)
        return None if value is None else check_number(value, self.name(key), low, high)

    def u32(self, key: str) -> int:
        """Read a 32-bit unsigned number, 0 when absent."""
        return self.number(key, 0, U32_MAX) or 0

    def texts(self, key: str) -> tuple[str, ...]:
        """Read a list of strings."""
        value = self.raw(key)
        if isinstance(value, list) and set(map(type, value)) <= {str} and not _why_not_text("".join(value)):
            return tuple(value)  # without the names of elements, which are for errors
        return self.each(key, check_text)

    def numbers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """Read a list of integers within [low, high]."""
        return self.each(key, lambda value, name: check_number(value, name, low, high))

    def each(self, key: str, parse: Callable[[Any, str], T]) -> tuple[T, ...]:
        """Read a list, every element through `parse(value, name)`."""
        value = self.raw(key)
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)):
            raise SpecError(self.name(key), f"must be a list, not {type(value).__name__}")
        return tuple(parse(element, f"{self.name(key)}[{index}]") for index, element in enumerate(value))

    def one(self, key: str, parse: Callable[[Any, str], T]) -> T | None:
        """Read a sub-object through `parse(value, name)`; None when absent or empty."""
        value = self.raw(key)
        return None if value is None or value == {} else parse(value, self.name(key))

    def table(self, key: str) -> Mapping[str, str]:
        """Read an object of strings."""
        value = self.raw(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise SpecError(self.name(key), f"must be an object, not {type(value).__name__}")
        return {
            check_text(name, self.name(key)): check_text(text, f"{self.name(key)}[{name}]")
            for name, text in value.items()
        }

    def refuse(self, key: str, why: str) -> None:
        """Raise SpecError if `key` is present and not empty."""
        if self.raw(key) not in (None, "", [], (), {}, False):
            raise SpecError(self.name(key), why)

    def done(self) -> None:
        """Raise if a key was never read: it would be ignored silently."""
        if left := self._values.keys() - self._read:
            key = min(left)
            meant = next((name for name in self._read if name.lower() == key.lower()), "")
            raise UnknownField(self.name(key), "is not a field this runtime knows", self._values, key, meant)

    def unknown(self, key: str, why: str) -> None:
        """Raise UnknownField if `key` is present and not empty."""
        if self.raw(key) not in (None, "", [], (), {}, False):
            raise UnknownField(self.name(key), why, self._values, key)


def check_text(value: object, name: str) -> str:
    """Return `value` if it is a string that can be given to the kernel.  Raises SpecError."""
    if not isinstance(value, str):
        raise SpecError(name, f"must be a string, not {value!r}")
    if why := _why_not_text(value):
        raise SpecError(name, why)
    return value


def _why_not_text(value: str) -> str:
    """Return why a string cannot be given to the kernel, or ""."""
    if "\0" in value:
        return "must not contain a NUL character"
    if value.isascii():
        return ""
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        return f"must not contain half a surrogate pair, {value[error.start]!r}"
    return ""


def check_number(value: object, name: str, low: int, high: int) -> int:
    """Return `value` if it is an integer within [low, high].  Raises SpecError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise SpecError(name, f"must be a whole number, not {value!r}")
    if not low <= value <= high:
        raise SpecError(name, f"must be between {low} and {high}, not {value}")
    return value
