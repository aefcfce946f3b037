"""QEMU's machine protocol, as far as a supervisor needs it: connect, execute a command, wait for its response.

Each call is bounded in time.  Source: QEMU, docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from caisson.image.vm.errors import VMError
from caisson.image.vm.jsonsocket import JSONSocket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self


class QMPError(VMError):
    """QEMU did not answer, or returned an error; ``kind`` is the protocol's error class, if any."""

    def __init__(self, text: str, kind: str = "") -> None:
        super().__init__(text)
        self.kind = kind


class QMP:
    """A connection to a QEMU, past its greeting: ``version`` is what `--version` prints.  Events are ignored."""

    def __init__(self, path: Path, timeout: float = 2.0) -> None:
        """Connect; ``timeout`` in seconds is for that, and for each command.  Raises QMPError.

        QEMU serves one client per socket at a time; a second one waits until its timeout.
        """
        self._path = path
        self._timeout = timeout
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout)
        self._lines = JSONSocket(connection)
        try:
            connection.connect(str(path))
            greeting = self._receive(time.monotonic() + timeout).get("QMP")
            if greeting is None:
                raise QMPError(f"{path}: is not QEMU's monitor")
            self.version = _version(greeting.get("version") or {})
            self.execute("qmp_capabilities")
        except OSError as error:
            self.close()
            raise QMPError(f"{path}: {error.strerror or error}") from error
        except QMPError:
            self.close()
            raise

    def execute(self, command: str, arguments: dict[str, Any] | None = None, fds: Sequence[int] = ()) -> Any:
        """Run a command, optionally with descriptors, and return its result.  Raises QMPError."""
        deadline = time.monotonic() + self._timeout
        try:
            self._lines.send({"execute": command} | ({"arguments": arguments} if arguments else {}), fds)
        except OSError as error:
            raise QMPError(f"{self._path}: {command}: {error.strerror or error}") from error
        while True:
            answer = self._receive(deadline)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QMPError(f"{command}: {answer['error'].get('desc')}", str(answer["error"].get("class")))

    def _receive(self, deadline: float) -> dict[str, Any]:
        try:
            message = self._lines.receive(max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            raise QMPError(f"{self._path}: no answer within {self._timeout:g} s") from error
        except (OSError, ValueError) as error:
            raise QMPError(f"{self._path}: {error}") from error
        if message is None:
            raise QMPError(f"{self._path}: QEMU has closed the connection")
        return message

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _version(document: Mapping[str, Any]) -> str:
    """Return the version and the distribution's from a greeting (qapi/control.json, VersionInfo), as QEMU prints it."""
    numbers, package = document.get("qemu") or {}, document.get("package")
    version = ".".join(str(numbers.get(part)) for part in ("major", "minor", "micro"))
    return f"{version} ({package})" if package else version
