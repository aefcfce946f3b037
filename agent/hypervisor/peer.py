"""The shim at the other end of a connection: its identity, its exit, and its mount namespace.

A shim mounts the roots of its containers in its own mount namespace, so whatever serves them must run there.
Sources: unix(7), SO_PEERCRED; pidfd_open(2); setns(2).
"""

from __future__ import annotations

import os
import select
import socket
import struct
from pathlib import Path

#: struct ucred: pid, uid, gid.
UCRED = struct.Struct("=iii")

#: A pidfd of the peer, immune to pid reuse.  Linux 6.5, asm-generic/socket.h.
SO_PEERPIDFD = 77


class PeerError(Exception):
    """The process at the other end cannot be served; the text is one line."""


class Peer:
    """A process connected to a Unix socket; must be closed."""

    def __init__(self, connection: socket.socket) -> None:
        """Raises PeerError for another user's process, and for one that has exited."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
        self.pid, uid, _ = UCRED.unpack(credentials)
        if uid != os.geteuid():
            raise PeerError(f"process {self.pid}: is of user {uid}; only user {os.geteuid()} is served")
        if self.pid <= 0:
            raise PeerError("the caller's process is not visible here; run it in this pid namespace")
        self.pidfd = self._open(connection)

    def _open(self, connection: socket.socket) -> int:
        try:
            return connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError:  # before Linux 6.5; it is waiting for a response, so its pid cannot be reused
            pass
        try:
            return os.pidfd_open(self.pid)
        except OSError as error:
            raise PeerError(f"process {self.pid}: has ended") from error

    @property
    def ended(self) -> bool:
        """Whether the process has exited."""
        return bool(select.select([self.pidfd], [], [], 0)[0])

    def is_directory(self, path: str) -> bool:
        """Return whether an absolute path is a directory, as the process sees it."""
        return Path(f"/proc/{self.pid}/root{path}").is_dir()

    def mount_namespace(self) -> int:
        """Open its mount namespace; returns a descriptor for the caller to close.  Raises PeerError."""
        try:
            namespace = os.open(f"/proc/{self.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise PeerError(f"process {self.pid}: its mounts cannot be reached: {error.strerror}") from error
        if self.ended:  # the pid may be another's by now
            os.close(namespace)
            raise PeerError(f"process {self.pid}: has ended")
        return namespace

    def close(self) -> None:
        """Close its pidfd.  Idempotent."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
