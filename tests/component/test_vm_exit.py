"""Test how a VM's exit is found, explained and remembered, with a program that plays QEMU."""

from __future__ import annotations

import os
import re
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson.agent.client import AgentGone
from caisson.agent.client.errors import ContainerUnavailable
from caisson.commands.running import explain_exit
from caisson.image.vm import VM, VMError, exit_reason, find_vm, get_vm, list_vms
from caisson.image.vm.children import ChildProcesses
from caisson.image.vm.directory import VMDirectory
from caisson.image.vm.errors import VMEnded
from caisson.image.vm.exit_reason import POWERED_OFF
from caisson.image.vm.hotplug import virtiofsd
from caisson.image.vm.hotplug.virtiofsd import Shares
from caisson.image.vm.runroot import owned_run_root
from caisson.image.vm.sandbox import Confinement
from tests.component.fake_qemu import Images, image_maker, start
from tests.support.poll import wait_until


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Images]:
    with image_maker(tmp_path, monkeypatch) as make:
        yield make


def test_a_guest_that_powers_off_ends_the_wait(image: Images) -> None:
    heard: list[bytes] = []
    with start(image("poweroff")) as vm:
        wait_until((vm.directory / "console.log").exists)
        os.kill(vm.info["pids"]["qemu"], signal.SIGUSR1)
        vm.wait(heard.append)
    assert b"last words" in b"".join(heard)
    assert list_vms() == []


def test_errors_of_an_ended_vm_give_its_exit_reason(image: Images) -> None:
    vm = start(image("poweroff panic"))
    vm.detach()
    user = find_vm("v")
    assert user is not None
    assert user.exit_reason(timeout=0.1) is None
    wait_until((vm.directory / "console.log").exists)
    os.kill(vm.info["pids"]["qemu"], signal.SIGUSR1)
    assert user.exit_reason(timeout=30) == "the guest's kernel panicked: Fatal exception"


def test_one_that_was_stopped_says_so_to_whoever_used_it(image: Images) -> None:
    vm = start(image(""))
    vm.detach()
    user = find_vm("v")
    assert user is not None
    vm.stop()
    assert user.exit_reason() == "it was stopped"


def test_reasons_do_not_pile_up(image: Images, tmp_path: Path) -> None:
    owned_run_root(make=True)
    for number in range(exit_reason.MAX_STORED + 20):
        exit_reason.record(VMDirectory.of(f"exec-{number}"), "it was stopped")
    assert len(list((tmp_path / "cache/ended").iterdir())) == exit_reason.MAX_STORED + 1
    assert exit_reason.read(VMDirectory.of(f"exec-{number}")) == "it was stopped"


def test_why_a_vm_in_the_background_has_ended(image: Images) -> None:
    vm = start(image("poweroff panic"))
    vm.detach()
    wait_until((vm.directory / "console.log").exists)
    os.kill(vm.info["pids"]["qemu"], signal.SIGUSR1)
    wait_until(lambda: find_vm("v") is None)
    assert re.match(
        r"VM 'v': is not running; running: none; start it: .*\nthe last one ended \d s ago: .*panicked", said()
    )
    assert "the console's last lines:\n" in said() and "more" in said()
    vm = start(image(""))
    vm.detach()
    vm.stop()
    assert "ended" not in said()  # it was intended


def said() -> str:
    with pytest.raises(VMError) as caught:
        get_vm("v")
    return str(caught.value)


def test_a_guest_that_panics_has_not_powered_off(image: Images) -> None:
    with start(image("poweroff panic")) as vm:
        wait_until((vm.directory / "console.log").exists)
        os.kill(vm.info["pids"]["qemu"], signal.SIGUSR1)
        with pytest.raises(VMError, match="kernel panicked: Fatal exception\n"):
            vm.wait()


def lost(vm: VM, error: Exception, *, kill: bool) -> None:
    """Return what a command runs into in its block."""
    with explain_exit(vm):
        if kill:
            os.kill(vm.info["pids"]["qemu"], signal.SIGKILL)
        raise error


def test_the_end_of_a_vm_explains_what_was_lost_with_it(image: Images) -> None:
    gone = AgentGone("Stream removed")
    with start(image("")) as vm:
        with pytest.raises(AgentGone):
            lost(vm, gone, kill=False)
        with pytest.raises(VMEnded, match=r"VM 'v': the VM has ended: QEMU .*(signal 9|SIGKILL|killed)") as caught:
            lost(vm, gone, kill=True)
        assert "Stream removed" not in str(caught.value)


def test_an_error_of_a_vm_that_runs_stays_what_it_is(image: Images) -> None:
    with start(image("")) as vm:
        for error in (
            ContainerUnavailable("container x: does not exist"),
            VMError("x"),
            FileNotFoundError(2, "x", "y"),
        ):
            with pytest.raises(type(error)) as caught:
                lost(vm, error, kill=False)
            assert caught.value is error


def test_a_vm_exits_with_qemu_however_long_it_takes_after_its_vsock_device(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, ChildProcesses(log) as children:
        children.spawn("qemu", ["sleep", "1"], [], Confinement())  # more than a child has to exit on request
        children.spawn("vsock", ["true"], [], Confinement())
        ready, _, _ = select.select(children.pidfds, [], [])
        assert children.exit_reason(ready) == POWERED_OFF


def test_a_share_whose_server_could_not_be_started_is_no_obstacle_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = iter((["/nonexistent"], ["sleep", "60"]))
    monkeypatch.setattr(virtiofsd, "command", lambda *_, **__: next(programs))
    with (tmp_path / "log").open("wb") as log, ChildProcesses(log) as children:
        shares = Shares(VMDirectory(tmp_path), children)
        with pytest.raises(VMError, match="cannot be started"):
            shares.serve("first", tmp_path, False)
        assert shares.serve("second", tmp_path, False).is_socket()
