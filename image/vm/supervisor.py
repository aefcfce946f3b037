"""The one process that keeps a VM: it starts QEMU and the vsock back end, and takes everything down with it.

    python -m image.vm.supervisor FD     FD: a socket to whoever starts the VM; the configuration comes in on it as JSON

What is said on the socket, a JSON object a line:
    starter → supervisor    the configuration; later {"detach": true}
    supervisor → starter    {"started": …vm.json…}; later, or instead, {"ended": "why"} as the last

The end comes when QEMU or the back end ends, on SIGTERM, or when the starter goes away undetached (end of file on the
socket).  A killed supervisor cannot clean up, so others do: its children have the kernel's parent-death signal, and a
janitor (a shell, waiting for end of file on a pipe that only the supervisor holds) removes the directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from image.vm import qemu, vsock
from image.vm.accel import choose_accelerator, choose_vsock
from image.vm.directory import VMDirectory
from image.vm.errors import VMError

#: Seconds that QEMU and the back end get to end by themselves.
GRACE = 3.0

#: $1 the VM's directory, $2 the supervisor's process group.  `done` on the pipe: there is nothing to clean.  The
#: directory is held as the working directory, so that one that took its name meanwhile is not touched.
JANITOR = """
cd "$1" || exit
IFS= read -r word
[ "$word" = done ] && exit
kill -KILL -- "-$2" 2>/dev/null
rm -rf -- ./* ./.[!.]*
cd /
rmdir -- "$1" 2>/dev/null
"""


class Ended(Exception):
    """The VM is to end, or has; the text says why."""


def main() -> None:
    """Keep one VM until its end."""
    starter = socket.socket(fileno=int(sys.argv[1]))
    config = json.loads(starter.makefile("r").readline())
    directory = VMDirectory(Path(config["directory"]))
    why = "it was stopped"
    try:
        with directory.create() as lock:
            with _janitor(directory):
                try:
                    _keep(directory, config, starter, lock)
                except (Ended, VMError) as end:
                    why = str(end)
                finally:
                    why += _evidence(directory)
                    directory.remove()
    except VMError as error:
        why = str(error)
    _tell(starter, {"ended": why})


def _evidence(directory: VMDirectory) -> str:
    """What QEMU and the guest said last: after the directory is gone nobody can look it up."""
    texts = {"QEMU says": directory.qemu_tail(), "the console's last lines": directory.console_tail()}
    return "".join(f"\n{title}:\n{text}" for title, text in texts.items() if text)


def _tell(starter: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it has gone, or was detached
        starter.sendall(json.dumps(message).encode() + b"\n")


@contextlib.contextmanager
def _janitor(directory: VMDirectory) -> Iterator[None]:
    """Have somebody clean up after a supervisor that cannot."""
    reading, writing = os.pipe()
    words = ["/bin/sh", "-c", JANITOR, "caisson-janitor", str(directory.path), str(os.getpgrp())]
    quiet = subprocess.DEVNULL
    janitor = subprocess.Popen(words, stdin=reading, stdout=quiet, stderr=quiet, start_new_session=True)
    os.close(reading)
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            os.write(writing, b"done\n")
        os.close(writing)
        janitor.wait()


def _keep(directory: VMDirectory, config: dict[str, Any], starter: socket.socket, lock: IO[str]) -> None:
    """Start everything and wait for its end, which is raised as Ended."""
    image = Path(config["image"])
    text = (image / "image.json").read_text()
    # What runs here, also when the image has gone from the builder's cache.
    (directory.path / "image.json").write_text(text)
    manifest = json.loads(text)
    accelerator = choose_accelerator(config["accel"])
    transport = choose_vsock(config["vsock"])
    program = qemu.probe(qemu.architecture_of(manifest))
    with contextlib.ExitStack() as stack:
        stop, wake = socket.socketpair()
        stack.enter_context(stop), stack.enter_context(wake)
        wake.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: wake.send(b"."))
        log = stack.enter_context(directory.qemu_log.open("wb"))
        device = stack.enter_context(vsock.prepare(transport.name, directory))
        children: dict[str, subprocess.Popen[bytes]] = {}
        stack.callback(_end, children)
        children["vsock"] = _spawn(device.command, device.backend_fds, log)
        device.started()
        devices = qemu.Devices(
            console=directory.console,
            qmp=directory.qmp_socket,
            vsock=transport.name,
            vsock_fd=device.fd,
            cid=device.cid,
        )
        words = qemu.command(
            program, image, manifest, devices,
            name=directory.name, accelerator=accelerator.name, memory=config["memory"], cpus=config["cpus"],
        )  # fmt: skip
        children["qemu"] = _spawn(words, [device.fd], log)
        info = {
            "name": directory.name,
            "state": "running",
            "directory": str(directory.path),
            "image": str(image),
            "accel": accelerator.name,
            "accel_reason": accelerator.reason,
            "vsock": transport.name,
            "vsock_reason": transport.reason,
            "cid": device.cid,
            "memory": config["memory"],
            "cpus": config["cpus"],
            "started": time.time(),
            "command": list(words),
            "pids": {"supervisor": os.getpid()} | {name: child.pid for name, child in children.items()},
        }
        directory.write(info)
        _tell(starter, {"started": info})
        _watch(children, starter, stop)


def _spawn(words: Sequence[str], fds: Sequence[int], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """A child that the kernel kills when this process dies."""
    tied = ["setpriv", "--pdeathsig", "KILL", "--", *words]
    if shutil.which("setpriv") is None:
        raise VMError("setpriv is not installed; run: sudo apt-get install util-linux")
    return subprocess.Popen(tied, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=fds)


def _watch(children: dict[str, subprocess.Popen[bytes]], starter: socket.socket, stop: socket.socket) -> None:
    """Wait for whatever ends the VM; raises Ended."""
    pidfds = {os.pidfd_open(child.pid): name for name, child in children.items()}
    watched: list[Any] = [starter, stop, *pidfds]
    try:
        while True:
            ready, _, _ = select.select(watched, [], [])
            if stop in ready:
                raise Ended("it was stopped")
            for pidfd in ready:
                if pidfd in pidfds:
                    raise Ended(_obituary(pidfds[pidfd], children[pidfds[pidfd]]))
            if starter in ready:
                with contextlib.suppress(ConnectionError):
                    if b"detach" in starter.recv(4096):
                        watched.remove(starter)
                        continue
                raise Ended("the command that started it has ended")
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def _obituary(name: str, child: subprocess.Popen[bytes]) -> str:
    status = child.wait()
    title = {"qemu": "QEMU", "vsock": "the vsock device"}[name]
    if name == "qemu" and status == 0:
        return "the guest has powered off"
    if status < 0:
        return f"{title} was ended by {signal.Signals(-status).name}"
    return f"{title} exited with status {status}"


def _end(children: dict[str, subprocess.Popen[bytes]]) -> None:
    """End QEMU, then the back end: asked first, killed after a while."""
    for name in ("qemu", "vsock"):
        child = children.get(name)
        if child is None:
            continue
        child.terminate()
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


if __name__ == "__main__":
    main()
