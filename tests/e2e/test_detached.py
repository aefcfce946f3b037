"""Test containers that run in the background, and the options that `run` has from Docker."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.build.container_images import busybox_layer, docker_archive
from tests.e2e.conftest import TIMEOUT, Caisson
from tests.e2e.terminal import Terminal

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(docker_archive(tmp_path_factory.mktemp("image") / "image.tar", [busybox_layer()], Cmd=["/bin/sh"]))


def run(vm: Caisson, image: str, *words: str) -> tuple[int, bytes, bytes]:
    """Run an image in the session's VM; the arguments are options, and after "--" a program."""
    done = vm("run", "--name", "default", *words[: words.index("--")], image, *words[words.index("--") :])
    return done.returncode, done.stdout, done.stderr


def test_a_detached_container_from_its_output_to_its_files(vm: Caisson, image: str, tmp_path: Path) -> None:
    script = "busybox head -c 300000 /dev/zero; echo; echo last; echo r >/result; exit 5"
    assert run(vm, image, "--detach", "--container", "apart", "--", "sh", "-c", script)[0] == 0
    assert vm("wait", "apart").stdout == b"5\n"
    assert vm("logs", "apart", "--tail", "1").stdout == b"last\n"
    assert len(vm("logs", "apart", "--follow").stdout) == 300_006
    for words in (
        ("exec", "--container", "apart", "--", "true"),
        ("share", str(tmp_path), "--container", "apart"),
    ):
        refused = vm(*words)
        assert refused.returncode == 125, refused.stderr
        assert b"container apart has exited" in refused.stderr and refused.stderr.count(b"\n") == 1
    assert vm("cp", "apart:/result", str(tmp_path)).returncode == 0
    assert (tmp_path / "result").read_text() == "r\n"
    listed = vm("ps", "--all").stdout.decode()
    assert any(line.startswith("apart ") and line.endswith("exited with status 5") for line in listed.splitlines())
    assert b"apart" not in vm("ps").stdout
    assert vm("rm", "apart").returncode == 0
    unreachable: list[tuple[str, ...]] = [
        ("exec", "--container", "apart", "--", "true"),
        ("share", str(tmp_path), "--container", "apart"),
        ("cp", "/etc/hostname", "apart:/x"),
        ("cp", "apart:/result", str(tmp_path)),
    ]
    for line in unreachable:
        refused = vm(*line)
        assert refused.returncode == 125, refused.stderr
        assert b"apart: does not exist" in refused.stderr and refused.stderr.count(b"\n") == 1, refused.stderr
    assert b"apart" not in vm("ps", "--all").stdout


def test_attach_joins_at_a_terminal_and_leaves_by_its_keys(vm: Caisson, image: str) -> None:
    options = ("--detach", "--tty", "--container", "talks", "--")
    script = "while busybox sleep 0.1; do [ -e /go ] && echo gone-on; [ -e /end ] && exit 4; done"
    assert run(vm, image, *options, "sh", "-c", script)[0] == 0
    with Terminal(vm, "attach", "talks") as terminal:
        assert vm("cp", "/etc/hostname", "talks:/go").returncode == 0
        terminal.expect(b"gone-on")
        terminal.type(b"\x10")
        terminal.type(b"\x11")
        assert terminal.status() == 0
        assert terminal.modes() == terminal.before
    assert vm("exec", "--container", "talks", "--", "sh", "-c", "echo lives").stdout == b"lives\n"
    with vm.start("attach", "talks", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert b"gone-on" in command.stdout.readline()  # it is attached
        vm("cp", "/etc/hostname", "talks:/end")  # which may end with the container
        command.communicate(timeout=TIMEOUT)
    assert command.returncode == 4
    assert vm("rm", "talks").returncode == 0


def test_an_ended_container_starts_again_on_its_files(vm: Caisson, image: str) -> None:
    script = "echo run >>/runs; busybox wc -l </runs; [ -e /stay ] && exec sleep 1000; exit 3"
    assert run(vm, image, "--detach", "--container", "again", "--", "sh", "-c", script)[0] == 0
    assert vm("wait", "again").stdout == b"3\n"
    started = vm("start", "again")
    assert (started.returncode, started.stdout) == (0, b"again\n"), started.stderr
    assert vm("logs", "again", "--follow").stdout.strip() == b"2"
    assert vm("wait", "again").stdout == b"3\n"
    assert vm("cp", "/etc/hostname", "again:/stay").returncode == 0
    assert vm("start", "again").returncode == 0
    assert vm("exec", "--container", "again", "--", "/bin/cat", "/runs").stdout == b"run\n" * 3
    refused = vm("start", "again")
    assert refused.returncode == 1 and b"again: has not exited" in refused.stderr and refused.stderr.count(b"\n") == 1
    assert vm("rm", "again").returncode == 0


def test_removing_a_container_ends_an_exec_in_it(vm: Caisson, image: str) -> None:
    assert run(vm, image, "--detach", "--container", "goes", "--", "busybox", "sleep", "1000")[0] == 0
    words = ("exec", "--container", "goes", "--", "sh", "-c", "echo up; exec busybox sleep 1000")
    with vm.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        assert command.stdout is not None and command.stdout.readline() == b"up\n"
        assert vm("rm", "goes").returncode == 0
        _, errors = command.communicate(timeout=TIMEOUT)
    assert (command.returncode, errors) == (137, b"")


def test_ctrl_c_ends_a_program_that_handles_nothing(vm: Caisson, image: str) -> None:
    # Not with a shell: it handles SIGINT, and one that arrives during execve is lost.
    words = ("run", "--name", "default", "--hostname", "up", image, "--", "busybox", "tail", "-f", "/etc/hostname")
    with vm.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        assert command.stdout is not None and command.stdout.readline() == b"up\n"
        command.send_signal(signal.SIGINT)
        _, errors = command.communicate(timeout=TIMEOUT)
    assert (command.returncode, errors) == (130, b"")


def test_options_of_docker(vm: Caisson, image: str, tmp_path: Path) -> None:
    (tmp_path / "shared").write_text("from the host\n")
    options = (
        "--hostname", "h", "--read-only", "--tmpfs", "/x", "--cap-drop", "ALL", "--init", "--memory", "64M",
        "--pids-limit", "50", "--volume", f"{tmp_path}:/v:ro", "--entrypoint", "sh",
    )  # fmt: skip
    script = (
        "cat /etc/hostname /v/shared; busybox grep CapEff /proc/self/status; echo x >/x/y; cat /x/y; echo >/y; "
        "busybox ping -c 1 localhost >/dev/null && echo pinged"
    )
    status, output, errors = run(vm, image, *options, "--", "-c", script)
    assert status in (0, 1), errors
    lines = output.splitlines()
    assert lines[:2] == [b"h", b"from the host"] and lines[2].split()[1] == b"0" * 16 and lines[3] == b"x"
    assert b"Read-only file system" in errors


def test_a_timeout_and_a_lack_of_memory_are_told(vm: Caisson, image: str) -> None:
    assert run(vm, image, "--timeout", "2", "--", "busybox", "sleep", "1000")[0] == 124
    hog = "x=a; while :; do x=$x$x; done"
    status, _, errors = run(vm, image, "--memory", "32M", "--", "sh", "-c", hog)
    assert status == 137 and b"out of memory: limit 32 MiB" in errors


def test_words_that_are_no_utf_8_travel_byte_for_byte(vm: Caisson) -> None:
    assert vm("exec", "--", "printf", "a\udcffb").stdout == b"a\xffb"


def test_an_image_is_run_again_by_its_name(vm: Caisson, image: str) -> None:
    assert run(vm, image, "--", "echo")[0] == 0
    assert run(vm, "test:latest", "--", "sh", "-c", "echo again")[1] == b"again\n"
    assert b"test:latest" in vm("images").stdout


@pytest.mark.parametrize("name", ["a/b", "-x", "é", "x" * 254])
def test_names_that_no_container_can_have_are_one_line(vm: Caisson, image: str, name: str) -> None:
    status, _, errors = run(vm, image, f"--container={name}", "--", "true")
    assert status == 125 and errors.count(b"\n") == 1
