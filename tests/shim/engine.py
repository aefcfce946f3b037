"""Run docker and containerd from a distribution's packages, unpacked and started below a test's own directory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

from caisson import image
from caisson.commands.snapshot import save_snapshot
from caisson.image.build.cache import default_root
from caisson.image.packages.distribution import extract, packages_of

#: The release whose docker accepts a runtime by name, and its packages; they also run on the release before it.
SUITE = "trixie"
PACKAGES = ("docker.io", "docker-cli", "containerd")

RUNTIME = "io.containerd.caisson.v2"
SNAPSHOT = "tests-shim"

#: Seconds for one docker command, which may clone a VM on a busy machine.
COMMAND_TIMEOUT = float(os.environ.get("CAISSON_TEST_TIMEOUT", "120"))

CONFIGURATION = """
version = 2
root = "{place}/root"
state = "{place}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{place}/containerd.sock"
[ttrpc]
  address = "{place}/containerd.sock.ttrpc"
[plugins."io.containerd.snapshotter.v1.blockfile"]
  root_path = "{place}/blockfile"
  scratch_file = "{place}/scratch.img"
  fs_type = "ext4"
  mount_options = ["loop"]
"""

#: Bytes of an empty file system that the blockfile snapshotter copies for each image.
SCRATCH = 64 << 20

#: A directory in which the packages were unpacked elsewhere.
UNPACKED = os.environ.get("CAISSON_DOCKER", "")

SHIM = """#!{python}
from caisson.commands.shim import run_and_exit
run_and_exit()
"""


class Engine:
    """A running docker.  ``place`` is its directory."""

    def __init__(self, place: Path, environment: dict[str, str]) -> None:
        self.place = place
        self.run = Path(environment["CAISSON_RUN"])
        self.environment = environment
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start containerd, and docker on top."""
        self._processes = [self._containerd(), self._dockerd()]

    def _containerd(self) -> subprocess.Popen[bytes]:
        process = self._started(["containerd", "-c", f"{self.place}/containerd.toml"])
        await_answer(["ctr", "-a", f"{self.place}/containerd.sock", "version"], self.environment, self.place)
        return process

    def _dockerd(self) -> subprocess.Popen[bytes]:
        process = self._started(_dockerd(self.place))
        await_answer(["docker", "version"], self.environment, self.place)
        return process

    def _started(self, words: list[str]) -> subprocess.Popen[bytes]:
        with (self.place / "log").open("ab") as log:
            return subprocess.Popen(words, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill_containerd(self) -> None:
        """Kill and restart containerd."""
        self._processes[0].kill()
        self._processes[0].wait()
        self._processes[0] = self._containerd()

    def kill_dockerd(self) -> None:
        """Kill and restart dockerd."""
        self._processes[1].kill()
        self._processes[1].wait()
        self._processes[1] = self._dockerd()

    def stop(self) -> None:
        """Stop both."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            process.wait(30)

    def docker(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a docker command to completion."""
        return subprocess.run(
            ["docker", *words], input=stdin, env=self.environment, capture_output=True, timeout=COMMAND_TIMEOUT
        )

    def delete_tasks(self) -> None:
        """Kill and delete every task that containerd runs for docker."""
        ctr = ["ctr", "--address", f"{self.place}/containerd.sock", "--namespace", "moby", "tasks"]
        running = subprocess.run([*ctr, "list", "--quiet"], env=self.environment, capture_output=True, check=True)
        for task in running.stdout.decode().split():
            subprocess.run([*ctr, "delete", "--force", task], env=self.environment, capture_output=True, check=True)

    def ctr(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        """Run a ctr command, in a separate namespace."""
        command = ["ctr", "--address", f"{self.place}/containerd.sock", "--namespace", "pods", *words]
        return subprocess.run(command, env=self.environment, capture_output=True, timeout=COMMAND_TIMEOUT)

    def on_terminal(self, rows: int, columns: int, *words: str) -> subprocess.CompletedProcess[bytes]:
        """Run a docker command on a terminal of this size."""
        command = f"stty rows {rows} cols {columns}; exec docker {' '.join(words)}"
        return subprocess.run(
            ["script", "-qec", command, os.devnull], env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, timeout=COMMAND_TIMEOUT,
        )  # fmt: skip

    def vms(self) -> list[str]:
        """Return the names of the running VMs."""
        return sorted(path.name for path in Path(self.environment["CAISSON_RUN"]).glob("pod-*"))

    def mounts(self) -> list[str]:
        """Return the mount points of this docker's pods."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines if line.split()[4].startswith(f"{self.place}/run-pods/")]


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """Start containerd and docker; at the end nothing of them is left."""
    place = Path(tempfile.mkdtemp(prefix="cs-"))  # short, for sockets
    made = None
    try:
        environment = environment_of(place, PACKAGES, CONFIGURATION)
        with (place / "scratch.img").open("wb") as scratch:
            scratch.truncate(SCRATCH)
        subprocess.run(["mkfs.ext4", "-q", place / "scratch.img"], check=True)
        (place / "daemon.json").write_text(json.dumps({"runtimes": {"caisson": {"runtimeType": RUNTIME}}}))
        made = Engine(place, environment)
        made.start()
        imported = made.docker("import", "-", "busybox", stdin=rootfs())
        assert imported.returncode == 0, imported.stderr
        yield made
        running = made.docker("ps", "--all", "--quiet").stdout.decode().split()
        if running:
            made.docker("rm", "--force", *running)
    finally:
        if made is not None:
            made.stop()
        unmount(place)
        shutil.rmtree(place, ignore_errors=True)


def environment_of(place: Path, wanted: Sequence[str], configuration: str) -> dict[str, str]:
    """Unpack the programs, write their configurations, and return the environment in which to run them."""
    programs, run = place / "bin", place / "run"
    for directory in (programs, run):
        directory.mkdir()
    run.chmod(0o700)
    tree = Path(UNPACKED) if UNPACKED else unpack(wanted, place / "tree")
    shim = programs / "containerd-shim-caisson-v2"
    shim.write_text(SHIM.format(python=sys.executable))
    shim.chmod(0o755)
    (place / "containerd.toml").write_text(configuration.format(place=place))
    directory = image.build_image().directory
    (place / "shim.toml").write_text(f'snapshot = "{SNAPSHOT}"\nimage = "{directory}"\nvsock = "user"\n')
    save_snapshot(name=SNAPSHOT, image=str(directory), memory=512, cpus=1, append="", accel="auto", vsock="user")
    path = [str(programs), str(tree / "usr/bin"), str(tree / "usr/sbin"), os.environ["PATH"]]
    return os.environ | {
        "PATH": os.pathsep.join(path),
        "CAISSON_RUN": str(run),
        "CAISSON_SHIM_CONFIG": str(place / "shim.toml"),
        "DOCKER_HOST": f"unix://{place}/docker.sock",
    }


def unpack(wanted: Sequence[str], tree: Path) -> Path:
    """Unpack packages into a new directory, and return it."""
    packages = packages_of("debian", default_root() / "apt" / f"{SUITE}-docker", SUITE, "amd64")
    packages.update()
    tree.mkdir()
    extract(packages.fetch(list(wanted)), tree)
    return tree


def _dockerd(place: Path) -> list[str]:
    return [
        "dockerd", "--config-file", f"{place}/daemon.json", "-H", f"unix://{place}/docker.sock",
        "--data-root", f"{place}/data", "--exec-root", f"{place}/exec", "-p", f"{place}/pid",
        "--containerd", f"{place}/containerd.sock", "--iptables=false", "--ip6tables=false", "--bridge=none",
        "--storage-driver", "overlay2",
    ]  # fmt: skip


def children(pid: int, name: str) -> list[int]:
    """Return the children of a process that have this name."""
    pids = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in pids if Path(f"/proc/{child}/comm").read_text() == f"{name}\n"]


def await_answer(words: list[str], environment: dict[str, str], place: Path) -> None:
    """Wait until a command succeeds."""
    for _ in range(240):
        if subprocess.run(words, env=environment, capture_output=True).returncode == 0:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["sleep", "0.25"], timeout=1)
    raise AssertionError((place / "log").read_text()[-2000:])


def unmount(place: Path) -> None:
    """Unmount everything below a directory."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    for point in sorted((line.split()[4] for line in lines if line.split()[4].startswith(f"{place}/")), reverse=True):
        subprocess.run(["umount", "--lazy", point], capture_output=True)


def rootfs() -> bytes:
    """Return a tar of a root file system: a static busybox, and the users root and nobody."""
    program = Path(shutil.which("busybox") or "/bin/busybox")
    with BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as archive:

            def add(
                name: str, data: bytes = b"", mode: int = 0o755, kind: bytes = tarfile.REGTYPE, to: str = ""
            ) -> None:
                member = tarfile.TarInfo(name)
                member.size, member.mode, member.type, member.linkname = len(data), mode, kind, to
                archive.addfile(member, BytesIO(data))

            for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp"):
                add(name, mode=0o1777 if name == "tmp" else 0o755, kind=tarfile.DIRTYPE)
            add("bin/busybox", program.read_bytes())
            for applet in subprocess.run([program, "--list"], capture_output=True, text=True).stdout.split():
                if applet != "busybox":
                    add(f"bin/{applet}", kind=tarfile.SYMTYPE, to="busybox")
            add("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n", 0o644)
            add("etc/group", b"root:x:0:\n", 0o644)
        return buffer.getvalue()
