"""Run the vhost-user device under test: a separate process, with the sockets of a VM's directory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import caisson.image.vm.vsock.vhost_user as package

CID = 42
AGENT = 1024
START = "import sys; sys.path.insert(0, {0!r}); from vhost_user.process import main\n"
START += "from vhost_user.limits import DeviceLimits\n"
START += "limits = DeviceLimits(); limits.__dict__.update({1!r}); sys.exit(main(sys.argv[1:], limits))"


class Backend:
    """The device's process.  ``limits`` overrides some of its limits."""

    def __init__(self, directory: Path, **limits: float) -> None:
        self.directory = directory
        self.hybrid, self.raw = str(directory / "vsock.sock"), str(directory / "agent.sock")
        self.control, theirs = socket.socketpair()
        ready, ready_writer = os.pipe()
        home = str(Path(package.__file__).parent)
        start = [home] if not limits else ["-c", START.format(str(Path(home).parent), limits)]
        argv = [sys.executable, "-I", "-S", *start, "--fd", str(theirs.fileno()), "--cid", str(CID)]
        argv += ["--socket", self.hybrid, "--raw", f"{self.raw}={AGENT}", "--ready-fd", str(ready_writer)]
        self.log = (directory / "log").open("w+")
        fds = (theirs.fileno(), ready_writer)
        self.process = subprocess.Popen(argv, pass_fds=fds, stderr=self.log)
        theirs.close()
        os.close(ready_writer)
        started = os.read(ready, 2)
        os.close(ready)
        if started != b"\n":
            raise AssertionError(f"the device did not start: {self.lines()}")

    def lines(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def rss(self) -> int:
        """Return private memory in KiB: without the guest's, which is shared."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0])

    def cpu(self) -> float:
        """Return the seconds of CPU time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def connect(self, path: str | None = None) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(path or self.raw)
        return sock

    def listen(self, port: int, backlog: int = 16) -> socket.socket:
        """Listen for the guest's connections to a port of the host."""
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(f"{self.hybrid}_{port}")
        sock.listen(backlog)
        sock.settimeout(10)
        return sock

    def finish(self, timeout: float = 10) -> int:
        self.control.close()
        return self.process.wait(timeout)

    def close(self) -> None:
        self.control.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            raise
        finally:
            self.log.close()
