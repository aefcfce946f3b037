"""Immutable records: frozen dataclasses at a tenth of their cost.

Defining a dataclass compiles source text; for the agent's thirty records that is a tenth of its start-up, and under
emulation half a second of every boot.
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

        def but(self, **changes: Any) -> Self:
            """Return a copy with some fields replaced."""
            ...

else:

    class Record:
        """Base class whose annotations are fields, passed by position or name and immutable."""

        _fields = ()

        def __init_subclass__(cls):
            cls._fields = (*cls._fields, *cls.__annotations__)

        def __init__(self, *values, **named):
            fields, state = self._fields, self.__dict__
            if len(values) > len(fields):
                raise TypeError(f"{type(self).__name__} takes {len(fields)} values, not {len(values)}")
            state.update(zip(fields, values, strict=False))
            for name, value in named.items():
                if name in state or name not in fields:
                    raise TypeError(f"{type(self).__name__}: {name!r} is given twice or is not a field")
                state[name] = value
            for name in fields:
                if name not in state:
                    try:
                        state[name] = getattr(type(self), name)
                    except AttributeError:
                        raise TypeError(f"{type(self).__name__} needs {name!r}") from None

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
