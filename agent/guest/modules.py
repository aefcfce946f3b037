"""Kernel modules in the image, loaded on demand.

There is no modprobe in a guest: the image lists the files of each module, in load order.
"""

from __future__ import annotations

import os

from caisson.agent.base import syscalls
from caisson.agent.base.errors import MissingArgument, ModuleNotLoaded, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from caisson.agent.base.log import Log

#: One line per module: its name, and its files with dependencies.
LISTED = "/lib/modules/caisson.later"
LOADED = "/sys/module"


def load_available(names: Iterable[str]) -> None:
    """Load those of these modules that are in the image.  Others are built in or missing, which their user will
    report.
    """
    listed = _listed()
    for name in names:
        if name in listed:
            load(name)


def load_bridge(log: Log) -> None:
    """Load the modules that the kernel, without modprobe, cannot load itself when a container creates a bridge."""
    try:
        load_available(("bridge",))
    except ModuleNotLoaded as error:
        log("warning", "containers cannot create bridges", error=str(error))


def load(name: str, parameters: Sequence[str] = ()) -> None:
    """Load a module, with parameters as in "debug=1".  Does nothing if it is loaded or built in.

    Raises ModuleNotLoaded or MissingArgument.
    """
    if not name:
        raise MissingArgument("Kernel module name is empty")
    spelled = name.replace("-", "_")
    if not spelled.replace("_", "").isalnum():
        raise ModuleNotLoaded(module=name, why="is not a valid module name")
    if os.path.isdir(f"{LOADED}/{spelled}"):  # noqa: PTH112 - no pathlib at start
        return
    files = _listed().get(spelled)
    if files is None:
        raise ModuleNotLoaded(module=name, why="it is not in the image")
    for file in files:
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                syscalls.finit_module(fd, " ".join(parameters) if file == files[-1] else "")
            finally:
                os.close(fd)
        except FileExistsError:
            continue
        except OSError as error:
            raise ModuleNotLoaded(module=name, why=f"{file}: {reason(error)}") from error


def _listed() -> dict[str, list[str]]:
    try:
        with open(LISTED) as file:  # noqa: PTH123 - no pathlib at start
            return {words[0]: words[1:] for words in (line.split() for line in file) if words}
    except OSError:
        return {}
