"""Pass the listener of a seccomp filter to the agent that answers its notifications.

nsexec reports the descriptor's number and waits; the runtime fetches it by pidfd_getfd(2), so that the filter may
already deny anything but write(2), and sends it to the Unix socket of `linux.seccomp.listenerPath` with a
ContainerProcessState. Sources: OCI runtime specification, config-linux.md, "Seccomp" and "The Container Process State";
seccomp_unotify(2).
"""

from __future__ import annotations

import sys

from caisson.agent.base import syscalls
from caisson.agent.base.json import dumps, loads
from caisson.agent.libcontainer.errors import LaunchError, reason
from caisson.agent.libcontainer.process.hooks import state
from caisson.agent.libcontainer.state import OCI_VERSION
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from caisson.agent.libcontainer.config.spec import Spec
else:
    import _socket as socket

FD_NAME = "seccompFd"  # the specification's
INT_SIZE = 4

#: ioctls of a listener, the size of struct seccomp_notif, and a struct seccomp_notif_resp behind its id: no value, no
#: error, SECCOMP_USER_NOTIF_FLAG_CONTINUE.
NOTIF_RECV, NOTIF_SEND, NOTIF_SIZE = 0xC0502100, 0xC0182101, 80
ANSWER = bytes(12) + (1).to_bytes(4, sys.byteorder)

TIMEOUT = 10.0  # seconds for an agent to accept it


class Listener(Record):
    """The destination of a filter's listener, and the process state to send with it.

    `init_pid` is the container's init process, if this is another one.
    """

    spec: Spec
    container_id: str
    bundle: str
    init_pid: int = 0

    def fetch(self, pidfd: int, number: int) -> int:
        """Duplicate the listener from the process that has loaded the filter.  Raises LaunchError."""
        try:
            return syscalls.pidfd_getfd(pidfd, number)
        except OSError as error:
            raise _error("cannot be fetched", error) from error

    def let_through(self, fd: int) -> None:
        """Let the kernel continue the pending call, which is nsexec's: only one, as the next may be another's."""
        import fcntl
        import select

        poll = select.poll()
        poll.register(fd, select.POLLIN)
        try:
            if any(events & select.POLLIN for _, events in poll.poll(0)):
                asked = bytearray(NOTIF_SIZE)
                fcntl.ioctl(fd, NOTIF_RECV, asked)
                fcntl.ioctl(fd, NOTIF_SEND, asked[:8] + ANSWER)
        except FileNotFoundError:  # ENOENT: the caller has exited
            return

    def send(self, fd: int, pid: int) -> None:
        """Send it to the agent, with the state of the process `pid`, and close it.  Raises LaunchError."""
        profile = self.spec.linux.seccomp
        assert profile is not None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(INT_SIZE, sys.byteorder))]
        with open(fd, "rb", buffering=0):
            document = self._process_state(pid, profile.listener_metadata)
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                client.settimeout(TIMEOUT)
                client.connect(profile.listener_path)
                sent = client.sendmsg([document], rights)
                if sent < len(document):
                    client.sendall(document[sent:])
            except OSError as error:
                raise _error(f"failed to connect with seccomp agent {profile.listener_path}", error) from error
            finally:
                client.close()

    def _process_state(self, pid: int, metadata: str) -> bytes:
        status = "running" if self.init_pid else "creating"
        document = {
            "ociVersion": OCI_VERSION,
            "fds": [FD_NAME],
            "pid": pid,
            "metadata": metadata,
            "state": loads(state(self.container_id, self.bundle, self.spec.annotations, status, self.init_pid or pid)),
        }
        return dumps({key: value for key, value in document.items() if value != ""}).encode()


def _error(what: str, error: OSError) -> LaunchError:
    return LaunchError(f"seccomp listener: {what}: {reason(error.errno or 0)}", step="seccomp", errno=error.errno or 0)
