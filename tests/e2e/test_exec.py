"""Test `caisson exec` on a running VM: streams, exit status, arguments, terminal."""

from __future__ import annotations

import hashlib
import random
import signal

import pytest

from tests.e2e.conftest import TIMEOUT, Caisson
from tests.e2e.terminal import Terminal
from tests.support.poll import wait_until

pytestmark = pytest.mark.vm


def test_streams_are_separate_and_the_exit_status_is_the_programs(vm: Caisson) -> None:
    done = vm("exec", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_twenty_megabytes_of_stdin_arrive_unchanged(vm: Caisson) -> None:
    data = random.Random(1).randbytes(20_000_000)
    done = vm("exec", "--", "sha256sum", stdin=data)
    assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest(), done.stderr


def test_binary_goes_through_both_ways(vm: Caisson) -> None:
    data = bytes(range(256)) * 4096
    done = vm("exec", "--", "cat", stdin=data)
    assert (done.returncode, done.stdout, done.stderr) == (0, data, b"")


def test_a_killed_program_is_128_plus_the_signal_and_keeps_its_output(vm: Caisson) -> None:
    done = vm("exec", "--", "sh", "-c", 'echo "a  b"; kill -9 $$')
    assert (done.returncode, done.stdout, done.stderr) == (137, b"a  b\n", b"")


def test_words_reach_the_guest_as_typed(vm: Caisson) -> None:
    words = ["a  b", "", "'quoted'", '"', "$HOME", "*", "--", "-x", "line\nline", "ünïcode", "\\"]
    done = vm("exec", "--", "sh", "-c", 'for w; do printf "%s\\0" "$w"; done', "sh", *words)
    assert done.stdout.decode().split("\0")[:-1] == words, done.stderr


def test_a_missing_program_is_one_line_and_127(vm: Caisson) -> None:
    done = vm("exec", "--", "no-such-program")
    assert done.returncode == 127
    assert done.stderr.count(b"\n") == 1
    assert b'exec: "no-such-program": executable file not found in $PATH' in done.stderr


@pytest.mark.parametrize(("file", "why"), [("/etc/passwd", b"permission denied"), ("/etc", b"is a directory")])
def test_a_file_that_is_no_program_is_126(vm: Caisson, file: str, why: bytes) -> None:
    done = vm("exec", "--", file)
    assert done.returncode == 126
    assert why in done.stderr


def test_environment_user_and_directory(vm: Caisson) -> None:
    script = 'echo "$A" "$(id -u):$(id -g)" "$(pwd)"'
    done = vm("exec", "--env", "A=x  y", "--user", "1000:1001", "--workdir", "/tmp", "--", "sh", "-c", script)
    assert done.stdout == b"x  y 1000:1001 /tmp\n", done.stderr


def test_users_have_names_as_in_the_containers_passwd(vm: Caisson) -> None:
    done = vm("exec", "--user", "nobody", "--", "sh", "-c", 'echo "$(id -u):$(id -g) $HOME"')
    assert done.stdout == b"65534:65534 /\n", done.stderr
    done = vm("exec", "--user", "nosuch", "--", "true")
    assert done.returncode == 125 and b"unable to find user nosuch" in done.stderr


def test_background_jobs_do_not_hold_the_command(vm: Caisson) -> None:
    done = vm("exec", "--", "sh", "-c", "sleep 1000 & echo started; exit 3")
    assert (done.returncode, done.stdout) == (3, b"started\n")


def test_a_signal_to_the_command_reaches_the_program(vm: Caisson) -> None:
    script = "trap 'echo told; exit 9' TERM; echo ready; while :; do sleep 0.1; done"
    with vm.start("exec", "--", "sh", "-c", script, stdin=-3, stdout=-1) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"ready\n"
        command.send_signal(signal.SIGTERM)
        assert command.stdout.read() == b"told\n"
        assert command.wait(TIMEOUT) == 9


def test_a_closed_pipe_ends_the_program(vm: Caisson) -> None:
    with vm.start("exec", "--", "yes", "still here", stdin=-3, stdout=-1) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"still here\n"
        command.stdout.close()
        assert command.wait(TIMEOUT) == 128 + signal.SIGPIPE
    wait_until(lambda: b"yes" not in vm("exec", "--", "ps", "-o", "comm").stdout, "`yes` ends in the guest")


def test_a_terminal_is_one(vm: Caisson) -> None:
    with Terminal(vm, "exec", "--tty", "--", "sh") as terminal:
        terminal.expect(b"# ")
        terminal.type(b"tty; stty size\r")
        terminal.expect(b"/dev/pts/")
        terminal.expect(b"31 97")
        terminal.resize(44, 120)
        terminal.type(b"while [ \"$(stty size)\" != '44 120' ]; do sleep 0.1; done; echo resiz''ed\r")
        terminal.expect(b"resized")
        terminal.type(b"sh -c 'echo read''y; exec sleep 1000' || echo interrup''ted\r")
        terminal.expect(b"ready")
        terminal.type(b"\x03")
        terminal.expect(b"# ")
        terminal.type(b"exit 5\r")
        assert terminal.status() == 5


def test_a_background_job_on_the_terminal_does_not_hold_it(vm: Caisson) -> None:
    with Terminal(vm, "exec", "--tty", "--", "sh", "-c", "trap '' HUP; sleep 1000 & echo started; exit 6") as terminal:
        terminal.expect(b"started")
        assert terminal.status() == 6
