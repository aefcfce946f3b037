"""Immutable records: frozen dataclasses at a tenth of their cost.

Defining a dataclass compiles source text; for the agent's thirty records that is a tenth of its start-up, and under
emulation half a second of every boot.  On the host, it is a fifth of the imports before a VM starts.
"""

from __future__ import annotations

from types import MappingProxyType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Self, dataclass_transform

    @dataclass_transform(frozen_default=True)
    class Record:
        """Base class whose annotations are fields, passed by position or name and immutable."""

        def __post_init__(self) -> None:
            """Check the fields of a new record."""

        def but(self, **changes: Any) -> Self:
            """Return a copy with some fields replaced."""
            ...

else:
    MISSING = object()

    class Record:
        """Base class whose annotations are fields, passed by position or name and immutable."""

        _fields = ()

        def __init_subclass__(cls):
            cls._fields = (*cls._fields, *cls.__annotations__)
            cls._defaults = {name: getattr(cls, name, MISSING) for name in cls._fields}
            cls._required = [name for name, value in cls._defaults.items() if value is MISSING]

        def __init__(self, *values, **named):
            fields, state = self._fields, self.__dict__
            state.update(self._defaults)
            state.update(zip(fields, values, strict=False))
            state.update(named)
            if len(values) > len(fields):
                raise TypeError(f"{type(self).__name__} takes {len(fields)} values, not {len(values)}")
            if len(state) > len(fields) or (values and not named.keys().isdisjoint(fields[: len(values)])):
                raise TypeError(f"{type(self).__name__}: one of {', '.join(named)} is given twice or is not a field")
            for name in self._required:
                if state[name] is MISSING:
                    raise TypeError(f"{type(self).__name__} needs {name!r}")
            self.__post_init__()

        def __post_init__(self):
            """Check the fields of a new record."""

        def but(self, **changes):
            """Return a copy with some fields replaced."""
            return type(self)(**{**self.__dict__, **changes})

        def __setattr__(self, name, value):
            raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")

        def __delattr__(self, name):
            raise AttributeError(f"{type(self).__name__}.{name} cannot be removed")

        def __eq__(self, other):
            return type(self) is type(other) and self.__dict__ == other.__dict__

        def __hash__(self):
            return hash((type(self), *self.__dict__.values()))

        def __repr__(self):
            return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


#: An immutable empty mapping, for defaults.
NOTHING: Mapping[Any, Any] = MappingProxyType({})
