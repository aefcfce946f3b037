"""Test containerd's blockfile snapshotter: its files as disks of VMs, compared with files that the host mounts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.shim.cri import oci_archive
from tests.shim.engine import RUNTIME, Engine
from tests.shim.test_root_disks import loop_devices, read
from tests.support.poll import wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.timeout(600)]

IMAGE = "docker.io/library/blocks:latest"

#: What a container sees of its root; it writes more than fits into a cache that nobody flushes, and a file of its own.
SCRIPT = """
grep ' / ' /proc/mounts | cut -d ' ' -f 3
dd if=/dev/zero of=/large bs=1M count=8 2>/dev/null; echo kept > /kept; cat /kept; ls -di /bin /lost+found | wc -l
exit 3
"""


@pytest.fixture(scope="module")
def containerd(docker: Engine) -> Iterator[Engine]:
    """Provide containerd with an image in the blockfile snapshotter, and a configuration with ``block_roots``."""
    archive = docker.place / "blocks.tar"
    archive.write_bytes(oci_archive(IMAGE, ["sh"]))
    imported = docker.ctr("images", "import", "--snapshotter", "blockfile", str(archive))
    assert imported.returncode == 0, imported.stderr
    configuration = (docker.place / "shim.toml").read_text()
    (docker.place / "blocks.toml").write_text(f"{configuration}block_roots = true\n")
    yield docker
    for name in ("c1", *(f"p{number}" for number in range(6, 0, -1))):  # of failed tests
        docker.ctr("tasks", "rm", "--force", name)
        docker.ctr("containers", "rm", name)
    docker.ctr("images", "rm", IMAGE)


def run(
    containerd: Engine, name: str, *words: str, disks: bool, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[bytes]:
    if disks:
        options = [*options, "--runtime-config-path", str(containerd.place / "blocks.toml")]
    return containerd.ctr("run", "--snapshotter", "blockfile", "--runtime", RUNTIME, *options, IMAGE, name, *words)


def files(containerd: Engine) -> list[Path]:
    """Return the snapshots' files, the latest last."""
    return sorted((containerd.place / "blockfile/snapshots").iterdir(), key=lambda path: int(path.name))


def remove(containerd: Engine, name: str) -> None:
    assert containerd.ctr("containers", "rm", name).returncode == 0
    assert containerd.vms() == [] and containerd.mounts() == []


@pytest.mark.parametrize(("disks", "fstype"), [(False, b"virtiofs"), (True, b"ext4")])
def test_what_is_written_to_a_root_is_in_the_snapshots_file(containerd: Engine, disks: bool, fstype: bytes) -> None:
    done = run(containerd, "c1", "sh", "-c", SCRIPT, disks=disks)
    assert (done.returncode, done.stdout) == (3, fstype + b"\nkept\n2\n"), done.stderr
    file = files(containerd)[-1]
    if not disks:  # the host unmounts lazily
        wait_until(lambda: loop_devices(file) == [], "the end of the mount")
    assert loop_devices(file) == [] and read(file, "/kept") == "kept\n"
    remove(containerd, "c1")
    wait_until(lambda: not file.exists(), "containerd's garbage collection")


def holders(file: Path) -> list[str]:
    """Return the processes that have a file open."""
    status = file.stat()
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if (link.stat().st_dev, link.stat().st_ino) == (status.st_dev, status.st_ino):
                found.append(link.parent.parent.name)
    return found


def state(containerd: Engine, name: str) -> bytes:
    lines = containerd.ctr("tasks", "ls").stdout.splitlines()
    return next((line.split()[2] for line in lines if line.split()[0] == name.encode()), b"")


def end(containerd: Engine, name: str) -> None:
    containerd.ctr("tasks", "kill", "--signal", "KILL", name)
    wait_until(lambda: state(containerd, name) == b"STOPPED", f"the end of {name}")
    assert containerd.ctr("tasks", "rm", name).returncode in (0, 137)


def test_a_disk_ends_with_its_container_while_the_pod_goes_on(containerd: Engine) -> None:
    options = ("--detach", "--annotation", "io.kubernetes.cri.sandbox-id=p1")
    for name in ("p1", "p2"):
        done = run(containerd, name, "sh", "-c", "echo kept > /kept; sleep 1000", options=options, disks=True)
        assert done.returncode == 0, done.stderr
    first, second = files(containerd)[-2:]
    wait_until(lambda: kept(containerd, "p2"), "the file")
    assert len(holders(first)) == len(holders(second)) == 1
    end(containerd, "p2")
    assert holders(second) == [] and read(second, "/kept") == "kept\n"
    assert kept(containerd, "p1"), "the pod must survive"
    end(containerd, "p1")
    assert holders(first) == [] and read(first, "/kept") == "kept\n"
    for name in ("p2", "p1"):
        remove(containerd, name)


def test_a_root_for_which_no_port_is_left_is_shared(containerd: Engine) -> None:
    """Of eight ports, the share takes one, and two stay empty for interfaces and further shares."""
    names = [f"p{number}" for number in range(1, 7)]
    found = []
    for name in names:
        options = ("--detach", "--annotation", "io.kubernetes.cri.sandbox-id=p1")
        done = run(containerd, name, "sleep", "1000", options=options, disks=True)
        assert done.returncode == 0, done.stderr
        words = ("sh", "-c", "grep ' / ' /proc/mounts | cut -d ' ' -f 3")
        found.append(containerd.ctr("tasks", "exec", "--exec-id", "e1", name, *words).stdout.strip())
    assert found == 5 * [b"ext4"] + [b"virtiofs"]
    for name in reversed(names):
        end(containerd, name)
        containerd.ctr("containers", "rm", name)
    assert containerd.vms() == [] and containerd.mounts() == []


def kept(containerd: Engine, name: str) -> bool:
    return containerd.ctr("tasks", "exec", "--exec-id", "e1", name, "cat", "/kept").stdout == b"kept\n"


def test_a_file_serves_the_next_task_even_after_a_killed_shim(containerd: Engine) -> None:
    script = "cat /kept; echo again >> /kept; sync; touch /tmp/synced; sleep 1000"
    assert run(containerd, "c1", "sh", "-c", script, options=["--detach"], disks=True).returncode == 0
    file = files(containerd)[-1]
    synced = ("tasks", "exec", "--exec-id", "e1", "c1", "test", "-e", "/tmp/synced")
    wait_until(lambda: containerd.ctr(*synced).returncode == 0, "the file on the disk")
    (record,) = containerd.place.glob("state/io.containerd.runtime.v2.task/*/c1/caisson.json")
    os.kill(json.loads(record.read_text())["shim"]["pid"], signal.SIGKILL)
    wait_until(lambda: holders(file) == [] and containerd.vms() == [], "the end of the VM")
    again = ("tasks", "start", "--detach", "c1")
    wait_until(lambda: containerd.ctr(*again).returncode == 0, "the next task, once containerd has cleaned up")
    words = ("tasks", "exec", "--exec-id", "e2", "c1", "cat", "/kept")
    wait_until(lambda: containerd.ctr(*words).stdout == b"again\nagain\n", "both lines")
    end(containerd, "c1")
    assert read(file, "/kept") == "again\nagain\n"
    remove(containerd, "c1")
