"""Defer execution of rarely used modules until first attribute access.

Like importlib.util.LazyLoader, which however executes a module when it is imported again.
"""

from __future__ import annotations

import sys
from _thread import RLock
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from typing import Any

#: asyncio's debugging and TLS support, and protobuf's fallback for a missing C library: a tenth of the time from
#: Python's start to the agent's first answer.
LATE = ("inspect", "asyncio.sslproto", "google.protobuf.internal.python_message")

#: Those that nothing accesses if protobuf has its C library (without it, protobuf's own import does).
UNUSED = frozenset({"google.protobuf.internal.python_message"})


#: Held while a deferred module is executed: other threads that access it meanwhile wait.
_EXECUTING = RLock()


class LazyImporter:
    """Find modules as the path finder does, but do not execute them yet.  Source: importlib.abc.MetaPathFinder."""

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
        """Execute the modules imported so far."""
        for name in self._names - UNUSED:
            module = sys.modules.get(name)
            if isinstance(module, _LazyModule):
                module._run()


def active_importers() -> list[LazyImporter]:
    """Return the importers that defer modules now."""
    return [one for one in sys.meta_path if isinstance(one, LazyImporter)]


def load_deferred() -> None:
    """Execute every module that was deferred so far, and defer no more."""
    for finder in active_importers():
        sys.meta_path.remove(finder)
        finder.load()


class _Loader:
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _LazyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader


class _LazyModule(ModuleType):
    """A module that is imported but not executed."""

    def __getattr__(self, name: str) -> Any:
        """Execute the module on first access; the import system's own look-ups (__path__) do not count."""
        if name.startswith("__"):
            raise AttributeError(name)
        self._run()
        return getattr(self, name)

    def _run(self) -> None:
        with _EXECUTING:
            if type(self) is ModuleType:  # another thread executed it first
                return
            spec = self.__spec__
            assert spec is not None and spec.loader is not None
            if spec.loader_state is _EXECUTING:  # its own code accesses an attribute not defined yet
                raise AttributeError(f"module {self.__name__!r} is executed at this moment")
            spec.loader_state = _EXECUTING
            try:
                spec.loader.exec_module(self)
            finally:
                spec.loader_state = None
            self.__class__ = ModuleType  # type: ignore[assignment]
