"""Running VMs, as seen by everyone but their starters: found by their directories, watched and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from pathlib import Path

from caisson.image.vm.directory import VMDirectory, find_running, running_vms
from caisson.image.vm.errors import VMError
from caisson.proto.contract import VM_FORMAT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

#: Seconds for a supervisor to shut everything down: it asks, terminates and kills two processes.
STOP_TIMEOUT = 20.0


class RunningVM:
    """A VM that is running, or was when it was found."""

    def __init__(self, directory: VMDirectory, info: dict[str, Any]) -> None:
        self._directory = directory
        self._info = info

    @property
    def name(self) -> str:
        return self._directory.name

    @property
    def directory(self) -> Path:
        return self._directory.path

    @property
    def agent_socket(self) -> Path:
        """Return the Unix socket of the agent, for any gRPC client."""
        return self._directory.agent_socket

    @property
    def vsock_socket(self) -> Path:
        """Return the Unix socket on which CONNECT <port> reaches a port of the guest."""
        return self._directory.vsock_socket

    def host_port(self, port: int) -> Path:
        """Return the Unix socket to listen on for the guest's connections to a vsock port of the host."""
        return self.vsock_socket.with_name(f"{self.vsock_socket.name}_{port}")

    @property
    def manifest(self) -> dict[str, Any]:
        """Return the manifest of the guest's image.  Raises VMError if the VM has exited."""
        try:
            return dict(json.loads((self.directory / "image.json").read_text()))
        except FileNotFoundError:
            raise VMError(f"VM {self.name!r}: has ended; start it: caisson boot-vm {self.name} --detach") from None

    @property
    def architecture(self) -> str:
        """Return the guest's architecture as Debian has it: amd64.  Raises VMError if the VM has exited."""
        return str(self.manifest["arch"])

    @property
    def kernel_words(self) -> list[str]:
        """Return the words of the kernel's command line."""
        command = list(self.info.get("command", ()))
        return str(command[command.index("-append") + 1]).split() if "-append" in command else []

    @property
    def info(self) -> dict[str, Any]:
        """Return the current vm.json, or the last one read.

        It has name, state (starting or running), directory, image, accel and vsock with their reasons, cid, memory
        (MiB), cpus, shares, network, started (seconds since the epoch), spawned (when QEMU was, in seconds of this
        machine's CLOCK_MONOTONIC), boot_seconds once it is running, command and pids.
        """
        self._info = self._directory.read() or self._info
        return self._info

    def show(self, console: Callable[[bytes], None], *, follow: bool) -> None:
        """Pass on the guest's output so far, and with ``follow`` until the VM exits.  Raises OSError of ``console``."""
        from caisson.image.vm.logs import Follower  # late: only a viewer needs it

        with contextlib.closing(Follower(self._directory.console, console)) as log, self.exit_fd() as supervisor:
            log.read()
            if follow and supervisor is not None:
                while not select.select([supervisor], [], [], Follower.INTERVAL)[0]:
                    log.read()
                log.read()

    def exit_reason(self, timeout: float = 2.0) -> str | None:
        """Return why the VM has exited; None if it is still running after ``timeout`` seconds.

        For callers that have lost its agent: a VM takes a moment to exit.
        """
        with self.exit_fd() as supervisor:
            if supervisor is not None and not select.select([supervisor], [], [], timeout)[0]:
                return None
        from caisson.image.vm import exit_reason  # late: most never ask

        return exit_reason.read(self._directory).partition("\n")[0] or "its supervisor died"

    def stop(self, timeout: float = STOP_TIMEOUT) -> bool:
        """Stop it; returns when nothing of it is left.  Raises VMError on timeout (``timeout`` seconds).

        A VM that has already exited is not an error: returns False.
        """
        with self.exit_fd() as supervisor:
            if supervisor is None:
                return False
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(supervisor, signal.SIGTERM)
            ended, _, _ = select.select([supervisor], [], [], timeout)
        if not ended:
            pid = self._info["pids"]["supervisor"]
            raise VMError(f"VM {self.name!r}: did not stop within {timeout:.0f} s; kill its supervisor: kill -9 {pid}")
        return True

    @contextlib.contextmanager
    def exit_fd(self) -> Iterator[int | None]:
        """Yield a descriptor that becomes readable when the VM exits; None if it already has."""
        pid = self.info.get("pids", {}).get("supervisor")
        try:
            pidfd = None if pid is None else os.pidfd_open(pid)
        except ProcessLookupError:
            pidfd = None
        try:
            # The lock is held, so the pid is the supervisor's, and not reused.
            held = self._directory.is_running() and self._directory.read().get("pids", {}).get("supervisor") == pid
            yield pidfd if held else None
        finally:
            if pidfd is not None:
                os.close(pidfd)


def find_vm(name: str) -> RunningVM | None:
    """Return the running VM of this name; None if there is none.

    Raises VMError for an invalid name, and for a VM of an incompatible version of Caisson.
    """
    found = find_running(name)
    return RunningVM(*found) if found else None


def get_vm(name: str) -> RunningVM:
    """Return the running VM of this name.  Raises VMError listing the running ones."""
    vm = find_vm(name)
    if vm is None:
        from caisson.image.vm import exit_reason

        names = ", ".join(other.name for other in list_vms()) or "none"
        why = exit_reason.describe(VMDirectory.of(name))
        raise VMError(
            f"VM {name!r}: is not running; running: {names}; start it: caisson boot-vm {name} --detach"
            + (f"\n{why}" if why else "")
        )
    return vm


def list_vms() -> list[RunningVM]:
    """Return this user's running VMs, by name; those of incompatible versions are left out."""
    return vms_by_version()[0]


def vms_by_version() -> tuple[list[RunningVM], dict[str, str]]:
    """Return this user's running VMs, by name, and the versions of incompatible ones, by name."""
    vms, others = [], {}
    for directory in running_vms():
        info = directory.read()
        if info and info.get("format") == VM_FORMAT:
            vms.append(RunningVM(directory, info))
        elif info:
            others[directory.name] = str(info.get("version", "0.1"))
    return vms, others
