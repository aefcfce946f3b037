"""Test descriptors that callers of the OCI command line pass or receive: terminals, pidfds, sockets."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.native.oci_support import Oci, bundle
from tests.support.poll import wait_until

pytestmark = pytest.mark.root
NAME = f"oci-{os.getpid()}"


def received(oci: Oci, option: str, place: Path, made: Path) -> tuple[bytes, int]:
    """Run a container detached, with a socket; return what it is sent: data, and a descriptor."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place))
        server.listen(1)
        assert oci.detached("run", "-d", option, str(place), "-b", str(made), NAME).status == 0
        connection, _ = server.accept()
        with connection:
            text, fds, _, _ = socket.recv_fds(connection, 100, 1)
    return text, fds[0]


def test_console_socket_gets_the_terminal(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "sh", "-c", "tty; read x; echo got $x", terminal=True)
    name, terminal = received(oci, "--console-socket", tmp_path / "console", made)
    assert name == b"/dev/pts/0"
    os.write(terminal, b"word\n")
    seen = b""
    while b"got word" not in seen:
        seen += os.read(terminal, 100)
    assert seen.startswith(b"/dev/pts/0\r\n")
    os.close(terminal)
    assert (
        "cannot use console socket if runc will not detach or allocate tty"
        in oci("run", "--console-socket", "/x", "-b", str(made), f"{NAME}-2").message
    )


def test_terminals_in_the_foreground_end_lines_by_newlines(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "sh", "-c", "tty; echo line", terminal=True)
    assert oci.ok("run", "-b", str(made), NAME) == "/dev/pts/0\nline\n"


def test_pidfd_socket(oci: Oci, sleeper: Path, tmp_path: Path) -> None:
    _, pidfd = received(oci, "--pidfd-socket", tmp_path / "pidfd", sleeper)
    assert f"Pid:\t{oci.state(NAME)['pid']}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    os.close(pidfd)


def test_preserved_descriptors_keep_their_numbers(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "sh", "-c", "cat <&3; ls /proc/self/fd | wc -l")
    read, write = os.pipe()
    os.write(write, b"handed on\n")
    os.close(write)
    argv = [
        "bash",
        "-c",
        f'exec "$@" 3<&{read}',
        "bash",
        *oci.argv("run", "--preserve-fds", "1", "-b", str(made), NAME),
    ]
    done = subprocess.run(argv, pass_fds=[read], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=oci._env)
    os.close(read)
    assert (done.returncode, done.stdout) == (0, "handed on\n5\n"), done.stderr
    result = oci("run", "--preserve-fds", "4", "-b", str(made), NAME)
    assert "unable to stat preserved-fd 0" in result.message


def test_listen_fds_are_passed_on(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "sh", "-c", "echo $LISTEN_FDS $LISTEN_PID; ls /proc/self/fd | wc -l")
    script = 'export LISTEN_PID=$$; exec "$@" 3</dev/null'
    argv = ["sh", "-c", script, "sh", *oci.argv("run", "-b", str(made), NAME)]
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, env={**oci._env, "LISTEN_FDS": "1"}
    )
    assert (done.returncode, done.stdout) == (0, "1 1\n5\n"), done.stderr


def test_readiness_is_passed_on(oci: Oci, tmp_path: Path, busybox_rootfs: Path) -> None:
    made = bundle(tmp_path / "b", busybox_rootfs, "sh", "-c", "ls -l $NOTIFY_SOCKET | cut -c1; sleep 1000")
    outside = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    outside.bind(str(tmp_path / "notify"))
    outside.settimeout(20)
    with subprocess.Popen(
        oci.argv("run", "-d", "-b", str(made), NAME), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        env={**oci._env, "NOTIFY_SOCKET": str(tmp_path / "notify")},
    ) as starter:  # fmt: skip
        inside = oci.root / NAME / "notify" / "notify.sock"
        wait_until(inside.exists, "no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as container:
            container.sendto(b"STATUS=x\nREADY=1", str(inside))
        messages = [outside.recv(100), outside.recv(100)]
        barrier, fds, _, _ = socket.recv_fds(outside, 100, 1)
        os.close(fds[0])
        assert starter.wait(20) == 0
    outside.close()
    assert messages == [b"READY=1\n", f"MAINPID={oci.state(NAME)['pid']}".encode()]
    assert barrier == b"BARRIER=1"
