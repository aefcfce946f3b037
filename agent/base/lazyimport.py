"""Modules that libraries import at once and use late: their code runs when something of them is wanted.

What importlib.util.LazyLoader does, but for modules that are imported twice: it takes the second import for a use.
"""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from typing import Any

#: What asyncio has for debugging and for TLS, and protobuf for machines without its C library: a tenth of the time from
#: Python's start to the agent's first answer.
LATE = ("inspect", "asyncio.sslproto", "google.protobuf.internal.python_message")


class Later:
    """Finds these modules as the path's finder does, and leaves them empty.  Source: importlib.abc."""

    def __init__(self, names: Iterable[str] = LATE) -> None:
        self._names = frozenset(names)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self._names:
            return None
        spec: ModuleSpec | None = sys.meta_path[-1].find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec

    def load(self) -> None:
        """Run the code of those that were imported: before there are threads, which could find one half done."""
        for name in self._names:
            module = sys.modules.get(name)
            if isinstance(module, _Empty):
                module._run()


class _Loader:
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader


class _Empty(ModuleType):
    """A module that was imported and not run."""

    def __getattr__(self, name: str) -> Any:
        """Only asked for what is not there yet.  The import system looks whether it has the likes of __path__."""
        if name.startswith("__"):
            raise AttributeError(name)
        self._run()
        return getattr(self, name)

    def _run(self) -> None:
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
