"""Test snapshots: sparse files, names, compatibility; and the real QEMU saves and clones a tiny guest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caisson.commands import snapshot
from caisson.image.build.cache import clean
from caisson.image.vm import VM, VMConfig, VMError, qemu
from caisson.image.vm.snapshot import ram
from caisson.image.vm.snapshot.snapshot import (
    TITLES,
    Snapshot,
    SnapshotCompatibility,
    has_printed_ready,
    snapshot_directory,
    store,
)
from tests.component.fake_qemu import install, make_image, nothing_left
from tests.component.test_vm_qemu import sleeping_kernel
from tests.unit.test_qemu import MANIFEST, after

COMPATIBILITY = SnapshotCompatibility("0123", "7.2.22 (Debian)", "q35", "tcg", "max", "user")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAISSON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stored(name: str, tmp_path: Path, text: bytes = b"memory", state: bytes = b"state") -> Snapshot:
    """Store a snapshot in the cache, of a VM without a guest."""
    with (tmp_path / "guest").open("w+b", buffering=0) as file:
        file.truncate(1 << 20)
        file.write(text)
        store(Snapshot(name, snapshot_directory(name), tmp_path, COMPATIBILITY, 256, 1, ""), file.fileno(), state)
    found = Snapshot.load(name)
    assert found is not None
    return found


@pytest.mark.parametrize("copy", [ram.copy, ram.pack])
def test_memory_is_copied_with_its_holes(tmp_path: Path, copy: Callable[[int, int], int]) -> None:
    size = 64 << 20
    with (tmp_path / "a").open("w+b", buffering=0) as source, (tmp_path / "b").open("w+b", buffering=0) as target:
        source.truncate(size)
        for position in (0, 4096 * 3 + 17, (40 << 20) - 1, size - 5):
            source.seek(position)
            source.write(b"12345")
        source.seek(20 << 20)
        source.write(bytes(1 << 20))  # zeros that are allocated
        copied = copy(source.fileno(), target.fileno())
        digests = {hashlib.sha256(os.pread(file.fileno(), size, 0)).digest() for file in (source, target)}
    assert len(digests) == 1
    assert (tmp_path / "b").stat().st_blocks * 512 < 3 << 20
    assert copied < (1 << 20) if copy is ram.pack else copied >= (1 << 20)


def test_it_is_found_by_its_name_replaced_and_cleaned(tmp_path: Path, cache: Path) -> None:
    assert Snapshot.load("t") is None
    first = stored("t", tmp_path)
    assert (first.memory, first.compatibility, first.directory) == (256, COMPATIBILITY, cache / "snapshots/t")
    again = stored("t", tmp_path, b"other memory")
    assert (again.directory / "ram").read_bytes().startswith(b"other memory")
    assert (again.directory / "state").read_bytes() == b"state"
    assert clean(cache)
    assert Snapshot.load("t") is None
    assert [path.name for path in (cache / "snapshots").iterdir()] == []


@contextlib.contextmanager
def when_opened(path: Path, act: Callable[[], object]) -> Iterator[None]:
    """Act when anybody opens a file, who waits meanwhile: fcntl(2), leases."""

    def opened(_: int, __: object) -> None:
        act()
        fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_UNLCK)

    former = signal.signal(signal.SIGIO, opened)
    try:
        with path.open("r+b") as file:
            fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_WRLCK)
            yield
    finally:
        signal.signal(signal.SIGIO, former)


@pytest.mark.parametrize("opens", ["ram", "state"])
def test_memory_and_state_are_of_one_snapshot_even_if_it_is_replaced(tmp_path: Path, cache: Path, opens: str) -> None:
    directory = stored("t", tmp_path, b"old memory", b"old state").directory
    code = "import sys, pathlib; from caisson.image.vm.snapshot.ram import SavedFiles as S; "
    code += "files = S(pathlib.Path(sys.argv[1])); print(files.memory.read(3) + files.state.read(3))"
    with when_opened(directory / opens, lambda: stored("t", tmp_path, b"new memory", b"new state")):
        words = [sys.executable, "-c", code, str(directory)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() in ("b'oldold'", "b'newnew'")


def test_a_snapshot_is_for_its_owner_only(tmp_path: Path, cache: Path) -> None:
    """It contains a guest's memory."""
    directory = stored("t", tmp_path).directory
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in directory.iterdir()} == {0o600}


def test_one_that_cannot_be_stored_leaves_the_older_one(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored("t", tmp_path)

    def fail(source: int, target: int) -> int:
        os.write(target, b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ram, "pack", fail)
    with pytest.raises(VMError, match="snapshot 't' could not be stored: No space left on device"):
        stored("t", tmp_path, b"never")
    found = Snapshot.load("t")
    assert found is not None
    assert (found.directory / "ram").read_bytes().startswith(b"memory")
    assert [path.name for path in (cache / "snapshots").iterdir()] == ["t"]


@pytest.mark.parametrize("field", list(TITLES))
def test_snapshot_check_names_what_differs(tmp_path: Path, cache: Path, field: str) -> None:
    snapshot = stored("t", tmp_path)
    snapshot.check(COMPATIBILITY)
    with pytest.raises(VMError, match=rf"'t' does not fit: {TITLES[field]} was .*, and is another; .*save-snapshot"):
        snapshot.check(COMPATIBILITY.but(**{field: "another"}))


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "a/b", "x" * 101])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(VMError, match="is not a name; give up to 100"):
        Snapshot.load(name)


def test_one_of_another_time_says_the_way_out(tmp_path: Path, cache: Path) -> None:
    (stored("t", tmp_path).directory / "snapshot.json").write_text('{"format": 0}')
    with pytest.raises(VMError, match="was saved by an older Caisson; save it again: caisson save-snapshot t"):
        Snapshot.load("t")


def rendered(vsock: str, fd: int, *, clone: bool) -> list[str]:
    devices = qemu.Devices(Path("/c"), Path("/q"), vsock, vsock_fd=fd, cid=77, ram=Path("/r,1"), clone=clone)
    wanted = qemu.MachineSpec("v", "tcg", memory=256, cpus=1)
    return list(qemu.command(qemu.QemuProgram("qemu", (10, 0)), Path("/image"), MANIFEST, devices, wanted))


def test_the_machine_of_a_template_lacks_what_cannot_be_saved() -> None:
    words = rendered("user", -1, clone=False)
    assert after(words, "-object") == ["memory-backend-file,id=ram,size=256M,mem-path=/r,,1,share=on"]
    assert after(words, "-machine") == ["q35,memory-backend=ram"]
    assert "vmgenid,guid=auto" in after(words, "-device")
    assert not [word for word in words if "vsock-pci" in word or "id=vsock,fd" in word]
    assert "-incoming" not in words


def test_the_machine_of_a_clone_waits_and_gets_its_vsock_device_later() -> None:
    saved, words = rendered("user", -1, clone=False), rendered("user", 9, clone=True)
    assert words == [*saved, "-chardev", "socket,id=vsock,fd=9", "-incoming", "defer"]
    [(command, device)] = qemu.vsock_plug("user")
    assert command == "device_add"
    assert [word for word in words if word.startswith(f"pcie-root-port,id={device['bus']},")]


def test_the_kernels_device_is_saved_and_the_memory_of_a_clone_is_private() -> None:
    saved, words = rendered("vhost", 9, clone=False), rendered("vhost", 8, clone=True)
    assert "vhost-vsock-pci,guest-cid=77,vhostfd=9" in after(saved, "-device")
    assert "vhost-vsock-pci,guest-cid=77,vhostfd=8" in after(words, "-device")
    assert after(saved, "-object")[0].endswith("share=on")
    assert after(words, "-object")[0].endswith("share=off")
    assert qemu.vsock_plug("vhost") == []


def test_a_clone_is_what_the_template_is(tmp_path: Path, cache: Path) -> None:
    config = VMConfig.clone(stored("t", tmp_path), name="c")
    assert (config.memory, config.cpus, config.name, config.image) == (256, 1, "c", tmp_path)
    with pytest.raises(VMError, match="cannot have shared directories or room for more"):
        config.but(max_cpus=4)


def test_it_is_ready_when_the_agent_has_said_so(tmp_path: Path) -> None:
    assert not has_printed_ready(tmp_path / "agent.sock")
    (tmp_path / "console.log").write_text("[ 0.1] Linux\n")
    assert not has_printed_ready(tmp_path / "agent.sock")
    (tmp_path / "console.log").write_text("[ 0.1] Linux\ncaisson agent ready on vsock:1024\n")
    assert has_printed_ready(tmp_path / "agent.sock")


@pytest.fixture
def image(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("needs QEMU")
    monkeypatch.setenv("CAISSON_RUN", str(tmp_path / "r"))
    directory = make_image(tmp_path / "image")
    (directory / "k").write_bytes(sleeping_kernel())
    (directory / "i").write_bytes(b"\0" * 512)
    return directory


def saved_guest(image: Path) -> Snapshot:
    config = VMConfig(image, name="s", accel="tcg", vsock="user", memory=128, savable=True)
    with VM.start(config, ready=lambda _: True, timeout=60) as vm:
        assert vm.info["cid"] is None
        vm.save("t")
    found = Snapshot.load("t")
    assert found is not None
    return found


def test_a_saved_guest_runs_on_in_clones(image: Path, tmp_path: Path) -> None:
    snapshot = saved_guest(image)
    nothing_left(tmp_path / "r")
    before = hashlib.sha256((snapshot.directory / "ram").read_bytes()).digest()
    configs = [VMConfig.clone(snapshot, name=name, accel="tcg", vsock="user") for name in ("a", "b")]
    with (
        VM.start(configs[0], ready=Path.is_socket, timeout=60) as one,
        VM.start(configs[1], ready=Path.is_socket, timeout=60) as two,
    ):
        assert one.info["snapshot"] == two.info["snapshot"] == "t"
        assert one.info["cid"] != two.info["cid"]
        assert not one.agent_socket.with_name("state.sock").exists()
    nothing_left(tmp_path / "r")
    assert hashlib.sha256((snapshot.directory / "ram").read_bytes()).digest() == before


def test_a_clone_has_the_state_of_its_memory_even_if_the_snapshot_is_replaced(image: Path, tmp_path: Path) -> None:
    snapshot = saved_guest(image)
    other = tmp_path / "other"
    shutil.copytree(snapshot.directory, other)
    (other / "state").write_bytes(b"another guest's")

    def replace() -> None:
        snapshot.directory.rename(tmp_path / "old")
        other.rename(snapshot.directory)

    config = VMConfig.clone(snapshot, accel="tcg", vsock="user")
    with when_opened(snapshot.directory / "ram", replace), VM.start(config, ready=Path.is_socket, timeout=60) as vm:
        assert vm.info["snapshot"] == "t"
    assert not other.exists()
    nothing_left(tmp_path / "r")


def test_another_image_is_refused(image: Path, tmp_path: Path) -> None:
    snapshot = saved_guest(image)
    text = (image / "image.json").read_text()
    (image / "image.json").write_text(text.replace('"cmdline": ""', '"cmdline": "other"'))
    with pytest.raises(VMError, match="'t' does not fit: the image was"):
        VM.start(VMConfig.clone(snapshot, accel="tcg", vsock="user"), ready=lambda _: True)
    nothing_left(tmp_path / "r")


def test_another_qemu_is_refused(image: Path, tmp_path: Path) -> None:
    """It is not asked for its version before it runs: that would delay each clone."""
    file = saved_guest(image).directory / "snapshot.json"
    file.write_text(re.sub(r'"qemu": "[^"]*"', '"qemu": "6.66 (another)"', file.read_text()))
    here = qemu.probe(qemu.ARCHITECTURES["amd64"]).title
    snapshot = Snapshot.named("t")
    with pytest.raises(VMError, match=rf"'t' does not fit: QEMU was 6\.66 \(another\), and is {re.escape(here)};"):
        VM.start(VMConfig.clone(snapshot, accel="tcg", vsock="user"), ready=lambda _: True, timeout=60)
    nothing_left(tmp_path / "r")


def test_a_state_that_is_none_is_an_end_and_leaves_nothing(image: Path, tmp_path: Path) -> None:
    snapshot = saved_guest(image)
    (snapshot.directory / "state").write_bytes(b"no state at all" * 100)
    with pytest.raises(VMError, match=r"could not be restored|QEMU"):
        VM.start(VMConfig.clone(snapshot, accel="tcg", vsock="user"), ready=lambda _: False, timeout=60)
    nothing_left(tmp_path / "r")


def test_a_state_without_end_is_not_received(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAISSON_RUN", str(tmp_path / "r"))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    install(tmp_path / "bin")
    config = VMConfig(make_image(tmp_path / "image", "qmp endless"), name="v", accel="tcg", vsock="user", savable=True)
    with (
        VM.start(config, ready=lambda _: True) as vm,
        pytest.raises(VMError, match="could not be saved: QEMU sent more than 64 MiB"),
    ):
        vm.save("t")
    nothing_left(tmp_path / "r")


@pytest.mark.parametrize("compiled", [True, False])
def test_save_snapshot_says_what_it_compiles_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiled: bool
) -> None:
    """Before it starts: a machine that is silent for minutes seems to hang."""

    class Build:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def plan(self) -> list[Any]:
            return [SimpleNamespace(step="kernel", cached=compiled), SimpleNamespace(step="root", cached=False)]

        def image(self) -> Any:
            return SimpleNamespace(directory=Path(capsys.readouterr().err or "silent"))

    monkeypatch.setattr("caisson.image.Build", Build)
    monkeypatch.setattr(snapshot, "require", lambda *_: None)
    said = str(snapshot.lean_image())
    if compiled:
        assert said == "silent"
    else:
        assert re.search(r"compiles the kernel of the template `lean` first, once: .*, some \d+ minutes here", said)
