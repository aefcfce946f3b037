"""Test shares of a running VM: their names, and their servers."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caisson.image import programs
from caisson.image.vm import VMError
from caisson.image.vm.hotplug import share as sharing
from caisson.image.vm.hotplug import virtiofs
from caisson.image.vm.jsonsocket import JSONSocket

#: virtiofsd must not create device nodes or set file capabilities for a guest.
DROPPED = ["-o", "modcaps=-mknod:-setfcap"]

OLD, RUST, OLDER_RUST = "-o source=PATH  directory", "--shared-dir <DIR> --readonly", "--shared-dir <DIR>"


def installed(directory: Path, usage: str) -> str:
    """Install a virtiofsd that describes its usage."""
    path = directory / "virtiofsd"
    path.write_text(f"#!/bin/sh\necho '{usage}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide the only place where root looks for virtiofsd."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs, "SYSTEM", ())
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return tmp_path


def test_a_tag_is_made_of_a_directorys_name(tmp_path: Path) -> None:
    for name, tag in (("src", "src"), ("my project, 2", "my-project--2"), ("2024-x", "x"), ("___", "share")):
        (tmp_path / name).mkdir()
        assert sharing.tag_of(tmp_path / name) == tag
    assert sharing.tag_of(Path("/")) == "share"
    assert len(sharing.tag_of(tmp_path / ("x" * 99))) == 31


def test_qemus_own_and_the_one_in_rust(place: Path) -> None:
    program = installed(place, OLD)
    assert virtiofs.command(Path("/a,b"), 9, writable=True) == [program, "--fd=9", "-o", "source=/a\\,b", *DROPPED]
    sealed = virtiofs.command(Path("/a"), 9, writable=False)
    assert sealed[:2] == ["unshare", "--mount"]
    assert sealed[-7:] == ["/a", program, "--fd=9", "-o", "source=/a", *DROPPED]
    installed(place, RUST)
    assert virtiofs.command(Path("/a,b"), 9, writable=True) == [program, "--fd=9", "--shared-dir=/a,b"]
    assert virtiofs.command(Path("/a"), 9, writable=False) == [program, "--fd=9", "--shared-dir=/a", "--readonly"]
    installed(place, OLDER_RUST)
    assert virtiofs.command(Path("/a"), 9, writable=False)[0] == "unshare"
    installed(place, f"{RUST} --modcaps <CAPS>")
    assert "--modcaps=-mknod:-setfcap" in virtiofs.command(Path("/a"), 9, writable=True)


@pytest.mark.parametrize(
    ("usage", "writable", "why"),
    [
        (
            OLD,
            True,
            r"is QEMU's own and needs root; run \(from Debian 13 on\): sudo apt-get install virtiofsd; or share by 9p",
        ),
        (OLDER_RUST, False, "too old to share read-only without root; share --writable; or share by 9p"),
        (OLDER_RUST, True, ""),
        (RUST, False, ""),
    ],
)
def test_an_ordinary_user(place: Path, monkeypatch: pytest.MonkeyPatch, usage: str, writable: bool, why: str) -> None:
    program = installed(place, usage)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    if why:
        with pytest.raises(VMError, match=why):
            virtiofs.command(Path("/a"), 9, writable=writable)
    else:
        assert virtiofs.command(Path("/a"), 9, writable=writable)[0] == program


def test_without_any(place: Path) -> None:
    with pytest.raises(VMError, match=r"not installed; run: sudo apt-get install virtiofsd .*caisson boot-vm --share"):
        virtiofs.command(Path("/a"), 9, writable=True)


def test_a_vm_without_memory_to_share(tmp_path: Path) -> None:
    info: dict[str, Any] = {
        "vsock": "vhost",
        "snapshot": "t",
        "shares": {"data": [str(tmp_path), True]},
        "virtiofs": {},
    }
    vm: Any = SimpleNamespace(name="v", info=info, directory=tmp_path)
    with pytest.raises(VMError, match="--vsock user, or boot with the share: caisson boot-vm --share src=/tmp"):
        sharing.share(vm, Path("/tmp"), "src", writable=False)
    # The boot-time share exists under any requested name, and also serves read-only requests.
    assert sharing.share(vm, tmp_path, "other", writable=True) == sharing.Shared("9p", "data", True)
    assert sharing.share(vm, tmp_path, writable=False) == sharing.Shared("9p", "data", False)
    with pytest.raises(VMError, match=r"--tag data: is in use for .* \(writable\); choose another tag"):
        sharing.share(vm, Path("/tmp"), "data", writable=False)
    with pytest.raises(VMError, match="stays until it stops"):
        sharing.unshare(vm, "data")


def test_descriptors_come_with_an_object_to_whoever_takes_them() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Path("/proc/self/ns/mnt").open("rb") as namespace:
        sender = JSONSocket(ours)
        sender.send({"share": "a"}, [namespace.fileno()])
        sender.send({"share": "b"}, [namespace.fileno()])
        receiver = JSONSocket(theirs, max_fds=1)
        assert [receiver.receive(5), receiver.receive(5)] == [{"share": "a"}, {"share": "b"}]
        [received] = receiver.fds
        assert os.path.sameopenfile(received, namespace.fileno()) and not os.get_inheritable(received)
        os.close(received)


def test_an_answer_that_is_faster_than_the_end_of_the_request_is_received(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    send_fds = socket.send_fds

    def answered(*arguments: Any) -> int:
        sent = send_fds(*arguments)
        theirs.sendall(b'{"socket": "x"}\n')
        theirs.close()
        return sent

    monkeypatch.setattr(socket, "send_fds", answered)
    with ours:
        line = JSONSocket(ours)
        line.send({"share": "t"}, [ours.fileno()])
        assert line.receive(5) == {"socket": "x"}
