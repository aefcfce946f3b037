"""The process on the host that containerd and its clients take for a pod's containers.

It is in the pod's network namespace, for those that configure it by /proc/PID/ns/net, and in a mount namespace with a
container's root and nothing else, for those that copy files by /proc/PID/root (nerdctl): the host's are out of reach.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from pathlib import Path

from caisson.agent.base import syscalls
from caisson.agent.pods.network import NetworkError


class Holder:
    """A process that exits with this one, which keeps its network namespace."""

    def __init__(self, namespace: str = "") -> None:
        """Start to join the network namespace at a path, or to create one; `open` completes it."""
        self._named = namespace
        words = ["nsenter", f"--net={namespace}"] if namespace else []
        words += ["unshare", "--mount", "--propagation", "slave", *([] if namespace else ["--net"])]
        words += ["setpriv", "--pdeathsig", "KILL", "--", "cat"]
        self._process = subprocess.Popen(
            words, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        self._fd = -1

    def open(self) -> None:
        """Wait until the process is in the namespace; its root is an empty directory then.  Raises NetworkError."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._process.stdout as ready:
            with contextlib.suppress(BrokenPipeError):  # it has exited
                os.write(self._process.stdin.fileno(), b"\n")
            if ready.read(1) != b"\n":  # which `cat` returns: nothing is executed later, with another root
                self.close()
                raise NetworkError(f"network namespace {self._named or '(new)'}: cannot be joined")
        self._fd = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._replace_root(_empty())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def namespace(self) -> str:
        """The path of the network namespace, which outlives the process."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def change_root(self, directory: Path) -> None:
        """Make a directory, with the mounts below it, the root of the process.  Raises OSError if it does not exist."""
        self._replace_root(syscalls.open_tree(directory))

    def _replace_root(self, root: int) -> None:
        """Make a detached mount, whose descriptor this closes, the root of the process.

        It keeps the host's where that is an initramfs, which cannot be replaced.
        """
        syscalls.preload()

        def replace() -> None:
            with contextlib.suppress(OSError):
                _pivot(f"/proc/{self.pid}/ns/mnt", root)

        try:
            thread = threading.Thread(target=replace)  # it never leaves that namespace
            thread.start()
            thread.join()
        finally:
            os.close(root)

    def end(self) -> None:
        """End the process, and keep the network namespace.  Idempotent."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def close(self) -> None:
        """End the process, and close the network namespace.  Idempotent."""
        self.end()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _empty() -> int:
    """Return a detached mount of an empty directory that nobody can write to.  Raises OSError."""
    context = syscalls.fsopen("tmpfs")
    try:
        syscalls.fsconfig(context)
        return syscalls.fsmount(context, syscalls.MOUNT_ATTR_RDONLY)
    finally:
        os.close(context)


def _pivot(mount_namespace: str, root: int) -> None:
    """Move this thread into a mount namespace, and change the root of all processes in it.  Raises OSError.

    Source: pivot_root(2), 'pivot_root(".", ".")'.
    """
    namespace = os.open(mount_namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.unshare(syscalls.CLONE_FS)
        syscalls.setns(namespace, syscalls.CLONE_NEWNS)
    finally:
        os.close(namespace)
    top = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        syscalls.move_mount(root, top)
    finally:
        os.close(top)
    os.fchdir(root)
    syscalls.mount(None, ".", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", syscalls.MNT_DETACH)
