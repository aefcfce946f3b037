"""Drive the box of the runtime's tests through the OCI command line: the same tests, with a second driver."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.process.launch import Launched, Stdio
from tests.native.nsexec_support import Box, Reaper, children, descriptors
from tests.native.oci_support import OURS, become_subreaper

SECONDS = 60
#: The prefix that the command line puts before the runtime's own message.
PREFIXES = (
    "runc create failed: ", "exec failed: ", "unable to start container process: ", "error during container init: ",
)  # fmt: skip


class CommandFailed(LaunchError, SpecError):
    """A command failed; str() is the library's message."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)  # neither base class's own: their arguments differ
        self.step, self.path, self.errno = "command", "", 0
        self.field, self.why = "", message
        self.message = message

    def __str__(self) -> str:
        return self.message


class CommandBox(Box):
    """A box whose containers are created by commands.  Features that only the library has skip the test."""

    def __init__(self, path: Path, rootfs: Path, nsexec: Path) -> None:  # not Box's: there is no launcher
        become_subreaper()
        self.path = path
        self.rootfs = rootfs
        self.loop = asyncio.get_running_loop()
        self.reaper = Reaper(self.loop)
        self.created: list[Launched] = []
        self._ids: dict[int, str] = {}
        self._env = {"CAISSON_NSEXEC": str(nsexec)}
        self._fds, self._children = descriptors(), set(children())

    def __getattr__(self, name: str) -> NoReturn:
        pytest.skip(f"{name}: only in the library")

    async def create(self, value: dict[str, Any], **keywords: Any) -> Launched:
        """Create with this box's paths; stdio is /dev/null unless given."""
        name = "box" if not self._ids else f"box-{len(self._ids)}"
        options = ["create", "--bundle", str(self.path)]
        options += [] if keywords.pop("pivot", True) else ["--no-pivot"]
        options += [] if keywords.pop("keyring", True) else ["--no-new-keyring"]
        stdio, join = keywords.pop("stdio", None), keywords.pop("join", {})
        if value.get("linux", {}).get("resources"):  # so that the command creates a cgroup
            keywords.pop("cgroup", None)
        if keywords:
            pytest.skip(f"{', '.join(keywords)}: only in the library")
        value = copy.deepcopy(value)
        value.setdefault("root", {})["path"] = str(self.rootfs)
        linux = value.setdefault("linux", {})
        linux.setdefault("cgroupsPath", f"/caisson-{os.getpid()}-{name}")
        kept = [one for one in linux.get("namespaces", []) if one["type"] not in join]
        linux["namespaces"] = [*kept, *({"type": kind, "path": path} for kind, path in join.items())]
        (self.path / "config.json").write_text(json.dumps(value))
        launched = self._launch(options, name, stdio, terminal=value["process"].get("terminal", False))
        self._ids[launched.child.pid] = name
        self.created.append(launched)
        return launched

    async def start(self, launched: Launched) -> None:
        """Start a created container."""
        self._command("start", self._ids[launched.child.pid])

    async def exec(
        self, init: Launched, process: dict[str, Any], value: dict[str, Any] | None = None, **keywords: Any
    ) -> tuple[int, str, str]:
        """Exec and wait; return status, stdout, stderr."""
        if keywords:
            pytest.skip(f"{', '.join(keywords)}: only in the library")
        file = self.path / "process.json"
        file.write_text(json.dumps({"env": ["PATH=/bin"], "cwd": "/", **process}))
        with self.stdio() as (stdio, out, err):
            options = ["exec", "--detach", "--process", str(file)]
            launched = self._launch(options, self._ids[init.child.pid], stdio, terminal=False)
            os.close(launched.pidfd)
            status = await launched.child.wait()
        return status, out.read_text(), err.read_text()

    def _launch(self, options: list[str], name: str, stdio: Stdio | None, *, terminal: bool) -> Launched:
        """Run a command that leaves a container process, and claim that process."""
        pid_file, console = self.path / "pid", None
        with contextlib.ExitStack() as stack:
            if terminal:
                listener = stack.enter_context(socket.socket(socket.AF_UNIX))
                place = self.path / "console"
                place.unlink(missing_ok=True)
                listener.bind(str(place))
                listener.listen()
                options = [*options, "--console-socket", str(place)]
            stack.enter_context(self.reaper.expecting())
            self._command(*options, "--pid-file", str(pid_file), name, stdio=stdio)
            child = self.reaper.claim(int(pid_file.read_text()))
            if terminal:
                console = _receive(listener)
        return Launched(child, console, os.pidfd_open(child.pid))

    def _command(self, *args: str, stdio: Stdio | None = None) -> None:
        """Run a command.  Raises CommandFailed."""
        log = self.path / "log.json"
        log.unlink(missing_ok=True)
        streams = (stdio.stdin, stdio.stdout, stdio.stderr) if stdio else (subprocess.DEVNULL,) * 3
        command = [str(OURS), "--root", str(self.path / "root"), "--log", str(log), "--log-format", "json", *args]
        done = subprocess.run(
            command,
            stdin=streams[0],
            stdout=streams[1],
            stderr=streams[2],
            env={**os.environ, **self._env},
            timeout=SECONDS,
        )
        if done.returncode:
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            raise CommandFailed(_sentence([line["msg"] for line in lines if line["level"] == "error"][-1]))

    async def close(self) -> None:
        """Delete all containers and check that nothing is left: no child, no descriptor, no state."""
        for name in self._ids.values():
            self._command("delete", "--force", name)
        for launched in self.created:
            await launched.child.wait()
            if launched.console is not None:
                os.close(launched.console)
            os.close(launched.pidfd)
        self.reaper._reap()
        left = set(children()) - self._children
        self.loop.remove_signal_handler(signal.SIGCHLD)
        assert left == set()
        root = self.path / "root"
        assert not root.exists() or list(root.iterdir()) == []
        assert descriptors() <= self._fds


def _sentence(message: str) -> str:
    for prefix in PREFIXES:
        message = message.removeprefix(prefix)
    return message


def _receive(listener: socket.socket) -> int:
    listener.settimeout(SECONDS)
    connection, _ = listener.accept()
    with connection:
        _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
    os.set_inheritable(fds[0], False)
    return fds[0]
