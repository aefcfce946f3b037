"""Test `caisson cp` and `caisson logs`."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import TIMEOUT, Caisson

pytestmark = pytest.mark.vm


def run(vm: Caisson, *words: str) -> bytes:
    done = vm(*words)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_a_tree_there_and_back(vm: Caisson, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    data = random.Random(3).randbytes(3_000_000)
    (tree / "sub" / ("long-" * 40 + "ünïcode")).write_bytes(data)
    (tree / "run").write_text("#!/bin/sh\n")
    (tree / "run").chmod(0o751)
    os.link(tree / "run", tree / "same")
    (tree / "link").symlink_to("/etc/passwd")
    os.utime(tree / "run", (1000, 1000))

    vm.make_containers("files")
    run(vm, "exec", "--container", "files", "--", "mkdir", "/tmp/there")
    run(vm, "cp", str(tree), "files:/tmp/there")  # an existing directory: into it
    run(vm, "cp", str(tree), "files:/tmp/other")  # otherwise: its new name
    script = "stat -c '%a %u %Y' /tmp/there/tree/run; readlink /tmp/other/link; ls /tmp/there /tmp/other"
    lines = run(vm, "exec", "--container", "files", "--", "sh", "-c", script).decode().split("\n")
    assert lines[:2] == ["751 0 1000", "/etc/passwd"] and "tree" in lines

    (tmp_path / "back").mkdir()
    run(vm, "cp", "files:/tmp/there/tree", str(tmp_path / "back"))
    run(vm, "cp", "files:/tmp/other/", str(tmp_path / "renamed"))
    for copied in (tmp_path / "back/tree", tmp_path / "renamed"):
        assert (copied / "sub" / ("long-" * 40 + "ünïcode")).read_bytes() == data
        assert stat.S_IMODE((copied / "run").stat().st_mode) == 0o751
        assert (copied / "run").stat().st_ino == (copied / "same").stat().st_ino
        assert (copied / "run").stat().st_mtime == 1000
        assert (copied / "link").readlink() == Path("/etc/passwd")

    run(vm, "cp", "files:/etc/passwd", str(tmp_path / "passwd"))
    assert (tmp_path / "passwd").read_bytes().startswith(b"root:")


@pytest.mark.parametrize(
    ("source", "target", "why"),
    [
        ("/no/such/file", "files:/tmp", b"No such file or directory"),
        ("files:/no/such/file", "/tmp", b"No such file or directory"),
        ("/etc/passwd", "files:/proc/x", b"/proc: "),
        ("/etc/passwd", "files:/nowhere/x", b"/nowhere"),
        ("files:/etc/passwd", "/no/such/directory/x", b"no such directory"),
        ("a", "b", b"CONTAINER:PATH"),
        ("files:/a", "files:/b", b"CONTAINER:PATH"),
    ],
)
def test_copy_reports_why_it_failed(vm: Caisson, source: str, target: str, why: bytes) -> None:
    vm.make_containers("files")
    done = vm("cp", source, target)
    assert done.returncode == (2 if why == b"CONTAINER:PATH" else 1)
    assert done.stderr.startswith(b"caisson: ") and why in done.stderr and done.stderr.count(b"\n") == 1


def test_logs(own: Caisson) -> None:
    booted = own("boot-vm", "--name", "talks", "--detach", "--append", "agent.log=debug")
    assert booted.returncode == 0, booted.stderr.decode()
    with own.start("logs", "--name", "talks", "--follow", stdout=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        assert any(b"agent ready" in line for line in follower.stdout)  # it may arrive after the first response
        follower.kill()
    assert b"agent ready" in run(own, "logs", "--name", "talks")
    for line in run(own, "logs", "--name", "talks", "--agent").splitlines():
        assert json.loads(line)["level"]
    words = ("logs", "--name", "talks", "--agent", "--follow")
    with own.start(*words, stdout=subprocess.PIPE) as follower, own.start(*words, stdout=subprocess.PIPE) as cut:
        assert follower.stdout is not None and cut.stdout is not None
        follower.stdout.readline()
        cut.stdout.readline()
        cut.stdout.close()
        own.make_containers("spoken-of", vm="talks")
        assert cut.wait(TIMEOUT) != 0  # nobody reads: it exits at the next line, not with the VM
        for line in follower.stdout:
            if b"spoken-of" in line:
                break
        else:
            raise AssertionError("it ended before the VM")
        assert own("stop-vm", "--name", "talks").returncode == 0
        follower.stdout.read()
        assert follower.wait(TIMEOUT) == 0


@pytest.mark.nightly
def test_copying_takes_no_longer_than_three_shares(vm: Caisson, tmp_path: Path) -> None:
    """100 MB each way, compared with sharing a directory and copying in the guest: one mount and one read."""
    data = random.Random(7).randbytes(100_000_000)
    (tmp_path / "big").write_bytes(data)
    vm.make_containers("large")

    def seconds(*words: str) -> float:
        began = time.monotonic()
        run(vm, *words)
        return time.monotonic() - began

    shared = seconds("share", str(tmp_path), "--container", "large", "--at", "/tmp/shared", "--tag", "large")
    shared += seconds("exec", "--container", "large", "--", "cp", "/tmp/shared/big", "/tmp/by-share")
    run(vm, "exec", "--container", "large", "--", "rm", "/tmp/by-share")
    run(vm, "unshare", "large")
    into = seconds("cp", str(tmp_path / "big"), "large:/tmp/by-copy")
    out = seconds("cp", "large:/tmp/by-copy", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data
    run(vm, "exec", "--container", "large", "--", "rm", "/tmp/by-copy")
    assert max(into, out) < 3 * shared, (shared, into, out)
