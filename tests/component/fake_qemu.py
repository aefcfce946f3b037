"""Play QEMU for tests of a VM's life without a guest; and find what a VM has left behind."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from caisson.image.vm import VM, VMConfig
from caisson.image.vm.qmp import QMP, QMPError
from tests.support.poll import wait_until

#: Make an image whose guest follows these instructions.
Images = Callable[[str], Path]

#: Prints its version, writes to the console, and does what the image's command line says.
PROGRAM = """#!{python} -IS
import json, os, signal, socket, sys, time
if "--version" in sys.argv:
    print("QEMU emulator version 9.9.9")
    sys.exit()
def option(start):
    return next(word for word in sys.argv if word.startswith(start))
words = sys.argv[sys.argv.index("-append") + 1].split()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
console = open(option("file,id=console").partition("path=")[2], "w", buffering=1)
if "kvm" in sys.argv:
    if "kvm-dies" in words:
        sys.exit("qemu: failed to set MSR 0x10a to 0x69")
    if "kvm-mute" in words:
        open(option("file,id=firmware").partition("path=")[2], "w")
        time.sleep(1000)
if "mute" not in words:
    console.write("line one\\x1b[2J\\nlast words of the guest\\n")
if "stubborn" in words:
    signal.signal(signal.SIGTERM, lambda *_: console.write("ignores a request to exit\\n"))
if "fail" in words:
    sys.exit("qemu: no such machine")
if "poweroff" in words:
    signal.sigwait([signal.SIGUSR1])
    if "panic" in words:
        console.write("[    1.79] Kernel panic - not syncing: Fatal exception\\n" + "[    3.65] more\\n" * 20)
    sys.exit(0)
if "qmp" in words:
    server = socket.socket(socket.AF_UNIX)
    server.bind(option("unix:")[5:].partition(",")[0])
    server.listen()
    states = socket.socket(socket.AF_UNIX)
    while True:
        stream = server.accept()[0].makefile("rw", buffering=1)
        stream.write('{{"QMP": {{"version": {{"qemu": {{"major": 9, "minor": 9, "micro": 9}}}}}}}}\\r\\n')
        for line in stream:
            request = json.loads(line)
            command, path = request["execute"], request.get("arguments", {{}}).get("uri", "")[5:]
            console.write(f"monitor: {{command}}\\n")
            if command == "migrate":
                states.connect(path)
                states.sendall(b"state")
                if "endless" in words and os.fork() == 0:
                    while True:
                        states.sendall(bytes(1 << 20))
                states.close()
            elif command == "migrate-incoming":
                states.bind(path)
                states.listen()
            stream.write('{{"event": "STOP"}}\\r\\n{{"return": {{"status": "completed"}}}}\\r\\n')
time.sleep(1000)
"""


def install(directory: Path) -> None:
    """Install it on PATH."""
    directory.mkdir()
    program = directory / "qemu-system-x86_64"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)


def make_image(directory: Path, behaviour: str = "") -> Path:
    """Make an image whose guest follows these instructions."""
    directory.mkdir()
    manifest = {
        "arch": "amd64",
        "cmdline": behaviour,
        "kernel": {"file": "k"},
        "root": {"file": "i", "format": "initrd"},
    }
    (directory / "image.json").write_text(json.dumps(manifest))
    for part in ("k", "i"):
        (directory / part).touch()
    return directory


def processes_of(run: Path) -> dict[int, str]:
    """Return the command lines of living processes, except this one, that mention this run directory."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        # A zombie has neither.
        if (f"CAISSON_RUN={run}\0".encode() in environment or str(run) in words) and int(process.name) != os.getpid():
            found[int(process.name)] = words
    return found


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def files_of(run: Path) -> list[str]:
    """Return all paths below a directory, even while it is being removed (os.walk skips what is gone)."""
    return [f"{place}/{name}" for place, names, files in os.walk(run) for name in names + files]


def monitor_of(path: Path) -> QMP:
    """Connect to a QEMU that may still be starting."""
    connected: list[QMP] = []

    def connect() -> bool:
        with contextlib.suppress(QMPError):
            connected.append(QMP(path))
        return bool(connected)

    wait_until(connect)
    return connected[0]


def nothing_left(run: Path) -> None:
    """Wait until no process and no file of a run directory is left."""
    wait_until(lambda: not files_of(run), "no file is left", found=lambda: files_of(run))
    wait_until(lambda: not processes_of(run), "no process is left", found=lambda: processes_of(run))


@contextlib.contextmanager
def image_maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Images]:
    """Make images whose guest follows instructions, in the test's own run directory, of which nothing is left."""
    install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CAISSON_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "r"
    monkeypatch.setenv("CAISSON_RUN", str(run))
    yield lambda behaviour: make_image(tmp_path / f"image-{behaviour}", behaviour)
    nothing_left(run)


def ready(_: Path) -> bool:
    return True


def start(image: Path, name: str = "v", ready: Callable[[Path], bool] = ready, timeout: float | None = None) -> VM:
    return VM.start(VMConfig(image, name=name, accel="tcg", vsock="user"), ready=ready, timeout=timeout)
