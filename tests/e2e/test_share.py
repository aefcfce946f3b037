"""Test sharing host directories with a running guest: virtiofs, with the VM's own virtiofsd."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson.agent.client import Agent
from caisson.proto.caisson import caisson_pb2
from tests.e2e.conftest import TIMEOUT, Caisson
from tests.support.poll import wait_until

pytestmark = [pytest.mark.root, pytest.mark.vm]


def run(vm: Caisson, *words: str) -> str:
    done = vm(*words)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def servers(directory: Path) -> list[int]:
    """Return the processes that serve a directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"virtiofsd" in words and os.fsencode(directory) in words.replace(b"\\", b""):  # a comma is escaped
            found.append(int(process.name))
    return found


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """Provide a directory with a comma in its name; at the end nobody serves it."""
    path = tmp_path / "src, of mine"
    path.mkdir()
    (path / "hello").write_text("from the host\n")
    yield path
    wait_until(lambda: not servers(path), "its server has exited", found=lambda: servers(path))


def test_read_only(vm: Caisson, shared: Path) -> None:
    assert run(vm, "share", str(shared)) == "/run/shared/src--of-mine\n"
    place = "/run/shared/src--of-mine"
    assert run(vm, "exec", "--", "cat", f"{place}/hello") == "from the host\n"
    (shared / "later").write_text("later\n")
    assert run(vm, "exec", "--", "cat", f"{place}/later") == "later\n"
    refused = vm("exec", "--", "touch", f"{place}/x")
    assert refused.returncode == 1 and b"Read-only file system" in refused.stderr
    assert vm.info("default")["virtiofs"] == {"src--of-mine": [str(shared), False]}

    # A second container gets the same share; a request for more access than the share has fails.
    vm.make_containers("second")
    assert run(vm, "share", str(shared), "--container", "second", "--at", "/home/src") == "/home/src\n"
    assert run(vm, "exec", "--container", "second", "--", "cat", "/home/src/hello") == "from the host\n"

    async def write() -> bytes:
        async with Agent.connect(vm.run_directory / "default/agent.sock") as client:
            request = caisson_pb2.MountRequest(
                container_id="second", source="src--of-mine", fstype="virtiofs", mount_point="/home/rw"
            )
            await client.guest.Mount(request)
            process = await client.container("second").exec(["/bin/touch", "/home/rw/x"])
            return b"".join([data async for data in process.stderr()])

    assert b"Read-only file system" in asyncio.run(write())
    assert not (shared / "x").exists()

    run(vm, "unshare", "src--of-mine")
    for container in ("default", "second"):
        assert "virtiofs" not in run(vm, "exec", "--container", container, "--", "cat", "/proc/self/mounts")
    assert vm.info("default")["virtiofs"] == {}
    run(vm, "rm", "second")


def test_writable(vm: Caisson, shared: Path) -> None:
    place = run(vm, "share", str(shared), "--writable", "--tag", "work").strip()
    assert run(vm, "share", str(shared), "--writable", "--tag", "work").strip() == place  # it is there already
    script = (
        f"cd {place}; echo more >>hello; mkdir -p deep/er; mv hello deep/er; ln -s er deep/link; chmod 640 deep/link/*"
    )
    run(vm, "exec", "--", "sh", "-c", script)
    assert (shared / "deep/link/hello").read_text() == "from the host\nmore\n"
    assert (shared / "deep/er/hello").stat().st_mode & 0o777 == 0o640
    data = os.urandom(3 << 20)
    (shared / "large").write_bytes(data)
    back = vm("exec", "--", "sh", "-c", f"cp {place}/large {place}/copy; cat {place}/copy")
    assert back.stdout == data == (shared / "copy").read_bytes()

    taken = vm("share", str(shared.parent), "--tag", "work")
    assert (
        taken.returncode == 1
        and b"--tag work: is in use for" in taken.stderr
        and b"caisson unshare work" in taken.stderr
    )
    nowhere = vm("share", str(shared.parent), "--at", "/etc/src")
    assert nowhere.returncode == 1 and b"read-only file system" in nowhere.stderr
    assert vm.info("default")["virtiofs"].keys() == {"work"}  # what could not be mounted is unplugged again
    run(vm, "unshare", "work")


def test_virtiofsd_keeps_what_file_ownership_takes(vm: Caisson, shared: Path) -> None:
    run(vm, "share", str(shared), "--only-plug")
    chown, dac_override, fowner, fsetid, setgid, setuid = 0, 1, 3, 4, 6, 7
    allowed = sum(1 << number for number in (chown, dac_override, fowner, fsetid, setgid, setuid))
    for process in servers(shared):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
        assert int(status["CapEff"], 16) & ~allowed == 0
        assert int(status["CapBnd"], 16) & ~allowed == 0
        assert status["NoNewPrivs"] == "1"
    run(vm, "unshare", "src--of-mine")


def test_a_kernel_without_9p_gets_the_share_of_a_boot_by_virtiofs(own: Caisson, shared: Path) -> None:
    """Debian's cloud kernel is one."""
    run(own, "boot-vm", "--detach", "--share", f"work={shared}:rw")
    assert own.info("default")["virtiofs"] == {"work": [str(shared), True]}
    place = run(own, "share", str(shared)).strip()
    assert run(own, "exec", "--", "cat", f"{place}/hello") == "from the host\n"
    run(own, "stop-vm", "--all")


def test_it_ends_with_its_vm(own: Caisson, shared: Path) -> None:
    run(own, "boot-vm", "--detach")
    assert run(own, "share", str(shared), "--only-plug") == "src--of-mine\n"
    assert servers(shared)
    (listed,) = json.loads(run(own, "list-vms", "--json"))
    os.kill(listed["pids"]["supervisor"], signal.SIGKILL)
    wait_until(lambda: not servers(shared), "its virtiofsd has ended", TIMEOUT)
    assert run(own, "list-vms").count("\n") == 1


@pytest.mark.parametrize(
    ("words", "status", "why"),
    [
        (("share", "/nowhere"), 2, b"/nowhere: is not a directory; name one to share"),
        (
            ("share", "/tmp", "--tag", "1 2"),
            2,
            b"--tag 1 2: is not a valid tag; give up to 31 letters, digits, - and _, a letter first",
        ),
        (("unshare", "nothing"), 1, b"share 'nothing': VM 'default' has none of this tag; there are: none"),
    ],
)
def test_share_rejects_impossible_requests(vm: Caisson, words: tuple[str, ...], status: int, why: bytes) -> None:
    done = vm(*words)
    assert (done.returncode, done.stdout, done.stderr) == (status, b"", b"caisson: " + why + b"\n")


def test_programs_of_a_share_run_their_own_code(vm: Caisson, tmp_path: Path) -> None:
    """virtiofsd writes to the guest's memory where an emulating QEMU does not look for changed code."""
    programs = [name for name in ("bash", "find", "grep", "make", "perl", "python3", "sed", "sort", "xz")
                if Path("/usr/bin", name).exists()]  # fmt: skip
    run(vm, "share", "/usr", "--at", "/tmp/root/usr")
    script = f"""
        for name in bin lib lib64; do ln -sf usr/$name /tmp/root/$name; done
        for round in 1 2 3; do
            for name in {" ".join(programs)}; do
                busybox chroot /tmp/root /usr/bin/$name --version >/dev/null || echo "$name: status $?"
            done
        done
    """
    assert run(vm, "exec", "--", "sh", "-c", script) == ""
    run(vm, "unshare", "usr")
