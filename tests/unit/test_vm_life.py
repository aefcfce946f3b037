"""A VM's life without a guest: a program that plays QEMU, and every party killed once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from image.vm import VM, VMConfig, VMError, find_vm, list_vms
from image.vm.directory import VMDirectory, living

ROOT = Path(__file__).resolve().parents[2]

#: Plays QEMU: says its version, prints to the console, and does what the image's command line says.
QEMU = """#!{python}
import signal, sys, time
if "--version" in sys.argv:
    print("QEMU emulator version 9.9.9")
    sys.exit()
console = next(word for word in sys.argv if word.startswith("file,id=console")).partition("path=")[2]
with open(console, "w") as file:
    file.write("line one\\x1b[2J\\nlast words of the guest\\n")
words = sys.argv[sys.argv.index("-append") + 1].split()
if "stubborn" in words:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "fail" in words:
    sys.exit("qemu: no such machine")
if "poweroff" in words:
    sys.exit(0)
time.sleep(1000)
"""


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_of(path: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(path) in words and process.name != str(os.getpid()):
            found.append(words.replace(b"\0", b" ").decode(errors="replace"))
    return found


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Makes images whose guest does as told, in a run directory of the test's own."""
    tools = tmp_path / "bin"
    tools.mkdir()
    program = tools / "qemu-system-x86_64"
    program.write_text(QEMU.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    run = tmp_path / "r"
    monkeypatch.setenv("CAISSON_RUN", str(run))

    def make(behaviour: str = "") -> Path:
        directory = tmp_path / f"image-{behaviour}"
        directory.mkdir()
        manifest = {
            "arch": "amd64",
            "cmdline": behaviour,
            "kernel": {"file": "k"},
            "initrd": {"file": "i"},
        }
        (directory / "image.json").write_text(json.dumps(manifest))
        return directory

    yield make
    wait_until(lambda: not run.exists() or not list(run.iterdir()))
    wait_until(lambda: not processes_of(run))


def ready(_: Path) -> bool:
    return True


def never(_: Path) -> bool:
    time.sleep(0.02)
    return False


def start(image: Path, name: str = "v", **options: str) -> VM:
    return VM.start(VMConfig(image, name=name, accel="tcg", vsock="user", **options), ready=ready)  # type: ignore[arg-type]


def test_a_vm_is_found_described_and_stopped(image: Callable[[str], Path]) -> None:
    with start(image("")) as vm:
        assert vm.info["accel"] == "tcg"
        assert _lives(vm.info["pids"]["qemu"])
        found = find_vm("v")
        assert found is not None
        assert [other.name for other in list_vms()] == ["v"]
        assert vm.agent_socket.is_socket()
        assert vm.directory.stat().st_mode & 0o777 == 0o700
        with pytest.raises(VMError, match="stop-vm --name v"):
            start(Path(vm.info["image"]))
        assert find_vm("v") is not None  # the refused one has not harmed it
    assert find_vm("v") is None


def test_a_detached_vm_outlives_its_starter_and_is_stopped_by_another(image: Callable[[str], Path]) -> None:
    vm = start(image(""))
    vm.detach()
    found = find_vm("v")
    assert found is not None
    found.stop()
    assert list_vms() == []


def test_two_vms_beside_each_other(image: Callable[[str], Path]) -> None:
    with start(image("")) as one, start(Path(one.info["image"]), name="w"):
        assert [vm.name for vm in list_vms()] == ["v", "w"]


def test_a_stubborn_qemu_is_killed(image: Callable[[str], Path]) -> None:
    with start(image("stubborn")):
        pass
    assert list_vms() == []


def test_a_qemu_that_fails_is_quoted(image: Callable[[str], Path]) -> None:
    with pytest.raises(VMError, match="QEMU exited with status 1") as caught:
        VM.start(VMConfig(image("fail"), name="v", accel="tcg", vsock="user"), ready=never)
    assert "no such machine" in str(caught.value)
    assert "last words of the guest" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_guest_that_is_never_ready_is_given_up(image: Callable[[str], Path]) -> None:
    with pytest.raises(VMError, match="did not answer within 1 s") as caught:
        VM.start(VMConfig(image(""), name="v", accel="tcg", vsock="user"), ready=never, timeout=1.0)
    assert "last words of the guest" in str(caught.value)


def test_a_guest_that_powers_off_ends_the_wait(image: Callable[[str], Path]) -> None:
    heard: list[bytes] = []
    with start(image("poweroff")) as vm:
        vm.wait(heard.append)
    assert list_vms() == []


@pytest.mark.parametrize("part", ["supervisor", "qemu", "vsock"])
def test_a_killed_part_takes_everything_with_it(image: Callable[[str], Path], part: str) -> None:
    vm = start(image(""))
    vm.detach()
    pids = vm.info["pids"]
    os.kill(pids[part], signal.SIGKILL)
    wait_until(lambda: not vm.directory.exists())
    for pid in pids.values():
        wait_until(lambda pid=pid: not _lives(pid))


def _lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_killed_starter_takes_its_vm_with_it(image: Callable[[str], Path]) -> None:
    program = (
        "import sys, time; from pathlib import Path; from image.vm import *\n"
        "VM.start(VMConfig(Path(sys.argv[1]), name='v', accel='tcg', vsock='user'), ready=lambda s: True)\n"
        "print('up', flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", program, image("")], cwd=ROOT, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"up\n"
        starter.kill()
    wait_until(lambda: not list_vms())


def test_a_stale_directory_makes_room(image: Callable[[str], Path]) -> None:
    stale = VMDirectory.of("v")
    stale.path.mkdir(parents=True)
    (stale.path / "lock").touch()
    (stale.path / "agent.sock").touch()
    with start(image("")) as vm:
        assert vm.agent_socket.is_socket()


def test_stale_directories_go_when_somebody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAISSON_RUN", str(tmp_path))
    (tmp_path / "old").mkdir()
    (tmp_path / "old/lock").touch()
    (tmp_path / "else").mkdir()  # nothing says that it was a VM
    assert list(living()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["else"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b", "a\n"])
def test_names_that_cannot_be_directories(name: str) -> None:
    with pytest.raises(VMError, match="name is made of"):
        VMDirectory.of(name)


def test_a_name_too_long_for_a_socket() -> None:
    with pytest.raises(VMError, match="too long"):
        VMDirectory.of("x" * 100)


@pytest.mark.parametrize("options", [{"memory": 1}, {"cpus": 0}, {"cpus": 1000}])
def test_sizes_without_sense(options: dict[str, int]) -> None:
    with pytest.raises(VMError, match="--"):
        VMConfig(Path("/image"), **options)  # type: ignore[arg-type]
