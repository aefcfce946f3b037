"""Boot the outer machine: a guest with real KVM and vhost-vsock, and this checkout's wheel and tests.

QEMU's emulated AMD processor has SVM with nested paging, so its kernel loads kvm_amd and vhost_vsock, and a guest
booted inside runs under KVM with the kernel's vsock device.  If this machine has KVM itself, the outer machine runs
under it: nested KVM.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caisson import image as images
from caisson.agent import client
from caisson.agent.client import specs
from tests.e2e.conftest import Caisson, built, fresh
from tests.support import guest_root
from tests.support.checkout import copy_sources
from tests.support.source import ROOT

#: MiB: for an image of some 300 MB in memory, docker, a guest with 512, and files for both.
MEMORY = 4096

#: Kernel parameters: a periodic tick.  QEMU's emulation (7.2) sometimes loses the interrupt of a one-shot timer while a
#: guest runs inside; a machine without other interrupts then sleeps, with its guest, until one comes.
TICK = "highres=off nohz=off"

#: Seconds to boot: emulated, on a busy machine.
BOOT_TIMEOUT = 1200.0

#: Where everything is installed in it.
HOME = "/tmp/nested"

#: Give the tests a cgroup hierarchy of their own, whose root has no processes, as docker needs.
OWN_CGROUPS = """
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir /sys/fs/cgroup/tests
for pid in $(cat /sys/fs/cgroup/cgroup.procs); do echo $pid >/sys/fs/cgroup/tests/cgroup.procs || true; done
echo +cpu +cpuset +io +memory +pids >/sys/fs/cgroup/cgroup.subtree_control
"""

#: Kernel modules, by processor flags.
MODULES = {"svm": "kvm_amd", "vmx": "kvm_intel"}


@dataclass(frozen=True)
class Result:
    """The result of a pytest run, and all of its output."""

    status: int
    output: str


@dataclass(frozen=True)
class Outer:
    """A booted outer machine, ready for tests."""

    caisson: Caisson
    name: str
    python: str

    @property
    def _socket(self) -> Path:
        return self.caisson.run_directory / self.name / "agent.sock"

    def pytest(
        self, tests: Sequence[str], settings: Mapping[str, str], timeout: float, *, evidence: bool = True
    ) -> Result:
        """Run tests of this checkout in it, with evidence from each test's guest; show their output as it arrives."""
        plugin = ["-p", "tests.nested.evidence"] if evidence else []
        words = [
            self.python, "-m", "pytest", "-v", *plugin, "-p", "no:cacheprovider", "--color=no",
            "-o", f"timeout={timeout:.0f}", *tests,
        ]  # fmt: skip
        environment = {
            "PATH": f"{HOME}/docker/usr/bin:{HOME}/docker/usr/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": f"{HOME}/site:/usr/lib/caisson", "CAISSON_COMMAND": f"{self.python} -m caisson.commands.main",
            "CAISSON_CACHE": f"{HOME}/cache", "CAISSON_IMAGES": f"{HOME}/images", "CAISSON_DOCKER": f"{HOME}/docker",
            "CAISSON_TEST_TIMEOUT": f"{timeout:.0f}", "PYTHONDONTWRITEBYTECODE": "1", **settings,
        }  # fmt: skip

        return self._run(*words, cwd=f"{HOME}/checkout", env=[f"{key}={value}" for key, value in environment.items()])

    def give_cgroups(self) -> None:
        """Give the tests a cgroup hierarchy of their own."""
        done = self._run("/usr/bin/bash", "-ec", OWN_CGROUPS)
        assert done.status == 0, done.output

    def _run(self, *words: str, **options: Any) -> Result:
        async def work() -> guest_root.Done:
            async with client.Agent.connect(self._socket) as agent:
                return await guest_root.run(agent.container("nested"), *words, show=_show, **options)

        done = asyncio.run(work())
        return Result(done.status, (done.stdout + done.stderr).decode(errors="replace"))


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@contextlib.contextmanager
def outer_machine(
    suite: str, more: Mapping[str, Sequence[str]] | None = None, docker: Path | None = None
) -> Iterator[Outer]:
    """Boot an outer machine with a suite of Debian, the default image and further ones, given by what builds them.

    ``docker`` is a directory with docker's packages.
    """
    image = images.Image.load(built("--suite", suite, "--template", "kvm-host"))
    default = images.build_image().directory
    inner = {f"cache/images/{default.name}": default}
    inner |= {f"images/{name}": built(*words) for name, words in (more or {}).items()}
    inner |= {"docker": docker} if docker is not None else {}
    with fresh() as caisson:
        words = (
            "boot-vm",
            "outer",
            "--detach",
            "--image",
            str(image.directory),
            "--memory",
            str(MEMORY),
            "--append",
            TICK,
        )
        booted = caisson(*words, "--timeout", f"{BOOT_TIMEOUT:.0f}", timeout=BOOT_TIMEOUT)
        assert booted.returncode == 0, booted.stderr.decode()
        try:
            outer = Outer(caisson, "outer", guest_root.python_of(image.manifest))
            asyncio.run(_furnish(outer, payload(inner)))
            yield outer
        finally:
            stopped = caisson("stop-vm", "outer")
            assert stopped.returncode == 0, stopped.stderr.decode()


async def _furnish(outer: Outer, archive: bytes) -> None:
    """Start a container with everything in it, and load KVM and vhost-vsock."""
    async with client.Agent.connect(outer._socket) as agent:
        container = await guest_root.container(agent, "nested", specs.keep_alive())  # reaps orphans
        flags = (await guest_root.run(container, "/usr/bin/cat", "/proc/cpuinfo")).stdout.decode().split()
        modules = [name for flag, name in MODULES.items() if flag in flags]
        assert modules, "this processor offers neither SVM nor VMX to a guest; on real KVM, enable nested"
        for name in (*modules, "vhost_vsock"):
            await agent.load_module(name)
        script = f"mkdir -p {HOME} && tar -x -C {HOME} && ls -l /dev/kvm /dev/vhost-vsock"
        done = await guest_root.run(container, "/usr/bin/bash", "-c", script, stdin=archive)
        assert done.status == 0, done.stderr.decode()


def payload(inner: Mapping[str, Path]) -> bytes:
    """Return an archive of the unpacked wheel (`site`), the tests (`checkout`), and directories by destination."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, directory in inner.items():
            archive.add(directory, name)
        for name in ("tests", "pyproject.toml", "docs", "README.md", "constraints.txt"):
            archive.add(ROOT / name, f"checkout/{name}", filter=_without_byte_code)
        with tempfile.TemporaryDirectory() as scratch:
            wheel = make_wheel(Path(scratch))
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(Path(scratch) / "site")
            archive.add(Path(scratch) / "site", "site")
    return stream.getvalue()


def _without_byte_code(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member


def make_wheel(directory: Path) -> Path:
    """Build this checkout's wheel, with the protocol as compiled here."""
    copy_sources(directory / "source", compiled=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "--wheel-dir", directory, directory / "source"], env=os.environ | {"PIP_USER": "0"}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    (wheel,) = directory.glob("caisson_vm-*.whl")
    return wheel
