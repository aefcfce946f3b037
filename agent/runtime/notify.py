"""NOTIFY_SOCKET: pass a container's readiness on to the service manager (sd_notify(3))."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from caisson.agent.libcontainer.container import Container
    from caisson.agent.runtime.bundle import Bundle
    from caisson.agent.runtime.main import Call
else:
    import _socket as socket

VARIABLE = "NOTIFY_SOCKET"
INSIDE = "/run/notify"
NAME = "notify.sock"
BARRIER_TIMEOUT = 5.0


def prepare(call: Call, bundle: Bundle, directory: str) -> None:
    """Mount the directory of a socket of its own into the container, if this program was given one."""
    if not os.environ.get(VARIABLE):
        return
    place = f"{directory}/notify"
    os.mkdir(place, 0o755)  # noqa: PTH102 - no pathlib at start
    os.chmod(place, 0o755)  # noqa: PTH101
    options = ["bind", "nosuid", "noexec", "nodev", "ro"]
    bundle.add_mount({"destination": INSIDE, "type": "bind", "source": place, "options": options})
    bundle.add_environment(f"{VARIABLE}={INSIDE}/{NAME}")


class NotifyListener:
    """The notify socket of a container, and the messages passed on."""

    def __init__(self, container: Container) -> None:
        """Bind it, if the container was prepared for it and this program has one to pass on to."""
        self._container = container
        self._host = os.environ.get(VARIABLE, "")
        self._socket: socket.socket | None = None
        place = f"{container.directory}/notify"
        if not self._host or not os.path.isdir(place):  # noqa: PTH112
            return
        fd = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:  # sun_path is too short for long paths
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.bind(f"/proc/self/fd/{fd}/{NAME}")
            os.chmod(f"{place}/{NAME}", 0o777)  # noqa: PTH101
        finally:
            os.close(fd)

    def wait_ready(self) -> None:
        """Wait until the container is ready, or exits; pass that on."""
        if self._socket is None:
            return
        from caisson.agent.libcontainer.state_directory import ContainerError
        from caisson.agent.libcontainer.waits import complete

        try:
            pidfd = self._container.pidfd()
        except ContainerError:
            return
        waits = self._container.runtime.waits
        try:
            while True:
                complete(waits.readable(self._socket.fileno(), pidfd))
                if not complete(waits.readable(self._socket.fileno(), seconds=0)):
                    return  # it has exited
                lines = self._socket.recv(4096).split(b"\n")
                ready = next((line for line in lines if line.startswith(b"READY=")), None)
                if ready is not None:
                    self._pass_on(ready)
                    return
        finally:
            os.close(pidfd)

    def _pass_on(self, ready: bytes) -> None:
        outside = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            address = "\0" + self._host[1:] if self._host.startswith("@") else self._host
            outside.connect(address)
            outside.send(ready + b"\n")
            outside.send(b"MAINPID=%d" % self._container.state.init_process_pid)
            self._barrier(outside)
        except OSError:  # there is no listener
            pass
        finally:
            outside.close()

    def _barrier(self, outside: socket.socket) -> None:
        """Wait until everything was read: the other side then closes the descriptor."""
        import select

        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, theirs.to_bytes(4, "little"))
            outside.sendmsg([b"BARRIER=1"], [rights])
        finally:
            os.close(theirs)
        poll = select.poll()
        poll.register(ours, select.POLLHUP)
        poll.poll(int(BARRIER_TIMEOUT * 1000))
        os.close(ours)

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
