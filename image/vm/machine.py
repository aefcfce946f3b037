"""A VM, from the side of whoever starts or uses it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from image.vm.accel import choose_accelerator, choose_vsock
from image.vm.directory import VMDirectory, living, make_run_root
from image.vm.errors import VMError

ROOT = Path(__file__).resolve().parents[2]

#: Seconds until the agent has to answer: native, and emulated on a busy machine.
READY = {"kvm": 60.0, "tcg": 240.0}

#: Seconds for a supervisor to take everything down: it waits for two processes, twice at most.
STOPPING = 20.0


@dataclass(frozen=True)
class VMConfig:
    """What to boot and how: ``image`` is the directory of an image, ``memory`` in MiB."""

    image: Path
    name: str = "default"
    accel: str = "auto"
    vsock: str = "auto"
    memory: int = 512
    cpus: int = 1

    def __post_init__(self) -> None:
        if self.memory < 128:
            raise VMError(f"--memory is in MiB, at least 128; {self.memory} is too little for a guest")
        if not 1 <= self.cpus <= 255:
            raise VMError(f"--cpus is 1 to 255, not {self.cpus}")


class VM:
    """A running VM.  As a context manager it is stopped at the end, unless it was detached."""

    def __init__(self, directory: VMDirectory, starter: socket.socket | None = None) -> None:
        self._directory = directory
        self._starter = starter
        self._received = b""
        self._shown = 0  # bytes of the console that were handed on
        self._supervisor: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return self._directory.name

    @property
    def directory(self) -> Path:
        return self._directory.path

    @property
    def agent_socket(self) -> Path:
        """Where any gRPC client dials the agent."""
        return self._directory.agent_socket

    @property
    def info(self) -> dict[str, Any]:
        """vm.json: name, state, image, accel and vsock with their reasons, cid, memory, cpus, started, pids."""
        return self._directory.read()

    @classmethod
    def start(
        cls,
        config: VMConfig,
        *,
        ready: Callable[[Path], bool],
        report: Callable[[str], None] = lambda line: None,
        console: Callable[[bytes], None] | None = None,
        timeout: float | None = None,
    ) -> Self:
        """Boot a VM and wait until ``ready(agent_socket)`` says so; it is asked again and again, and may wait a little.

        ``report`` gets one line on what was picked and why, ``console`` what the guest prints meanwhile.  Raises
        VMError when the VM ends, or is not ready within ``timeout`` seconds; nothing is left then.
        """
        make_run_root()
        directory = VMDirectory.of(config.name)
        accelerator = choose_accelerator(config.accel)
        transport = choose_vsock(config.vsock)
        report(f"{accelerator.reason}; {transport.reason}")
        limit = timeout or READY[accelerator.name]
        vm = cls(directory)
        try:
            vm._spawn(config)
            deadline = time.monotonic() + limit
            follower = _Follower(directory.console, console)
            with follower:
                while not ready(vm.agent_socket):
                    vm._check()
                    if time.monotonic() > deadline:
                        raise VMError(f"the agent did not answer within {limit:.0f} s ({accelerator.reason})")
            vm._shown = follower.position
        except VMError as error:
            raise VMError(f"VM {config.name!r}: {error}{vm._abandon()}") from error
        except BaseException:
            vm._abandon()
            raise
        return vm

    def _spawn(self, config: VMConfig) -> None:
        self._starter, theirs = socket.socketpair()
        with theirs:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-m", "image.vm.supervisor", str(theirs.fileno())],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        document = {
            "directory": str(self.directory),
            "image": str(Path(config.image).resolve()),
            "accel": config.accel,
            "vsock": config.vsock,
            "memory": config.memory,
            "cpus": config.cpus,
        }
        self._starter.sendall(json.dumps(document).encode() + b"\n")
        message = self._receive(None)
        if "started" not in message:
            raise VMError(message.get("ended", "its supervisor died"))

    def _receive(self, timeout: float | None) -> dict[str, Any]:
        """The supervisor's next message; an empty one when the time is over.  End of file reads as its end."""
        assert self._starter is not None
        self._starter.settimeout(timeout)
        while b"\n" not in self._received:
            try:
                data = self._starter.recv(65536)
            except (BlockingIOError, TimeoutError):
                return {}
            except ConnectionError:
                data = b""
            if not data:
                return {"ended": "its supervisor died"}
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        return dict(json.loads(line))

    def _check(self) -> None:
        """Raise VMError when the VM has ended."""
        message = self._receive(0.0)
        if "ended" in message:
            raise VMError(message["ended"])

    def _abandon(self) -> str:
        """Take down what was started; returns what QEMU and the guest said last, if nobody has said it yet."""
        evidence = ""
        if self._starter is not None:
            with contextlib.suppress(OSError):
                self._starter.shutdown(socket.SHUT_WR)
            while message := self._receive(STOPPING):
                if "ended" in message:
                    evidence = message["ended"].partition("\n")[2]
                    break
            self._starter.close()
            self._starter = None
        if self._supervisor is not None:
            _finish(self._supervisor)
        return f"\n{evidence}" if evidence else ""

    def wait(self, console: Callable[[bytes], None] | None = None) -> None:
        """Follow a VM that was started here to its end.  Raises VMError when that was not the guest's own doing."""
        with _Follower(self._directory.console, console, self._shown):
            message = self._receive(None)
        if not message.get("ended", "").startswith("the guest has powered off"):
            raise VMError(f"VM {self.name!r}: {message.get('ended')}")

    def detach(self) -> None:
        """Let it live on without its starter."""
        assert self._starter is not None
        self._starter.sendall(b'{"detach": true}\n')
        self._starter.close()
        self._starter = None

    def stop(self, timeout: float = STOPPING) -> None:
        """End it; returns when nothing of it is left.  Raises VMError when that takes too long."""
        if self._starter is not None:
            self._abandon()
            return
        pid = self.info.get("pids", {}).get("supervisor")
        if pid is None or not self._directory.alive():
            return
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + timeout
        try:
            if self._directory.alive():  # it still is the one that was read about
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        finally:
            os.close(pidfd)
        while self._directory.alive():
            if time.monotonic() > deadline:
                raise VMError(f"VM {self.name!r} did not stop within {timeout:.0f} s; its supervisor is process {pid}")
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._starter is not None:
            self._abandon()


def _finish(supervisor: subprocess.Popen[bytes]) -> None:
    try:
        supervisor.wait(STOPPING)
    except subprocess.TimeoutExpired:
        supervisor.kill()  # its children and the janitor know what to do
        supervisor.wait()


class _Follower:
    """Hands what is appended to a file to a callback, in a thread, while the block runs and once more after it."""

    #: Seconds between looks: inotify would save little, and the file may not be there yet.
    INTERVAL = 0.05

    def __init__(self, file: Path, callback: Callable[[bytes], None] | None, position: int = 0) -> None:
        self._file = file
        self._callback = callback
        self.position = position
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="console", daemon=True)

    def _follow(self) -> None:
        while not self._stop.wait(self.INTERVAL):
            self._look()

    def _look(self) -> None:
        assert self._callback is not None
        try:
            with self._file.open("rb") as stream:
                stream.seek(self.position)
                data = stream.read()
        except FileNotFoundError:
            return
        self.position += len(data)
        if data:
            self._callback(data)

    def __enter__(self) -> None:
        if self._callback is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._callback is not None:
            self._stop.set()
            self._thread.join()
            self._look()


def find_vm(name: str) -> VM | None:
    """The living VM of this name, if there is one."""
    directory = VMDirectory.of(name)
    return VM(directory) if directory.alive() and directory.read() else None


def list_vms() -> list[VM]:
    """All living VMs of this user, by name."""
    return [VM(directory) for directory in living() if directory.read()]
