"""Test `caisson shell`: a user at a terminal, in a container and in the guest itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import pytest

from tests.e2e.conftest import Caisson
from tests.e2e.terminal import Terminal

pytestmark = pytest.mark.vm

#: Maximum seconds for an immediate reaction, on a busy machine without hardware virtualization.
MAX_LATENCY = 20.0


def test_a_session(vm: Caisson) -> None:
    vm.make_containers("session")
    with Terminal(vm, "shell", "--container", "session") as terminal:
        terminal.expect(b"# ")
        assert terminal.modes() != terminal.before  # raw: input is passed to the container unchanged

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
        assert time.monotonic() - began < MAX_LATENCY
        assert terminal.modes() == terminal.before


def test_commands_from_a_pipe(vm: Caisson) -> None:
    vm.make_containers("session")
    done = vm("shell", "--container", "session", stdin=b"echo $((6 * 7)); exit 3\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"42\n", b"")


def test_the_guest_itself(vm: Caisson) -> None:
    """Its root, its processes and its programs, ahead of busybox's."""
    script = "cat /proc/1/comm; ls -d /usr/lib/caisson/nsexec; ls /dev/vsock; exit 3"
    done = vm("exec", "--guest", "--", "sh", "-c", script)
    lines = done.stdout.split()
    assert done.returncode == 3 and lines[1:] == [b"/usr/lib/caisson/nsexec", b"/dev/vsock"], (done.stdout, done.stderr)
    assert lines[0] in (b"python3", b"python3.13", b"init"), lines
    found = vm("exec", "--guest", "--", "which", "python3.13", "ls")
    assert found.stdout.split()[0] == b"/usr/bin/python3.13", "expected the template's own"
    assert found.stdout.split()[1].endswith(b"busybox/bin/ls")
    assert vm("exec", "--guest", "--env", "A=b", "--", "sh", "-c", "echo $A; id -u", stdin=b"").stdout == b"b\n0\n"
    assert vm("exec", "--guest", "--", "cat", stdin=b"piped\n").stdout == b"piped\n"
    missing = vm("exec", "--guest", "--", "frobnicate")
    assert missing.returncode == 127 and missing.stderr.count(b"\n") == 1
    clash = vm("exec", "--guest", "--container", "x", "--", "true")
    assert clash.returncode == 125 and b"--guest: is outside all containers" in clash.stderr
    mounts = vm("exec", "--guest", "--", "grep", "-c", "/guest/root ", "/proc/1/mountinfo")
    assert mounts.stdout == b"1\n", "all commands must share one mount"
    assert b"guest-" not in vm("ps", "--all").stdout


def test_a_terminal_in_the_guest_itself(vm: Caisson) -> None:
    with Terminal(vm, "shell", "--guest") as terminal:
        terminal.expect(b"# ")
        assert terminal.modes() != terminal.before
        terminal.type(b"stty size; cat /proc/1/comm\r")
        terminal.expect(b"31 97")
        terminal.resize(44, 120)
        terminal.type(b"stty size\r")
        terminal.expect(b"44 120")
        terminal.type(b"exit 6\r")
        assert terminal.status() == 6
        assert terminal.modes() == terminal.before
    piped = vm("shell", "--guest", stdin=b"echo end-$((1 + 1)); exit 4\n")
    assert (piped.returncode, piped.stdout) == (4, b"end-2\n"), piped.stderr


@pytest.mark.parametrize("victim", ["qemu", "supervisor"])
def test_a_vm_that_is_killed_leaves_terminals_as_they_were(own: Caisson, victim: str) -> None:
    """Each connected command reports that it has ended, and why."""
    booted = own("boot-vm", "--name", "dies", "--detach")
    assert booted.returncode == 0, booted.stderr.decode()
    own.make_containers("waits", vm="dies")
    words = ("shell", "--name", "dies")
    with contextlib.ExitStack() as stack:
        # Before the terminals, which take longer to print anything.
        waiting, measuring, running, forwarding = (
            stack.enter_context(own.start(*line, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE))
            for line in (
                ("wait", "waits", "--name", "dies"),
                ("stats", "waits", "--name", "dies", "--interval", "600"),
                ("exec", "--guest", "--name", "dies", "--", "sleep", "1000"),
                ("forward", "0:vsock:1024", "--name", "dies"),
            )
        )
        for command in (waiting, measuring, running, forwarding):
            stack.callback(command.kill)
        assert forwarding.stderr is not None and forwarding.stderr.readline()
        # All at once, as only a machine types: a busy guest takes its time for each.
        inside, full, guest = (stack.enter_context(Terminal(own, *words, *more)) for more in ((), (), ("--guest",)))
        for terminal in (inside, full, guest):
            terminal.expect(b"# ")
        full.type(b"vi\r")
        full.expect(b"~\x1b[")
        os.kill(own.info("dies")["pids"][victim], signal.SIGKILL)
        for terminal in (inside, full, guest):
            assert terminal.status(MAX_LATENCY) == 125
            assert b"caisson: VM 'dies': the VM has ended: " in terminal.output, terminal.output
            assert terminal.modes() == terminal.before
        for command, status in ((waiting, 1), (measuring, 1), (running, 125)):
            _, said = command.communicate(timeout=MAX_LATENCY)
            assert command.returncode == status and said.startswith(b"caisson: VM 'dies': the VM has ended: "), said
            assert said.count(b"\n") == 1 and b"UNAVAILABLE" not in said and b"rpc" not in said
        _, said = forwarding.communicate(timeout=MAX_LATENCY)
        assert forwarding.returncode == 0 and said.startswith(b"caisson: VM 'dies': the VM has ended: "), said
