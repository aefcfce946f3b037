"""Test what the processes of a VM may do: as shown in /proc for a running VM, and as tried by a confined process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from caisson.image.vm import VM, VMConfig
from caisson.image.vm.directory import VMDirectory
from caisson.image.vm.logs import MAX_LOG, SLACK, LogRing, ring_start
from caisson.image.vm.sandbox import CAP_CHOWN, Confinement, set_id_filter
from tests.component.fake_qemu import install, make_image, nothing_left
from tests.support.poll import wait_until

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., VM]:
    monkeypatch.setenv("CAISSON_RUN", str(tmp_path / "r"))
    install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    image = make_image(tmp_path / "image", "poweroff")

    def start(**options: object) -> VM:
        config = VMConfig(image, name="v", accel="tcg", vsock="user", **options)  # type: ignore[arg-type]
        return VM.start(config, ready=lambda _: True, timeout=30)

    return start


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_all_processes_of_a_vm_are_confined(vm: Callable[..., VM], tmp_path: Path) -> None:
    with vm() as started:
        pids = started.info["pids"]
        for name in ("qemu", "vsock"):
            found = status(pids[name])
            assert found["NoNewPrivs"] == "1", name
            assert found["Seccomp"] == "2", name
            for kind in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
                assert int(found[kind], 16) == 0, (name, kind)
            limits = Path(f"/proc/{pids[name]}/limits").read_text()
            assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
            assert not re.search(r"^Max file size +unlimited", limits, re.MULTILINE)
        for file in started.directory.iterdir():
            assert file.lstat().st_mode & 0o077 == 0, file
    nothing_left(tmp_path / "r")


def test_a_disk_to_write_to_may_be_of_any_size(vm: Callable[..., VM]) -> None:
    with vm(writable_disks=True) as started:
        limits = (Path(f"/proc/{pid}/limits").read_text() for pid in (started.info["pids"]["qemu"], "self"))
        qemu, ours = (re.search(r"^Max file size .*", text, re.MULTILINE) for text in limits)
        assert qemu is not None and ours is not None and qemu[0] == ours[0]


def mount_points(pid: int | str, flag: str) -> set[str]:
    """Return the points of the mounts that a process sees and whose options begin with a flag: rw, ro, or any."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return {line.split()[4] for line in lines if line.split()[5].startswith(flag)}


@as_root
def test_what_root_starts_keeps_no_more_than_it_needs(vm: Callable[..., VM], tmp_path: Path) -> None:
    before = mount_points("self", "")
    with vm() as started:
        pids = started.info["pids"]
        network_admin, system_module, system_ptrace = 12, 16, 19
        for name in ("supervisor", "qemu", "vsock"):
            bounding = int(status(pids[name])["CapBnd"], 16)
            assert not bounding & (1 << network_admin | 1 << system_module | 1 << system_ptrace), name
            assert status(pids[name])["NoNewPrivs"] == "1", name
        for name in ("qemu", "vsock"):
            assert Path(f"/proc/{pids[name]}/ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink()
            later = mount_points("self", "") - before
            assert mount_points(pids[name], "rw") - later == {str(started.directory)}, name
    nothing_left(tmp_path / "r")


@as_root
def test_a_writable_share_is_the_only_other_place_to_write_to(vm: Callable[..., VM], tmp_path: Path) -> None:
    for name in ("rw", "ro"):
        (tmp_path / name).mkdir()
    before = mount_points("self", "")
    with vm(shares={"one": (str(tmp_path / "rw"), True), "two": (str(tmp_path / "ro"), False)}) as started:
        later = mount_points("self", "") - before  # of other processes
        writable = mount_points(started.info["pids"]["qemu"], "rw") - later
        assert writable == {str(started.directory), str(tmp_path / "rw")}


def confined(confinement: Confinement, program: str, place: Path) -> str:
    """Return the output of a confined program."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=place, capture_output=True, text=True, timeout=30,
        preexec_fn=confinement.preexec(),
    )  # fmt: skip
    return done.stdout + done.stderr


SET_ID = """
import os, stat
def attempt(name, call, *words):
    try:
        call(*words)
        print(name, "done")
    except OSError as error:
        print(name, error.strerror)
os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o755))
attempt("chmod", os.chmod, "file", 0o4755)
attempt("setgid", os.chmod, "file", 0o2755)
attempt("fchmod", os.fchmod, os.open("file", os.O_RDONLY), 0o4755)
attempt("open", os.open, "new", os.O_CREAT | os.O_WRONLY, 0o4755)
attempt("mknod", os.mknod, "node", stat.S_IFREG | 0o4755)
attempt("mkdir", os.mkdir, "directory", 0o755)
attempt("plain", os.chmod, "file", 0o700)
print([oct(os.stat(name).st_mode & 0o6000) for name in os.listdir(".")])
"""


@pytest.mark.skipif(not set_id_filter(os.uname().machine), reason="no filter for this architecture")
def test_no_confined_process_makes_a_set_id_file(tmp_path: Path) -> None:
    said = confined(Confinement(), SET_ID, tmp_path).splitlines()
    for name in ("chmod", "setgid", "fchmod", "open", "mknod"):
        assert f"{name} Operation not permitted" in said
    assert "mkdir done" in said
    assert "plain done" in said
    assert set(said[-1].strip("[]").split(", ")) == {"'0o0'"}


#: Every way to set a set-ID bit, by system call number: a C library, or Python, does not use all of them.
ROUNDABOUT = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o755))
CREATE, HERE, REGULAR, MODE, X32 = os.O_CREAT | os.O_WRONLY, -100, 0o100000, 0o4755, 0x40000000
for name, number, *words in (
    ("open", 2, b"a", CREATE, MODE), ("creat", 85, b"b", MODE), ("chmod", 90, b"file", MODE),
    ("chmod, high bits", 90, b"file", 0x7FFF0000 | MODE), ("fchmod", 91, os.open("file", os.O_RDONLY), MODE),
    ("mkdir", 83, b"c", 0o2755), ("mknod", 133, b"d", REGULAR | MODE, 0), ("openat", 257, HERE, b"e", CREATE, MODE),
    ("mkdirat", 258, HERE, b"f", 0o2755), ("mknodat", 259, HERE, b"g", REGULAR | MODE, 0),
    ("fchmodat", 268, HERE, b"file", MODE), ("fchmodat2", 452, HERE, b"file", MODE, 0),
    ("openat2", 437, HERE, b"h", ctypes.create_string_buffer(24), 24),
    ("io_uring_setup", 425, 1, ctypes.create_string_buffer(120)), ("x32 chmod", X32 | 90, b"file", MODE),
):
    ctypes.set_errno(0)
    done = libc.syscall(number, *(ctypes.c_char_p(one) if isinstance(one, bytes) else one for one in words))
    print(name, done, os.strerror(ctypes.get_errno()), sep=": ")
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the system call numbers are x86-64's")
def test_no_other_system_call_makes_a_set_id_file(tmp_path: Path) -> None:
    said = dict(line.split(": ", 1) for line in confined(Confinement(), ROUNDABOUT, tmp_path).splitlines())
    missing = ("openat2", "io_uring_setup", "x32 chmod")
    assert len(said) == 15
    for name, result in said.items():
        assert result == f"-1: {'Function not implemented' if name in missing else 'Operation not permitted'}", name
    assert [path.name for path in tmp_path.iterdir() if path.stat().st_mode & 0o6000] == []


def test_a_file_has_a_largest_size(tmp_path: Path) -> None:
    program = "f = open('x', 'wb', buffering=0); f.seek(1 << 20); f.write(b'12345678')"
    assert "File too large" in confined(Confinement(file_size=(1 << 20) + 4), program + "; f.write(b'1')", tmp_path)


def test_no_core_is_dumped(tmp_path: Path) -> None:
    said = confined(Confinement(), "import resource; print(resource.getrlimit(resource.RLIMIT_CORE))", tmp_path)
    assert said == "(0, 0)\n"


@as_root
def test_capabilities_are_what_is_kept(tmp_path: Path) -> None:
    said = confined(Confinement(frozenset({CAP_CHOWN})), "print(open('/proc/self/status').read())", tmp_path)
    found = dict(line.split(":\t") for line in said.splitlines() if line.startswith("Cap"))
    assert {found[kind].strip() for kind in ("CapEff", "CapPrm", "CapBnd")} == {f"{1 << CAP_CHOWN:016x}"}


def test_a_log_is_a_ring(tmp_path: Path) -> None:
    """A guest floods its console: on /run, that is memory."""
    log = tmp_path / "console.log"
    ring = LogRing([log, tmp_path / "none"])
    with log.open("wb", buffering=0) as console:
        for number in range(40):
            console.write(b"%07d\n" % number * (1 << 17))  # 1 MiB
            ring.trim()
    size = log.stat().st_size
    assert size == 40 << 20
    assert log.stat().st_blocks * 512 <= MAX_LOG + SLACK + (64 << 10)
    with log.open("rb") as stream:
        stream.seek(ring_start(size))
        kept = stream.read()
    assert b"\0" not in kept
    assert kept.endswith(b"0000039\n")


def test_the_console_of_a_running_vm_is_a_ring(vm: Callable[..., VM], tmp_path: Path) -> None:
    with vm() as started:
        console = started.directory / "console.log"
        wait_until(lambda: console.exists() and console.stat().st_size)
        with console.open("ab") as flood:
            flood.write(b"flood\n" * (3 << 20))
        wait_until(lambda: console.stat().st_blocks * 512 < 6 << 20)
        shown: list[bytes] = []
        started.show(shown.append, follow=False)
        said = b"".join(shown)
        assert len(said) <= MAX_LOG
        assert said.endswith(b"flood\n")
        assert max(map(len, shown)) <= 1 << 16


def test_a_directory_of_a_vm_is_private(vm: Callable[..., VM]) -> None:
    with vm() as started:
        directory = VMDirectory(started.directory)
        assert directory.path.stat().st_mode & 0o777 == 0o700
        assert directory.path.parent.stat().st_mode & 0o077 == 0
