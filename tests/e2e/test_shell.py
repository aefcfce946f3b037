"""`caisson shell`: a person at a terminal, in a container and in the guest itself."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from tests.e2e.conftest import Caisson
from tests.e2e.terminal import Terminal

pytestmark = pytest.mark.vm

#: Seconds that "at once" may take on a busy machine without hardware virtualization.
AT_ONCE = 20.0


def test_a_session(vm: Caisson) -> None:
    vm.make_containers("session")
    with Terminal(vm, "shell", "--container", "session") as terminal:
        terminal.expect(b"# ")
        assert terminal.modes() != terminal.before  # raw: what is typed goes to the container as it is

        terminal.type(b"vi /tmp/poem\r")
        terminal.expect(b"~\x1b[")  # it has drawn its screen
        terminal.type(b"i")
        terminal.expect(b"I /tmp/poem")
        terminal.type(b"roses are red")
        terminal.expect(b"red")
        terminal.type(b"\x1b")
        terminal.expect(b"- /tmp/poem")
        terminal.type(b":wq\r")
        terminal.expect(b"# ")
        terminal.type(b"cat /tmp/poem; echo rea''d\r")
        assert b"roses are red" in terminal.expect(b"read")

        terminal.type(b'sh -c \'trap "stty size; exit" WINCH; echo wait""ing; while :; do sleep 0.1; done\'\r')
        terminal.expect(b"waiting")
        terminal.resize(44, 120)
        terminal.expect(b"44 120")

        terminal.type(b"sh -c 'echo sleep\"\"ing; exec sleep 1000'\r")
        terminal.expect(b"sleeping")
        terminal.type(b"\x03")
        terminal.expect(b"# ")
        terminal.type(b"echo status-$?\r")
        terminal.expect(b"status-130")

        terminal.expect(b"# ")
        terminal.type(b"(exit 9)\r")
        terminal.expect(b"# ")
        terminal.type(b"\x04")
        assert terminal.status() == 9
        assert terminal.modes() == terminal.before


def test_a_background_job_that_holds_the_terminal(vm: Caisson) -> None:
    vm.make_containers("session")
    with Terminal(vm, "shell", "--container", "session") as terminal:
        terminal.expect(b"# ")
        terminal.type(b"(trap '' HUP; echo job-start''ed; exec sleep 1000) &\r")
        terminal.expect(b"job-started")
        began = time.monotonic()
        terminal.type(b"exit 4\r")
        assert terminal.status() == 4
        assert time.monotonic() - began < AT_ONCE
        assert terminal.modes() == terminal.before


def test_commands_from_a_pipe(vm: Caisson) -> None:
    vm.make_containers("session")
    done = vm("shell", "--container", "session", stdin=b"echo $((6 * 7)); exit 3\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"42\n", b"")


def test_a_guest_without_a_shell_of_its_own(vm: Caisson) -> None:
    done = vm("shell", "--guest")
    assert done.returncode == 125
    assert b"boot it with: caisson boot-vm --append agent.debug_console_vport=1026" in done.stderr


@pytest.mark.parametrize("victim", ["qemu", "supervisor"])
def test_a_vm_that_is_killed_leaves_terminals_as_they_were(own: Caisson, victim: str) -> None:
    booted = own("boot-vm", "--name", "dies", "--detach", "--append", "agent.debug_console_vport=1026")
    assert booted.returncode == 0, booted.stderr.decode()
    words = ("shell", "--name", "dies")
    with contextlib.ExitStack() as stack:
        # All at once, as nothing but a machine types: a busy guest takes its time for each.
        inside, full, guest = (stack.enter_context(Terminal(own, *words, *more)) for more in ((), (), ("--guest",)))
        for terminal in (inside, full, guest):
            terminal.expect(b"# ")
        full.type(b"vi\r")
        full.expect(b"~\x1b[")
        guest.expect(b"# ")  # the first command is ours: its size
        guest.type(b"cat /proc/1/comm; stty size; echo do''ne\r")
        shown = guest.expect(b"done")
        assert b"31 97" in shown, shown
        os.kill(own.info("dies")["pids"][victim], signal.SIGKILL)
        for terminal, why in ((inside, b"agent"), (full, b"agent"), (guest, b"has ended")):
            assert terminal.status(AT_ONCE) == 125
            assert b"caisson: " in terminal.output and why in terminal.output, terminal.output
            assert terminal.modes() == terminal.before


def test_the_guests_own_shell_ends_well(own: Caisson) -> None:
    booted = own("boot-vm", "--name", "open", "--detach", "--append", "agent.debug_console_vport=1026")
    assert booted.returncode == 0, booted.stderr.decode()
    with Terminal(own, "shell", "--name", "open", "--guest") as terminal:
        terminal.expect(b"# ")
        terminal.expect(b"# ")  # its size is told first
        assert terminal.modes() != terminal.before
        terminal.type(b"\x04")
        assert terminal.status() == 0
        assert terminal.modes() == terminal.before
    piped = own("shell", "--name", "open", "--guest", stdin=b"echo end-$((1 + 1))\n")
    assert piped.returncode == 0 and b"end-2" in piped.stdout, piped.stderr
    with Terminal(own, "shell", "--name", "open", "--guest") as terminal:
        terminal.expect(b"# ")
        terminal.process.terminate()
        assert terminal.status(AT_ONCE) != 0
        assert terminal.modes() == terminal.before
    assert own("stop-vm", "--name", "open").returncode == 0
