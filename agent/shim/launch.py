"""The shim's command line: ``-namespace NS -address SOCKET -publish-binary PROGRAM -id ID [-bundle DIR] start|delete``.

``start`` delays every `docker run`, so this module imports almost nothing: it binds the socket, forks, and
prints the address while the server still imports.  Source: containerd, core/runtime/v2/README.md.
"""

from __future__ import annotations

import os
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

#: Where containerd's own shims have their sockets: only accessible to root, and short enough for sockaddr_un.
SOCKET_DIRECTORY = "/run/containerd/s"

#: Annotations of config.json that name the pod of a container, whose shim also serves it.
GROUPS = ("io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id")

#: The type of a runtime's options (options.py).
RUNTIME_OPTIONS = "runtimeoptions.v1.Options"

#: Backlog of connections while the server is still importing.
BACKLOG = 128

#: The highest score: include/uapi/linux/oom.h.
OOM_SCORE_ADJ_MAX = 1000

#: Tag of field 1, length-delimited: instance_id of a BootstrapParams, type_url of an Any.
_FIRST_STRING = 0x0A


class Arguments:
    """The command line from containerd, in Go's syntax: one dash or two, `-name value` or `-name=value`."""

    def __init__(self, words: Sequence[str], environment: Any = os.environ) -> None:
        """Raises ValueError for a flag that is unknown or lacks its value."""
        self.id = ""
        self.namespace = environment.get("NAMESPACE", "")
        self.address = environment.get("GRPC_ADDRESS", "")
        self.publish_binary = ""
        self.bundle = ""
        self.debug = self.version = self.info = False
        self.action = ""
        left = list(words)
        while left:
            word = left.pop(0)
            if not word.startswith("-"):
                self.action = word
                continue
            name, equals, value = word.lstrip("-").partition("=")
            if name in ("debug", "version", "info", "v"):
                setattr(self, "version" if name == "v" else name, value != "false")
            elif name in ("id", "namespace", "address", "publish-binary", "bundle", "socket"):
                if not equals:
                    if not left:
                        raise ValueError(f"-{name}: needs a value")
                    value = left.pop(0)
                setattr(self, name.replace("-", "_"), value)
            else:
                raise ValueError(f"-{name}: unknown flag; this program is called by containerd")


def start(arguments: Arguments, serve: Callable[[socket.socket, bytes, Arguments], None]) -> None:
    """Print the address of the shim that serves a container, starting it unless its pod already has one.

    ``serve`` runs in the new process until all containers are deleted; it gets the listening socket, and the runtime
    options as they came on standard input.  Raises OSError.
    """
    options = b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()
    path = socket_path(arguments, group_of(".") or arguments.id)
    if not _serves(path):
        listener = _bind(path)
        if os.fork() == 0:
            _become_server(lambda: serve(listener, options, arguments))
        listener.close()
    address = f"unix://{path}"
    with open("address", "w") as file:  # noqa: PTH123 - no pathlib at start
        file.write(address)
    if _bootstrap_id(options) == arguments.id:
        address = f'{{"version":3,"address":"{address}","protocol":"ttrpc"}}'
    sys.stdout.write(address)
    sys.stdout.flush()


def group_of(bundle: str) -> str:
    """Return the pod that a bundle's configuration names; empty for a container of its own, and for a sandbox, which
    has no configuration.  Raises OSError.
    """
    import json

    try:
        with open(f"{bundle}/config.json", "rb") as file:  # noqa: PTH123
            return group_in(json.load(file) or {})
    except FileNotFoundError:
        return ""


def group_in(document: dict[str, Any]) -> str:
    """Return the pod that a configuration names; empty for a container of its own."""
    annotations = document.get("annotations") or {}
    return next((annotations[name] for name in GROUPS if annotations.get(name)), "")


def socket_path(arguments: Arguments, group: str) -> str:
    """Return the socket of a group's shim: the same for all its containers, different for each containerd."""
    name = "/".join((arguments.address, arguments.namespace, group))
    return f"{SOCKET_DIRECTORY}/{_sha256(name.encode()).hexdigest()}"


def _sha256(data: bytes) -> Any:
    """Compute SHA-256 with Python's own module, if there is one: hashlib loads OpenSSL, 3 MiB that the server would
    keep.
    """
    for name in ("_sha2", "_sha256"):  # since Python 3.12, and before
        try:
            return __import__(name).sha256(data)
        except ImportError:
            pass
    import hashlib

    return hashlib.sha256(data)


def _serves(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def _bind(path: str) -> socket.socket:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)  # noqa: PTH103, PTH120
    try:
        os.unlink(path)  # noqa: PTH108 - of a shim that was killed
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(before)
    listener.listen(BACKLOG)
    return listener


def _become_server(serve: Callable[[], None]) -> NoReturn:
    """Leave containerd's session and streams, and serve.  What is printed goes to the bundle's log, if it has one."""
    os.setsid()
    _be_killed_before_containerd()
    null = os.open(os.devnull, os.O_RDWR)
    try:  # also for reading: writing to a FIFO without readers is an error
        log = os.open("log", os.O_RDWR | os.O_NONBLOCK)
    except OSError:
        log = null
    for fd, target in ((0, null), (1, log), (2, log)):
        os.dup2(target, fd)
    for fd in {null, log} - {0, 1, 2}:
        os.close(fd)
    status = 1
    try:
        serve()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _be_killed_before_containerd() -> None:
    """Raise this process's OOM score above containerd's, which it inherited."""
    with open("/proc/self/oom_score_adj", "r+") as file:  # noqa: PTH123
        score = int(file.read()) + 1
        file.seek(0)
        file.write(str(min(score, OOM_SCORE_ADJ_MAX)))


def _bootstrap_id(message: bytes) -> str:
    """Return instance_id of a containerd.runtime.bootstrap.v1.BootstrapParams (containerd 2.3 and later).

    Older ones send an Any, whose first field is its type_url: not a container's id.
    """
    if len(message) < 2 or message[0] != _FIRST_STRING or message[1] > 127:
        return ""
    return message[2 : 2 + message[1]].decode(errors="replace")
