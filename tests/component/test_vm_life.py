"""Test a VM's life without a guest, with a program that plays QEMU."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson.commands.vm import list_running
from caisson.image.vm import VM, VMConfig, VMError, accel, find_vm, list_vms, qemu, supervisor
from caisson.image.vm import machine as machines
from caisson.image.vm.directory import VMDirectory
from caisson.image.vm.jsonsocket import JSONSocket
from caisson.image.vm.pace import slowness
from caisson.image.vm.running import vms_by_version
from caisson.image.vm.runroot import owned_run_root
from caisson.proto.contract import VERSION, VM_FORMAT
from tests.component.fake_qemu import Images, image_maker, lives, start
from tests.support.poll import wait_until


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Images]:
    with image_maker(tmp_path, monkeypatch) as make:
        yield make


def never(_: Path) -> bool:
    return False


def test_a_vm_is_found_described_and_stopped(image: Images) -> None:
    with start(image("")) as vm:
        assert vm.info["accel"] == "tcg"
        assert lives(vm.info["pids"]["qemu"])
        found = find_vm("v")
        assert found is not None
        assert [other.name for other in list_vms()] == ["v"]
        assert vm.agent_socket.is_socket()
        assert vm.directory.stat().st_mode & 0o777 == 0o700
        with pytest.raises(VMError, match="stop-vm v"):
            start(Path(vm.info["image"]))
        assert find_vm("v") is not None  # the rejected one has done it no harm
    assert find_vm("v") is None


def test_a_detached_vm_outlives_its_starter_and_is_stopped_by_another(image: Images) -> None:
    vm = start(image(""))
    vm.detach()
    found = find_vm("v")
    assert found is not None
    found.stop()
    assert list_vms() == []


def test_two_vms_beside_each_other(image: Images) -> None:
    with start(image("")) as one, start(Path(one.info["image"]), name="w"):
        assert [vm.name for vm in list_vms()] == ["v", "w"]


def test_a_second_vm_of_a_name_is_refused_in_one_line_and_the_first_stays(image: Images) -> None:
    with start(image("")) as vm:
        with pytest.raises(VMError, match=r"^VM 'v': is running already; stop it: caisson stop-vm v$"):
            start(Path(vm.info["image"]))
        assert [one.name for one in list_vms()] == ["v"]


def test_a_stubborn_qemu_is_killed(image: Images) -> None:
    with start(image("stubborn")):
        pass
    assert list_vms() == []


def test_a_qemu_that_fails_is_quoted(image: Images) -> None:
    with pytest.raises(VMError, match="QEMU exited with status 1") as caught:
        start(image("fail"), ready=never)
    assert "no such machine" in str(caught.value)
    assert "last words of the guest" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_guest_that_is_never_ready_is_given_up(image: Images) -> None:
    def asked(agent_socket: Path) -> bool:
        console = agent_socket.with_name("console.log")
        wait_until(lambda: console.exists() and console.stat().st_size)
        return False

    with pytest.raises(
        VMError, match=r"did not answer within 1 s; the guest last printed something \d s ago"
    ) as caught:
        start(image(""), ready=asked, timeout=1.0)
    assert "last words of the guest" in str(caught.value)


def test_a_silent_guest_is_called_silent(image: Images) -> None:
    with pytest.raises(VMError, match="did not answer within 0 s; the guest printed nothing") as caught:
        start(image("mute"), ready=never, timeout=0.3)
    assert "console" not in str(caught.value)


def test_waiting_for_a_guest_burns_no_time(image: Images) -> None:
    asked: list[float] = []

    def tenth(_: Path) -> bool:
        asked.append(time.monotonic())
        return len(asked) == 10

    with start(image(""), ready=tenth):
        assert asked[-1] - asked[0] > 0.1


def test_a_ready_that_fails_leaves_nothing(image: Images) -> None:
    def broken(_: Path) -> bool:
        raise RuntimeError("a bug of the caller's")

    with pytest.raises(RuntimeError, match="a bug"):
        start(image(""), ready=broken)
    assert list_vms() == []


def test_it_is_starting_until_it_is_ready(image: Images) -> None:
    states = []

    def look(_: Path) -> bool:
        (vm,) = list_vms()
        states.append(vm.info["state"])
        return True

    with start(image(""), ready=look) as vm:
        assert states == ["starting"]
        assert vm.info["state"] == "running"
        assert 0 < vm.info["boot_seconds"] < 30
    assert vm.info["state"] == "running"  # the last known state


def test_qemu_is_not_asked_to_exit(image: Images) -> None:
    vm = start(image("stubborn"))
    ended: list[str] = []

    def follow() -> None:
        with pytest.raises(VMError) as caught:
            vm.wait()
        ended.append(str(caught.value))

    follower = threading.Thread(target=follow)
    follower.start()
    found = find_vm("v")
    assert found is not None
    found.stop()
    follower.join()
    assert "it was stopped" in ended[0]
    assert "a request to exit" not in ended[0]
    vm.stop()


def test_logs_follow_the_console(image: Images) -> None:
    heard: list[bytes] = []
    config = VMConfig(image(""), name="v", accel="tcg", vsock="user")
    with VM.start(config, ready=lambda _: bool(heard), console=heard.append):
        assert b"".join(heard) == b"line one\x1b[2J\nlast words of the guest\n"


def test_a_closed_screen_ends_nothing(image: Images) -> None:
    called = threading.Event()

    def closed(_: bytes) -> None:
        called.set()
        raise BrokenPipeError

    config = VMConfig(image(""), name="v", accel="tcg", vsock="user")
    with VM.start(config, ready=lambda _: called.is_set(), console=closed) as vm:
        assert lives(vm.info["pids"]["qemu"])
        for follow in (False, True):
            with pytest.raises(BrokenPipeError):
                vm.show(closed, follow=follow)


BOOTING = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
from caisson.image.vm import VM, VMConfig
def never(_):
    print("asked", flush=True)
    return False
try:
    VM.start(VMConfig(Path(sys.argv[1]), name="v", accel="tcg", vsock="user"), ready=never)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("behaviour", ["", "stubborn", "qmp"])
def test_ctrl_c_ends_a_boot_within_two_seconds(image: Images, behaviour: str) -> None:
    words = [sys.executable, "-c", BOOTING, str(image(behaviour))]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as boot:
        assert boot.stdout is not None
        assert boot.stdout.readline() == b"asked\n"
        began = time.monotonic()
        boot.send_signal(signal.SIGINT)
        boot.stdout.read()
        assert boot.wait(60) == 130
        assert time.monotonic() - began < 2 * slowness()


@pytest.mark.parametrize("behaviour", ["kvm-dies", "kvm-mute"])
def test_kvm_that_runs_nothing_is_found_out(
    image: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    """/dev/kvm may belong to a back end in which stock guests hang, or on which QEMU gives up."""
    (tmp_path / "kvm").touch()
    machine = accel.Host("x86_64", "flags\t: vmx\n", kvm=tmp_path / "kvm", vhost_vsock=tmp_path / "none")
    monkeypatch.setattr(accel.Host, "current", lambda: machine)
    monkeypatch.setattr(machines, "KVM_SILENCE_TIMEOUT", 1.0)
    monkeypatch.delenv("CAISSON_ACCEL", raising=False)
    said: list[str] = []
    directory = image(behaviour)

    def ready(agent_socket: Path) -> bool:
        return "last words" in VMDirectory(agent_socket.parent).console_tail()

    config = VMConfig(directory, name="v", accel="auto", vsock="user")
    with VM.start(config, ready=ready, report=said.append, timeout=60) as vm:
        assert vm.info["accel"] == "tcg"
    assert "KVM" in said[0]
    assert said[1].endswith("going on with TCG (emulation)")
    with pytest.raises(VMError, match=r"KVM does not run the guest|QEMU exited with status 1"):
        VM.start(config.but(accel="kvm"), ready=ready, timeout=60)


def test_a_stale_directory_makes_room(image: Images) -> None:
    stale = VMDirectory.of("v")
    owned_run_root(make=True)
    stale.create().close()
    stale.agent_socket.touch()
    with start(image("")) as vm:
        assert vm.agent_socket.is_socket()


def test_a_host_that_was_suspended(image: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine cannot be suspended for a test, so its clocks are faked."""
    monkeypatch.setattr(supervisor, "SUSPEND_CHECK_INTERVAL", 0.05)
    told, seconds = tmp_path / "told", [5.0]
    config = VMConfig(
        image(""), name="v", accel="tcg", vsock="user", on_resume=("/bin/sh", "-c", 'echo "$1" >>"$0"', str(told))
    )
    owned_run_root(make=True)
    directory = VMDirectory.of("v")
    program = vars(qemu.probe(qemu.ARCHITECTURES["amd64"]))
    document = config.document(*config.choices()) | {"directory": str(directory.path), "program": program}
    starter, theirs = socket.socketpair()
    stop, wake = socket.socketpair()
    keeper = supervisor.Supervisor(document, JSONSocket(theirs), stop, lambda: seconds[0])
    thread = threading.Thread(target=keeper.run)
    thread.start()
    assert (JSONSocket(starter).receive(30) or {})["info"]["name"] == "v"
    for number in (1, 2):
        seconds[0] += 3600
        wait_until(lambda number=number: told.exists() and told.read_text().count("\n") == number)  # type: ignore[misc]
    wake.send(b".")
    thread.join(30)
    assert told.read_text() == f"{directory.agent_socket}\n" * 2
    for end in (starter, theirs, stop, wake):
        end.close()


def test_a_directory_without_an_image_is_refused(image: Images, tmp_path: Path) -> None:
    with pytest.raises(VMError, match=r"contains no image \(no such file or directory\); build one"):
        start(tmp_path)
    incomplete = image("")
    (incomplete / "k").unlink()
    with pytest.raises(VMError, match="lacks k; build it again"):
        start(incomplete)


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}", '{"arch": "amd64"}', '{"arch": "amd64", "kernel": 1}'])
def test_a_manifest_that_is_none_is_refused(image: Images, text: str) -> None:
    broken = image("")
    (broken / "image.json").write_text(text)
    with pytest.raises(VMError, match=r"image\.json does not describe|None: the image is for it"):
        start(broken)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret"])
def test_a_guest_gets_no_file_from_outside_its_image(image: Images, name: str) -> None:
    there = image("")
    (there.parent / "secret").write_text("the host's")
    manifest = json.loads((there / "image.json").read_text())
    (there / "image.json").write_text(json.dumps(manifest | {"root": manifest["root"] | {"file": name}}))
    with pytest.raises(VMError, match=f"does not describe an image: '{name}' is not a file in its directory"):
        start(there)


@pytest.mark.parametrize("options", [{"memory": 1}, {"cpus": 0}, {"cpus": 1000}])
def test_sizes_without_sense(options: dict[str, int]) -> None:
    with pytest.raises(VMError, match="--"):
        VMConfig(Path("/image"), **options)  # type: ignore[arg-type]


def test_a_vm_of_another_version_is_refused_by_name_and_listed(
    image: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    with start(image("")) as vm:
        assert (vm.info["format"], vm.info["version"]) == (VM_FORMAT, VERSION)
        document = vm.directory / "vm.json"
        document.write_text(json.dumps(vm.info | {"format": 99, "version": "7.0"}))
        pid = vm.info["pids"]["supervisor"]
        with pytest.raises(VMError) as caught:
            find_vm("v")
        assert str(caught.value) == (
            f"VM 'v': was started by Caisson 7.0, this is {VERSION}; use that one, or stop its supervisor: kill {pid}"
        )
        assert list_vms() == [] and vms_by_version()[1] == {"v": "7.0"}
        list_running(as_json=False)
        assert capsys.readouterr().out.splitlines()[1].split() == ["v", "of", "Caisson", "7.0", *"------"]
